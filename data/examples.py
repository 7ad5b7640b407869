"""Examples to learn from: rows of JSONL to tokens, which of them the loss counts, and whole examples packed into rows.

The kind of a file is seen from its fields: prompt/response {"prompt", "response"}, classification {"text", "label"}
(the response is " " + label), chat {"messages": [{"role", "content"}, ...]}; {"text"} alone is plain text, which is not
this file's. A prompt is encoded alone, then its response, then end-of-text, so that a prompt has the tokens in training
that it has when it is asked. The loss counts responses only. A row too long is cut, dropped or refused (data.too_long).

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

import numpy as np

from config import UserError
from data.chat import ChatError
from data.prompts import encode_prompt, fit_conversation, kept_tokens
from data.sources import SKIP_BAD, SourceError, TextFile, Unit, first_row, jsonl_rows, row_name
from data.tokenizer import Tokenizer

TEXT, PROMPT_RESPONSE, CLASSIFICATION, CHAT = "text", "prompt/response", "classification", "chat"
FIELDS = {CHAT: ("messages",), PROMPT_RESPONSE: ("prompt", "response"), CLASSIFICATION: ("text", "label")}
ROWS_PER_UNIT = 256  # at least, for best-fit to choose from


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
        template = {"chat_template": template_hash(self.chat_template)} if self.kind == CHAT else {}
        return {"kind": self.kind, "max_seq_len": self.max_seq_len, "too_long": self.too_long} | template

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


class ExampleError(UserError):
    """A row that is no example, or does not fit."""


# ---- Rows -> examples ------------------------------------------------------------------------------------------------

def kind_of_row(row: object, text_field: str) -> str:
    """What a row of JSONL holds. A text_field other than "text" was named by the user: plain text."""
    if isinstance(row, dict) and not (text_field != "text" and text_field in row):
        for kind, names in FIELDS.items():
            if all(name in row for name in names):
                return kind
    return TEXT


def find_kind(files: Sequence[TextFile], text_field: str, *, skip_bad: bool = False) -> str:
    """The kind that all files have, by their first rows. Raises SourceError if they differ."""
    kinds: dict[str, str] = {}
    for file in files:
        row = first_row(file, skip_bad=skip_bad) if file.kind == "jsonl" else {}
        if row is not None:
            kinds.setdefault(kind_of_row(row, text_field), file.path)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise SourceError(f"source {first!r} holds {one} but {second!r} holds {other}; prepare one kind at a time, "
                          "from a folder of its own")
    return next(iter(kinds), TEXT)


def examples(unit: Unit, packing: Packing, tokenizer: Tokenizer) -> Iterator[tuple[Example | None, int]]:
    """(example, invalid UTF-8 sequences replaced in it) of each row of a unit; None for one dropped as too long. Raises
    ExampleError naming the row."""
    for number, row, invalid in jsonl_rows(unit):
        with _naming(unit, number):
            yield _example(row, packing, tokenizer), invalid


def texts_of_examples(unit: Unit, kind: str) -> Iterator[tuple[list[str], str]]:
    """(the texts of a row, to train a tokenizer on, and its Example.text) of each row of a unit. Raises ExampleError.
    """
    for number, row, _ in jsonl_rows(unit):
        with _naming(unit, number):
            check_row(row, kind)
        parts = [m["content"] for m in row["messages"]] if kind == CHAT else [str(row[name]) for name in FIELDS[kind]]
        yield parts, _text_of_row(row, kind)


@contextmanager
def _naming(unit: Unit, number: int) -> Iterator[None]:
    try:
        yield
    except (ExampleError, ChatError) as error:
        raise ExampleError(f"source {row_name(unit, number)} {error}; or {SKIP_BAD}") from None


def _text_of_row(row: dict, kind: str) -> str:
    return json.dumps({name: row[name] for name in FIELDS[kind]}, sort_keys=True)


def check_row(row: object, kind: str) -> None:
    """Raise ExampleError if a row is no example of this kind or has nothing to learn."""
    found = kind_of_row(row, "text")
    if found != kind:
        names = f"only {', '.join(row)}" if isinstance(row, dict) else json.dumps(row)[:40]
        raise ExampleError(f"is not {kind}, as the first row is: it should have {' and '.join(FIELDS[kind])} but has "
                           f"{names}; keep one kind in a file")
    if kind == CHAT:
        _check_messages(row["messages"])
        return
    for name in FIELDS[kind]:
        allowed = str | int if name == "label" else str
        if not isinstance(row[name], allowed) or isinstance(row[name], bool):
            raise ExampleError(f"has {json.dumps(row[name])[:40]} as its {name}; it should be text")
    answer = FIELDS[kind][1]
    if not str(row[answer]).strip():
        raise ExampleError(f"has an empty {answer}: there is nothing to learn from it; fill it in or remove the row")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise ExampleError('has no messages; it should have a list of {"role", "content"}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or any(not isinstance(message.get(k), str) for k in ("role", "content")):
            raise ExampleError(f"message {number} is not {{\"role\", \"content\"}} with a text in both")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ExampleError(f"message {number}, the assistant's, is empty: there is nothing to learn from it; fill "
                               "it in or remove the row")
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({str(message.get("role")) for message in messages}))
        raise ExampleError(f"has no message of the role assistant, only of {roles}: there is nothing to learn from it; "
                           "remove the row or mend its roles")


def _example(row: dict, packing: Packing, tokenizer: Tokenizer) -> Example | None:
    check_row(row, packing.kind)
    room = packing.row_tokens if packing.too_long == "cut" else sys.maxsize
    if packing.kind == CHAT:
        ids, scored, cut = fit_conversation(tokenizer, packing.chat_template, row["messages"], room)
    else:
        prompt, answer = (row[name] for name in FIELDS[packing.kind])
        prompt = encode_prompt(tokenizer, prompt)
        answer = tokenizer.encode(f" {answer}" if packing.kind == CLASSIFICATION else answer)
        ids = np.concatenate([prompt, np.append(answer, np.uint32(tokenizer.eot))])
        stay = kept_tokens(tokenizer, ids, room, response=len(answer) + 1)
        ids, scored, cut = ids[stay], stay >= len(prompt), len(ids) - len(stay)
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
    return Example(ids, scored, _text_of_row(row, packing.kind), cut)


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
