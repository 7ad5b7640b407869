"""Chat templates: messages to text by a Jinja2 template in Hugging Face's convention, and that text to tokens.

A run that was trained on conversations holds its template as RUN/chat_template.jinja. Special tokens that the template
itself spells become their ids; what a message holds is plain text, whatever it spells. Templates run in jinja2's
sandbox: they can change nothing and open nothing. What is too long is cut by prompts.py.
"""

import functools
import json
import re
import sys
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


def read_template(path: Path | str) -> str:
    """The template in a file, or "-" for stdin, where no byte is changed; checked for syntax. Raises ChatError."""
    try:
        template = sys.stdin.buffer.read().decode() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"chat template {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}; name a "
                        "Jinja file") from None
    _compiled(template)
    return template


def save_template(folder: Path, template: str | None) -> None:
    """Write FOLDER/chat_template.jinja, whole or not at all; nothing for None."""
    if template is not None:
        files.write_whole(Path(folder) / TEMPLATE_FILE, template)


def render(template: str, messages: list[dict], *, add_generation_prompt: bool, bos_token: str = "",
           eos_token: str = "", variables: dict | None = None) -> str:
    """The text of a conversation, [{"role", "content"}, ...]; add_generation_prompt: up to where the assistant's next
    turn starts; variables: others that the template reads. Raises ChatError, also with what the template itself objects
    to."""
    import jinja2
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt,
                                          bos_token=bos_token, eos_token=eos_token, **(variables or {}))
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


# ---- Messages -> tokens ----------------------------------------------------------------------------------------------

def encode_chat(tokenizer: Tokenizer, template: str, messages: list[dict], variables: dict | None = None) -> np.ndarray:
    """Ids of a rendered conversation, uint32 (n,): what a model is given to answer it; variables: others that the
    template reads, their texts as plain as the messages'. Raises ChatError."""
    guard = _Guard(tokenizer, template, messages, variables)
    return guard.encode(guard.render(messages, add_generation_prompt=True))


def encode_special(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text whose special tokens are read as such, uint32 (n,)."""
    return _Guard(tokenizer, text, []).encode(text)


def turn_end(tokenizer: Tokenizer, template: str) -> int:
    """The id that ends the assistant's turns: the special token that the template puts there, else end-of-text."""
    guard = _Guard(tokenizer, template, [])
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": guard.mark}]
    try:
        after = guard.render(talk, add_generation_prompt=False).partition(guard.mark)[2]
    except ChatError:  # a template that wants other messages
        return tokenizer.eot
    ending = guard.pattern.search(after)
    return tokenizer.special_ids[ending[0]] if ending else tokenizer.eot


def encode_conversation(tokenizer: Tokenizer, template: str, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n,) uint32 of a conversation to learn from, and which of them the assistant wrote, bool (n,): the contents
    of its turns and the tokens that end them.

    A turn begins where the rendering of the messages before it ends, which is where the model will begin it. Raises
    ChatError if the template renders earlier turns otherwise once later ones follow.
    """
    guard = _Guard(tokenizer, template, messages)
    whole = guard.render(messages, add_generation_prompt=False)
    parts, done = [], 0  # (text, the assistant wrote it)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = guard.render(messages[:number], add_generation_prompt=True)
        after = guard.render(messages[:number + 1], add_generation_prompt=False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ChatError(f"the chat template renders the first {number + 1} messages otherwise when others follow, "
                            "or its generation prompt otherwise than a turn; training needs one that does not "
                            "(--chat-template, data.chat_template)")
        start, end = (len(before) + place for place in guard.written(after[len(before):], message["content"]))
        parts += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    parts.append((whole[done:], False))
    ids = [guard.encode(text) for text, _ in parts]
    written = [np.full(len(some), is_written) for some, (_, is_written) in zip(ids, parts, strict=True)]
    return np.concatenate(ids), np.concatenate(written)


class _Guard:
    """Renders and encodes one conversation so that special tokens in messages stay plain text: each is rendered as
    mark + its number + mark, a character that occurs nowhere else, and spelled out again before it is encoded."""

    def __init__(self, tokenizer: Tokenizer, template: str, messages: list[dict], variables: dict | None = None):
        self.tokenizer, self.template = tokenizer, template
        self.specials = sorted(tokenizer.special_ids, key=len, reverse=True)  # the longest of several that match
        self.pattern = re.compile("|".join(map(re.escape, self.specials)))
        used = set(template) | set(json.dumps([messages, variables], ensure_ascii=False))
        self.mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        self.variables = self._hidden(variables)

    def render(self, messages: list[dict], *, add_generation_prompt: bool) -> str:
        return render(self.template, self._hidden(messages), add_generation_prompt=add_generation_prompt,
                      bos_token=self.tokenizer.bos_token or "", eos_token=self.tokenizer.eot_token,
                      variables=self.variables)

    def _hidden(self, value: object) -> object:
        if isinstance(value, str):
            return self.pattern.sub(lambda m: f"{self.mark}{self.specials.index(m[0])}{self.mark}", value)
        if isinstance(value, dict):
            return {key: self._hidden(item) for key, item in value.items()}
        return [self._hidden(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str) -> np.ndarray:
        """Ids of (a part of) a rendering."""
        ids, start = [np.empty(0, dtype=np.uint32)], 0
        for match in self.pattern.finditer(text):
            ids += [self._plain(text[start:match.start()]), np.array([self.tokenizer.special_ids[match[0]]], np.uint32)]
            start = match.end()
        return np.concatenate([*ids, self._plain(text[start:])])

    def _plain(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(re.sub(f"{self.mark}(\\d+){self.mark}", lambda m: self.specials[int(m[1])], text))

    def written(self, turn: str, content: str) -> tuple[int, int]:
        """Where in a rendered turn the assistant's own text starts and ends: no header before it, nothing after the
        special token that ends it (all of the turn if none does)."""
        content = self._hidden(content).strip()
        place = turn.find(content)
        if place < 0:  # the template changed it
            return 0, len(turn)
        ending = self.pattern.search(turn, place + len(content))
        # blanks before the content belong to its first word
        return (place if turn[:place].strip() else 0), (ending.end() if ending else len(turn))
