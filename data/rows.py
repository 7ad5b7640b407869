"""What a row of JSONL says: its kind, seen from its fields, and its plain form; what would be misunderstood is refused.

prompt/response {"prompt", "response"} (or "completion"), classification {"text", "label"}, chat {"messages": [{"role",
"content"}, ...]}; {"text"} alone is plain text, which is not this file's. Fields that would change the meaning of a row
and that nothing honours are refused by name, rows of other shapes with a command that converts them.
"""

import json
from collections.abc import Sequence

from config import UserError
from data.chat import learnt_turns
from data.sources import SourceError, TextFile, first_row
from data.text import piped

TEXT, PROMPT_RESPONSE, CLASSIFICATION, CHAT = "text", "prompt/response", "classification", "chat"
FIELDS = {CHAT: ("messages",), PROMPT_RESPONSE: ("prompt", "response"), CLASSIFICATION: ("text", "label")}
MEANING = ("system", "history", "tools", "functions", "tool_calls", "function_call", "parallel_tool_calls", "documents",
           "images", "chosen", "rejected", "weight", "chat_template_kwargs")  # of a row, which nothing here honours
OTHER_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "ai": "assistant",
               "model": "assistant"}
RENAMED = (f"{{'messages': [m | {{'role': {OTHER_ROLES}.get(m['role'].lower(), m['role'].lower())}} "
           "for m in r['messages']]}")
CONVERSIONS = {  # rows of other shapes -> what to make of a row r
    ("conversations",): f"{{'messages': [{{'role': {OTHER_ROLES}.get(m['from'], m['from']), 'content': m['value']}} "
                        "for m in r['conversations']]}",
    ("instruction", "output"): r"{'prompt': r['instruction'] + ('\n\n' + r['input'] if r.get('input') else '') + "
                               r"'\n\n', 'response': r['output']}",
    ("prompt", "chosen"): "{'prompt': r['prompt'], 'response': r['chosen']}",
}


class ExampleError(UserError):
    """A row that is no example, or does not fit."""


class OtherShape(ExampleError):
    """A row that a command converts, with which the text ends."""


def conversion(expression: str, path: str = "IN.jsonl") -> str:
    """A command that makes OUT.jsonl of a JSONL file by a Python expression of its rows r."""
    return piped(f'python -c "import json, sys; [print(json.dumps({expression})) for r in map(json.loads, '
                 'filter(bytes.strip, sys.stdin.buffer))]"', path, "OUT.jsonl")


def kind_of_row(row: object, text_field: str) -> str:
    """What a row of JSONL holds. A text_field other than "text" was named by the user: plain text."""
    if isinstance(row, dict) and not (text_field != "text" and text_field in row):
        for kind, names in FIELDS.items():
            if all(name in row or (name == "response" and "completion" in row) for name in names):
                return kind
    return TEXT


def find_kind(files: Sequence[TextFile], text_field: str, kind: str = "auto", *, skip_bad: bool = False) -> str:
    """The kind that all files have: text if that was asked for, else by their first rows (skip_bad: good ones). Raises
    SourceError if they differ, or are of another shape that can be converted."""
    kinds: dict[str, str] = {TEXT: ""} if kind == TEXT else {}
    for file in files if kind != TEXT else ():
        row = first_row(file, skip_bad=skip_bad) if file.kind == "jsonl" else {}
        if row is None:
            continue
        found = kind_of_row(row, text_field)
        kinds.setdefault(found, file.path)
        for names, expression in CONVERSIONS.items():
            if found == TEXT and isinstance(row, dict) and {*names} <= row.keys() and text_field not in row:
                raise SourceError(f"source {file.path!r} has rows of {', '.join(names)}; convert it first: "
                                  f"{conversion(expression, file.path)}")
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise SourceError(f"source {first!r} holds {one} but {second!r} holds {other}; prepare one kind at a time, "
                          "from a folder of its own, or all as plain text (--kind text, data.kind=text)")
    return next(iter(kinds), TEXT)


def plain_row(row: object, kind: str) -> dict:
    """The FIELDS of a row, its completion called response. Raises ExampleError if it is no example of this
    kind, has nothing to learn, or another field that would change what is learnt."""
    found = kind_of_row(row, "text")
    if found != kind:
        names = f"only {', '.join(row)}" if isinstance(row, dict) else json.dumps(row)[:40]
        raise ExampleError(f"is not {kind}, as the first row is: it should have {' and '.join(FIELDS[kind])} but has "
                           f"{names}; keep one kind in a file")
    refuse_unseen(row)
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


def refuse_unseen(row: dict) -> None:
    """Raise ExampleError if a row has a field that would change its meaning."""
    unseen = [name for name in MEANING if row.get(name) not in (None, [], {}, "")]
    if unseen:
        raise ExampleError(f"has {unseen[0]!r}, which is not honoured here; put what it says into the row's texts, or "
                           "remove it")


def _learnable(messages: list[dict]) -> list[dict]:
    learnt = learnt_turns(messages)
    empty = next((i for i in learnt if not messages[i]["content"].strip()), None)
    if empty is not None:
        raise ExampleError(f"message {empty + 1}, the assistant's, is empty: there is nothing to learn from it; fill "
                           'it in, give it "weight": 0 or remove the row')
    if not learnt:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise ExampleError(f"has no message of the role assistant{' with a weight' * ('assistant' in roles)}, only of "
                           f"{roles}: there is nothing to learn from it; remove the row or mend its roles")
    return messages


def plain_messages(messages: object) -> list[dict]:
    """Messages as templates take them: without fields that say nothing, their content a text, also where a list of
    parts spells it. Raises ExampleError for what is none, or would change the meaning unseen."""
    if not isinstance(messages, list) or not messages:
        raise ExampleError('has no messages; it should have a list of {"role", "content"}')
    return [_plain_message(message, f"message {number}") for number, message in enumerate(messages, start=1)]


def _plain_message(message: object, name: str) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ExampleError(f'{name} is not {{"role", "content"}} with a text in both')
    message = {key: value for key, value in message.items() if value not in (None, [], {})}
    tools = sorted({"tool_calls", "function_call", "tool_call_id", "audio"} & message.keys())
    if tools:
        raise ExampleError(f"{name} has {tools[0]}, which is not learnt here; spell it out in the content, or remove "
                           "the row")
    role, weight, content = message["role"], message.get("weight", 1), message.get("content")
    known = OTHER_ROLES.get(role.lower(), role.lower())
    if known != role and known in ("system", "user", "assistant"):
        raise OtherShape(f"{name} has the role {role!r}, which is called {known} here; convert the file: "
                         f"{conversion(RENAMED)}")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ExampleError(f"{name} has the weight {json.dumps(weight)}; it should be 0 (not learnt) or 1")
    if "weight" in message and weight == 1 and role != "assistant":
        raise ExampleError(f"{name} has the weight 1, but it is the {role}'s: only turns of the assistant are learnt")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list) else [parts]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise ExampleError(f"{name} has a part of the type {json.dumps(kind)}; only text is learnt here")
        if kind is None or not isinstance(part.get("text"), str):
            raise ExampleError(f'{name} is not {{"role", "content"}} with a text in both, or parts {{"type": "text", '
                               '"text"}')
    return message | {"content": "".join(part["text"] for part in parts)}
