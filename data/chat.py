"""Prompts and chats to tokens, as many as there is room for: alike in training, evaluation and sampling.

A chat template is Jinja2 in Hugging Face's convention: messages -> text. A run that was trained on conversations holds
its template as RUN/chat_template.jinja. Special tokens that the template itself spells become their ids; what a message
holds is plain text, whatever it spells. Templates run in jinja2's sandbox: they can change nothing and open nothing.
Rows of files and rows of tokens are examples.py's.
"""

import functools
import json
import re
import sys
from bisect import bisect_left
from pathlib import Path

import numpy as np

import files
from config import UserError
from data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"

# For tokenizers that have no special token but end-of-text: a turn is a name, a newline and the content; the model ends
# its own turns with end-of-text. Content is stripped, so that "\n" + content splits into words at the newline.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ 'Assistant:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{ 'User:\\n' + message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'system' %}
{{ 'System:\\n' + message['content'] | trim + '\\n\\n' }}
{%- else %}
{{ raise_exception('role ' + message['role'] + ' is none of system, user, assistant') }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:\\n' }}
{%- endif %}
"""


class ChatError(UserError):
    """Messages or a template that cannot be rendered."""


def load_template(folder: Path) -> str | None:
    """The chat template of a run, of shards or of a Hugging Face folder; None if there is none. Raises ChatError."""
    path = Path(folder) / TEMPLATE_FILE
    return read_template(path) if path.exists() else None


def read_template(path: Path) -> str:
    """The template in a file, checked for syntax. Raises ChatError."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"chat template {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}; name a "
                        "Jinja file") from None
    _compiled(template)
    return template


def save_template(folder: Path, template: str) -> None:
    """Write FOLDER/chat_template.jinja, whole or not at all."""
    files.write_whole(Path(folder) / TEMPLATE_FILE, template)


def render(template: str, messages: list[dict], *, add_generation_prompt: bool, bos_token: str = "",
           eos_token: str = "") -> str:
    """The text of a conversation, [{"role", "content"}, ...]; add_generation_prompt: up to where the assistant's next
    turn starts. Raises ChatError, also with what the template itself objects to."""
    import jinja2
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt,
                                          bos_token=bos_token, eos_token=eos_token)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ChatError(f"the chat template cannot render these messages: {error}") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    import jinja2
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        from datetime import datetime
        return datetime.now().strftime(form)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja2's own escapes for HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"the chat template is not valid Jinja at line {error.lineno}: {error.message}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Plain prompts

def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a plain prompt, uint32 (n,): behind bos_token if the tokenizer has one; of an empty one end-of-text."""
    ids = tokenizer.encode(text)
    return ids if len(ids) and tokenizer.bos_token is None else np.insert(ids, 0, tokenizer.start)


def fit_prompt(tokenizer: Tokenizer, ids: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """The ids of a plain prompt that stay where there is room for fewer, and how many were cut."""
    stay = kept_tokens(tokenizer, ids, room)
    return ids[stay], len(ids) - len(stay)


def kept_tokens(tokenizer: Tokenizer, ids: np.ndarray, room: int, *, response: int = 0) -> np.ndarray:
    """Which tokens of a prompt and its response, the last `response` of the ids, stay: min(n, room) indices, in order.

    The front of the prompt goes, but for bos_token; the response stays. A response that does not fit by itself loses
    its end, and its prompt only what is more than half the room. room: at least 1, with a response 2.
    """
    prompt = len(ids) - response
    excess = max(0, prompt - _prompt_room(room, response))
    bos = int(tokenizer.bos_token is not None and prompt > excess and ids[0] == tokenizer.start)
    return np.delete(np.arange(len(ids)), slice(bos, bos + excess))[:room]


def _prompt_room(room: int, response: int) -> int:
    return room - response if response < room else room // 2


# ----------------------------------------------------------------------------------------------------------------------
# Messages -> tokens

def encode_chat(tokenizer: Tokenizer, template: str, messages: list[dict]) -> np.ndarray:
    """Ids of a rendered conversation, uint32 (n,): what a model is given to answer it. Raises ChatError."""
    return fit_chat(tokenizer, template, messages)[0]


def fit_chat(tokenizer: Tokenizer, template: str, messages: list[dict],
             room: int = sys.maxsize) -> tuple[np.ndarray, int]:
    """What encode_chat gives of as many messages as there is room for, n <= room, and how many tokens were cut."""
    ids, _, cut = _Chat(tokenizer, template, messages).fit(messages, room, learnt=False)
    return ids, cut


def encode_conversation(tokenizer: Tokenizer, template: str, messages: list[dict],
                        room: int = sys.maxsize) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids (n,) uint32 of a conversation to learn from, n <= room; which of them the assistant wrote, bool (n,): the
    contents of its turns and the tokens that end them; and how many tokens were cut.

    A turn begins where the rendering of the messages before it ends, which is where the model will begin it. Raises
    ChatError if the template renders earlier turns otherwise once later ones follow.
    """
    return _Chat(tokenizer, template, messages).fit(messages, room, learnt=True)


def turn_end(tokenizer: Tokenizer, template: str) -> int:
    """The id that ends the assistant's turns: the special token that the template puts there, else end-of-text."""
    chat = _Chat(tokenizer, template, [])
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": chat.mark}]
    try:
        ending = chat.specials.search(chat.render(talk, asks=False).partition(chat.mark)[2])
    except ChatError:  # a template that wants other messages
        ending = None
    return tokenizer.special_ids[ending[0]] if ending else tokenizer.eot


class _Chat:
    """Renders and encodes a conversation so that special tokens in messages stay plain text: each is rendered as
    mark + its number + mark, a character that occurs nowhere else, and spelled out again before it is encoded."""

    def __init__(self, tokenizer: Tokenizer, template: str, messages: list[dict]):
        self.tokenizer, self.template = tokenizer, template
        self.spelled = sorted(tokenizer.special_ids, key=len, reverse=True)  # the longest of several that match
        self.specials = re.compile("|".join(map(re.escape, self.spelled)))
        used = set(template) | set(json.dumps(messages, ensure_ascii=False))
        self.mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)

    def fit(self, messages: list[dict], room: int, *, learnt: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids and which of them the assistant wrote, of as many messages as there is room for; how many tokens are cut.

        Messages before the first turn, the system's, stay; to learn from, those behind the last answer go. Whole oldest
        turns go, so that a user's comes first again; then the front of what the user says in the last exchange; what
        is still too long is cut as by kept_tokens.
        """
        ids, written = self.encode(messages, learnt)
        tokens = len(ids)
        if tokens <= room:
            return ids, written, 0
        roles = [message["role"] for message in messages]
        first = next((i for i, role in enumerate(roles) if role in ("user", "assistant")), len(roles))
        last = len(roles) - roles[::-1].index("assistant") if learnt else len(roles)
        starts, messages = [i for i in range(first, last) if roles[i] == "user"], messages[:last]

        def shorter(step: int) -> list[dict]:
            start, cut = (starts[step], 0) if step < len(starts) else (starts[-1], step - len(starts) + 1)
            user = messages[start] | {"content": messages[start]["content"][cut:]}
            return [*messages[:first], user, *messages[start + 1:]]

        if starts:
            response = _response(self.encode(shorter(len(starts) - 1), learnt)[1])
            limit = response + _prompt_room(room, response)
            steps = range(len(starts) + len(messages[starts[-1]]["content"]))
            step = bisect_left(steps, True, hi=len(steps) - 1, key=lambda step: len(
                self.encode(shorter(step), learnt)[0]) <= limit)
            ids, written = self.encode(shorter(step), learnt)
        stay = kept_tokens(self.tokenizer, ids, room, response=_response(written))
        return ids[stay], written[stay], tokens - len(stay)

    def encode(self, messages: list[dict], learnt: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of messages to learn from, or else to be answered, and which of them the assistant wrote."""
        parts = self.parts(messages) if learnt else [(self.render(messages, asks=True), False)]
        ids = [self._ids(text) for text, _ in parts]
        written = [np.full(len(some), is_written) for some, (_, is_written) in zip(ids, parts, strict=True)]
        return np.concatenate(ids), np.concatenate(written)

    def parts(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The rendering of messages to learn from in parts, and whether the assistant wrote each."""
        whole, parts, done = self.render(messages, asks=False), [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], asks=True)
            after = self.render(messages[:number + 1], asks=False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise ChatError(f"the chat template renders the first {number + 1} messages otherwise when others "
                                "follow, or its generation prompt otherwise than a turn; training needs one that does "
                                "not (--chat-template, data.chat_template)")
            start, end = (len(before) + place for place in self.written(after[len(before):], message["content"]))
            parts += [(whole[done:start], False), (whole[start:end], True)]
            done = end
        return [*parts, (whole[done:], False)]

    def written(self, turn: str, content: str) -> tuple[int, int]:
        """Where in a rendered turn the assistant's own text starts and ends: no header before it, nothing after the
        special token that ends it (all of the turn if none does)."""
        content = self._hidden(content).strip()
        place = turn.find(content)
        if place < 0:  # the template changed it
            return 0, len(turn)
        ending = self.specials.search(turn, place + len(content))
        # blanks before the content belong to its first word
        return (place if turn[:place].strip() else 0), (ending.end() if ending else len(turn))

    def render(self, messages: list[dict], *, asks: bool) -> str:
        """The text; asks: up to where the assistant's next turn starts."""
        return render(self.template, self._hidden(messages), add_generation_prompt=asks,
                      bos_token=self.tokenizer.bos_token or "", eos_token=self.tokenizer.eot_token)

    def _hidden(self, value: object) -> object:
        if isinstance(value, str):
            return self.specials.sub(lambda m: f"{self.mark}{self.spelled.index(m[0])}{self.mark}", value)
        if isinstance(value, dict):
            return {key: self._hidden(item) for key, item in value.items()}
        return [self._hidden(item) for item in value] if isinstance(value, list) else value

    def _ids(self, text: str) -> np.ndarray:
        """Ids of a part of a rendering."""
        ids, start = [np.empty(0, dtype=np.uint32)], 0
        for match in self.specials.finditer(text):
            ids += [self._plain(text[start:match.start()]), np.array([self.tokenizer.special_ids[match[0]]], np.uint32)]
            start = match.end()
        return np.concatenate([*ids, self._plain(text[start:])])

    def _plain(self, text: str) -> np.ndarray:
        spelled = re.sub(rf"{self.mark}(\d+){self.mark}", lambda m: self.spelled[int(m[1])], text)
        return self.tokenizer.encode(spelled)


def _response(written: np.ndarray) -> int:
    """How many tokens there are from the first that the assistant wrote."""
    return len(written) - int(written.argmax()) if written.any() else 0
