"""Examples to learn from: rows of JSONL to tokens, which of them the loss counts, and whole examples packed into rows.

The kind of a file is seen from its fields: prompt/response {"prompt", "response"} (or "completion"), classification
{"text", "label"} (the response is " " + label), chat {"messages": [{"role", "content"}, ...]}; {"text"} alone is plain
text, which is not this file's. A prompt is encoded alone, then its response as what follows it, then end-of-text, so
that a prompt has the tokens in training that it has when it is asked. The loss counts responses only. Fields that would
change what is learnt are refused by name. A row too long is cut, dropped or refused (data.too_long).

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

from config import UserError
from data.chat import OTHER_ROLES, ChatError, conversion, plain_messages
from data.dataset import open_dataset, open_split
from data.prompts import encode_prompt, fit_conversation, kept_tokens
from data.sources import SourceError, TextFile, Unit, first_row, jsonl_rows, row_name
from data.tokenizer import Tokenizer

TEXT, PROMPT_RESPONSE, CLASSIFICATION, CHAT = "text", "prompt/response", "classification", "chat"
FIELDS = {CHAT: ("messages",), PROMPT_RESPONSE: ("prompt", "response"), CLASSIFICATION: ("text", "label")}
MEANING = ("system", "history", "tools", "functions", "tool_calls", "function_call", "parallel_tool_calls", "documents",
           "images", "chosen", "rejected", "weight", "chat_template_kwargs")  # of a row, which nothing here honours
CONVERSIONS = {  # rows of other shapes -> what to make of a row r
    ("conversations",): f"{{'messages': [{{'role': {OTHER_ROLES}.get(m['from'], m['from']), 'content': m['value']}} "
                        "for m in r['conversations']]}",
    ("instruction", "output"): r"{'prompt': r['instruction'] + ('\n\n' + r['input'] if r.get('input') else '') + "
                               r"'\n\n', 'response': r['output']}",
    ("prompt", "chosen"): "{'prompt': r['prompt'], 'response': r['chosen']}",
}
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
            if all(name in row or (name == "response" and "completion" in row) for name in names):
                return kind
    return TEXT


def find_kind(files: Sequence[TextFile], text_field: str) -> str:
    """The kind that all files have, by their first rows. Raises SourceError if they differ, or are of another shape
    that can be converted."""
    kinds: dict[str, str] = {}
    for file in files:
        row = first_row(file) if file.kind == "jsonl" else {}
        if row is None:
            continue
        kind = kind_of_row(row, text_field)
        kinds.setdefault(kind, file.path)
        for names, expression in CONVERSIONS.items():
            if kind == TEXT and isinstance(row, dict) and {*names} <= row.keys() and text_field not in row:
                raise SourceError(f"source {file.path!r} has rows of {', '.join(names)}; convert it first: "
                                  f"{conversion(expression, file.path)}")
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise SourceError(f"source {first!r} holds {one} but {second!r} holds {other}; prepare one kind at a time, "
                          "from a folder of its own")
    return next(iter(kinds), TEXT)


def examples(unit: Unit, packing: Packing, tokenizer: Tokenizer) -> Iterator[tuple[Example | None, int]]:
    """(example, invalid UTF-8 sequences replaced in its row) of the rows of a unit, of a conversation one or several;
    None for one dropped as too long. Raises ExampleError naming the row."""
    for number, row, invalid in jsonl_rows(unit):
        with _naming(unit, number):
            found = _examples(row, packing, tokenizer)
        for example in found:
            yield example, invalid
            invalid = 0  # it is the row's


def texts_of_examples(unit: Unit, kind: str) -> Iterator[tuple[list[str], str]]:
    """(the texts of a row, to train a tokenizer on, and its Example.text) of each row of a unit. Raises ExampleError.
    """
    for number, row, _ in jsonl_rows(unit):
        with _naming(unit, number):
            row = plain_row(row, kind)
        parts = [m["content"] for m in row["messages"]] if kind == CHAT else [str(row[name]) for name in FIELDS[kind]]
        yield parts, _text_of_row(row)


@contextmanager
def _naming(unit: Unit, number: int) -> Iterator[None]:
    try:
        yield
    except (ExampleError, ChatError) as error:
        raise ExampleError(f"source {row_name(unit, number)} {error}") from None


def _text_of_row(row: dict) -> str:
    return json.dumps(row, sort_keys=True)


def plain_row(row: object, kind: str) -> dict:
    """The FIELDS of a row, its completion called response. Raises ExampleError or ChatError if it is no example of this
    kind, has nothing to learn, or another field that would change what is learnt."""
    found = kind_of_row(row, "text")
    if found != kind:
        names = f"only {', '.join(row)}" if isinstance(row, dict) else json.dumps(row)[:40]
        raise ExampleError(f"is not {kind}, as the first row is: it should have {' and '.join(FIELDS[kind])} but has "
                           f"{names}; keep one kind in a file")
    unseen = [name for name in MEANING if row.get(name) not in (None, [], {}, "")]
    if unseen:
        raise ExampleError(f"has {unseen[0]!r}, which is not honoured here; put what it says into "
                           f"{' or '.join(FIELDS[kind])}, or remove it")
    if kind == CHAT:
        return {"messages": _learnable(plain_messages(row["messages"]))}
    if kind == PROMPT_RESPONSE and "completion" in row:
        if "response" in row:
            raise ExampleError("has both a response and a completion; remove one")
        row = row | {"response": row["completion"]}
    for name in FIELDS[kind]:
        allowed = str | int if name == "label" else str
        if not isinstance(row[name], allowed) or isinstance(row[name], bool):
            raise ExampleError(f"has {json.dumps(row[name])[:40]} as its {name}; it should be text (turns go into one "
                               "list, messages)")
    answer = FIELDS[kind][1]
    if not str(row[answer]).strip():
        raise ExampleError(f"has an empty {answer}: there is nothing to learn from it; fill it in or remove the row")
    return {name: row[name] for name in FIELDS[kind]}


def _learnable(messages: list[dict]) -> list[dict]:
    learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]
    empty = next((i for i in learnt if not messages[i]["content"].strip()), None)
    if empty is not None:
        raise ExampleError(f"message {empty + 1}, the assistant's, is empty: there is nothing to learn from it; fill "
                           'it in, give it "weight": 0 or remove the row')
    if not learnt:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise ExampleError(f"has no message of the role assistant{' with a weight' * ('assistant' in roles)}, only of "
                           f"{roles}: there is nothing to learn from it; remove the row or mend its roles")
    return messages


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
