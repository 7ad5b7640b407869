"""Examples to learn from: rows of JSONL to tokens, which of them the loss counts, and whole examples packed into rows.

What a row says is rows.py's. A prompt is encoded alone, then its response (of a classification " " + label) as what
follows it, then end-of-text, so that a prompt has the tokens in training that it has when it is asked. The loss counts
responses only. A row too long is cut, dropped or refused (data.too_long).

A row holds max_seq_len + 1 tokens: whole examples, then end-of-text without loss. Examples are packed best-fit
decreasing (Johnson 1973) within a unit of sources.py, about 1 MB of rows, so that packing needs no state between units
and the number of worker processes changes nothing.
"""

import bisect
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.chat import ChatError
from data.dataset import open_dataset, open_split
from data.prompts import encode_prompt, fit_conversation, kept_tokens
from data.rows import CHAT, CLASSIFICATION, FIELDS, ExampleError, OtherShape, plain_row
from data.sources import SKIP_BAD, Unit, jsonl_rows, row_name
from data.tokenizer import Tokenizer

CHAT_FORMAT = 2  # of what is learnt from a chat; the first counted the contents of turns, not all that is to be written
ROWS_PER_UNIT = 256  # at least, for best-fit to choose from
SHOWN_CHARS = 400  # of a part of an example


@dataclass(frozen=True)
class Packing:
    """How rows of JSONL become rows of tokens."""

    kind: str
    max_seq_len: int
    chat_template: str = ""  # of kind chat
    too_long: str = "cut"  # an example longer than a row; or drop, error

    @property
    def settings(self) -> dict:
        """What decides the tokens, as index.json keeps it."""
        of_chats = {"chat_template": template_hash(self.chat_template), "chat_format": CHAT_FORMAT}
        return {"kind": self.kind, "max_seq_len": self.max_seq_len, "too_long": self.too_long} | (
            of_chats if self.kind == CHAT else {})

    @property
    def row_tokens(self) -> int:
        return self.max_seq_len + 1  # inputs and, one further on, targets


@dataclass(frozen=True)
class Example:
    ids: np.ndarray  # (n,) uint32, n <= row_tokens
    scored: np.ndarray  # (n,) bool: the loss counts predicting this token
    text: str  # what the row says, as one string: its hash chooses the split
    cut: int  # tokens left out to fit into a row


def template_hash(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()[:16]


# ---- Rows -> examples ------------------------------------------------------------------------------------------------

def examples(unit: Unit, packing: Packing, tokenizer: Tokenizer,
             bad: list[int] | None = None) -> Iterator[tuple[Example | None, int]]:
    """(example, invalid UTF-8 sequences replaced in its row) of the rows of a unit, of a conversation one or several;
    None for one dropped as too long. Raises ExampleError naming the row unless there is a list for bad ones."""
    for number, row, invalid in jsonl_rows(unit, bad):
        with _naming(unit, number, bad):
            for example in _examples(row, packing, tokenizer):
                yield example, invalid
                invalid = 0  # it is the row's


def texts_of_examples(unit: Unit, kind: str, bad: list[int] | None = None) -> Iterator[tuple[list[str], str]]:
    """(the texts of a row, to train a tokenizer on, and its Example.text) of each row of a unit. Raises ExampleError.
    """
    for number, row, _ in jsonl_rows(unit, bad):
        with _naming(unit, number, bad):
            row = plain_row(row, kind)
            parts = [m["content"] for m in row["messages"]] if kind == CHAT else \
                [str(row[name]) for name in FIELDS[kind]]
            yield parts, _text_of_row(row)


@contextmanager
def _naming(unit: Unit, number: int, bad: list[int] | None) -> Iterator[None]:
    try:
        yield
    except (ExampleError, ChatError) as error:
        if bad is None:
            way_out = "" if isinstance(error, OtherShape) else f"; or {SKIP_BAD}"
            raise ExampleError(f"source {row_name(unit, number)} {error}{way_out}") from None
        bad.append(number)


def _text_of_row(row: dict) -> str:
    return json.dumps(row, sort_keys=True)


def _examples(row: object, packing: Packing, tokenizer: Tokenizer) -> list[Example | None]:
    row = plain_row(row, packing.kind)
    room = packing.row_tokens if packing.too_long == "cut" else sys.maxsize
    if packing.kind == CHAT:
        found = fit_conversation(tokenizer, packing.chat_template, row["messages"], room)
    else:
        prompt, answer = (row[name] for name in FIELDS[packing.kind])
        asked = encode_prompt(tokenizer, prompt)
        is_label = packing.kind == CLASSIFICATION
        answer = tokenizer.encode(f" {answer}" if is_label else answer, behind="text" if prompt or is_label else None)
        ids = np.concatenate([asked, np.append(answer, np.uint32(tokenizer.eot))])
        stay = kept_tokens(tokenizer, ids, room, response=len(answer) + 1)
        found = [(ids[stay], stay >= len(asked), len(ids) - len(stay))]
    return [_fitted(*each, _text_of_row(row), packing) for each in found]


def _fitted(ids: np.ndarray, scored: np.ndarray, cut: int, text: str, packing: Packing) -> Example | None:
    """The example, or None if it is to be dropped as too long. Raises ExampleError."""
    if len(ids) > packing.row_tokens:
        if packing.too_long == "drop":
            return None
        raise ExampleError(f"has {len(ids)} tokens, {int(scored.argmax())} of them before its response, more than the "
                           f"{packing.row_tokens} that a context of {packing.max_seq_len} takes; shorten it, raise the "
                           "context (model.max_seq_len, --max-seq-len; with train.init_from at most the parent's), or "
                           "let it be cut or dropped (--too-long, data.too_long)")
    scored[:1] = False  # nothing of the example stands before it
    if not scored.any():
        raise ExampleError("has nothing to learn: no token stands before its response, which is one token")
    return Example(ids, scored, text, cut)


# ---- Examples -> rows ------------------------------------------------------------------------------------------------

def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which examples share a row: best-fit decreasing. Rows are in the order of their first examples."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[i], 0))  # the fullest row that still takes it
        if place == len(room):
            rows.append([])
            left, row = row_tokens, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return sorted(sorted(row) for row in rows)


def packed(found: Sequence[Example], row_tokens: int, eot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, loss and start, each (rows, row_tokens): ids (uint32); 1 where the loss counts, 1 where an example starts
    (uint8)."""
    rows = pack([len(example.ids) for example in found], row_tokens)
    tokens = np.full((len(rows), row_tokens), eot, dtype=np.uint32)
    loss, start = (np.zeros(tokens.shape, dtype=np.uint8) for _ in range(2))
    for row, members in enumerate(rows):
        place = 0
        for example in (found[i] for i in members):
            end = place + len(example.ids)
            tokens[row, place:end], loss[row, place:end], start[row, place] = example.ids, example.scored, 1
            place = end
    return tokens, loss, start


def first_example(folder: Path, tokenizer: Tokenizer) -> str:
    """The first training example of a data folder as a JSON string, what the loss counts between [[ and ]]; the middle
    of what is long is left out."""
    stream = open_split(open_dataset(folder), "train")
    tokens, loss, start = (stream.windows(np.array([0]), stream.row_tokens, track)[0]
                           for track in (None, "loss", "start"))
    end = (*np.flatnonzero(start), len(tokens))[1]
    end = int(np.flatnonzero(loss[:end])[-1]) + 1  # not what fills the row
    parts = []
    for part in np.split(np.arange(end), np.flatnonzero(np.diff(loss[:end])) + 1):
        text = b"".join(map(tokenizer.spelling, tokens[part].tolist())).decode(errors="replace")
        text = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS // 2]} ... {text[-SHOWN_CHARS // 2:]}"
        parts.append(f"[[{text}]]" if loss[part[0]] else text)
    return json.dumps("".join(parts), ensure_ascii=False)
