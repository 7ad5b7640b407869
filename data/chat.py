"""Chat templates: messages to text by a Jinja2 template in Hugging Face's convention, and that text to tokens.

A run that knows conversations holds its template as RUN/chat_template.jinja. Special tokens that the template
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
MOST_TIMES = 10_000  # in a template, a text repeated

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
    return check_template(template, path)


def check_template(template: str, path: Path | str) -> str:
    """The template, which stands in a file. Raises ChatError naming the file if it is not valid Jinja."""
    try:
        _compiled(template)
    except ChatError as error:
        raise ChatError(f"{str(path)!r}: {error}; mend it there, or name another template") from None
    return template


def save_template(folder: Path, template: str | None) -> None:
    """Write FOLDER/chat_template.jinja, whole or not at all; nothing for None."""
    if template is not None:
        files.write_whole(Path(folder) / TEMPLATE_FILE, template)


def render(template: str, messages: list[dict], /, *, add_generation_prompt: bool, **named: str) -> str:
    """The text of a conversation, [{"role", "content"}, ...], as transformers' apply_chat_template has it;
    add_generation_prompt: up to where the assistant's next turn starts; named: bos_token, eos_token, ... Raises
    ChatError, also with what the template itself objects to."""
    import jinja2
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                          documents=None, **named)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RuntimeError, MemoryError) as error:
        raise ChatError(f"the chat template cannot render these messages: {error}") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    """The template in transformers' environment: its options, functions and filters, and its tag `generation`, which
    marks what the assistant wrote and changes nothing."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        from datetime import datetime
        return datetime.now().strftime(form)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "%"))  # a few characters of which fill the memory, or never end

        def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
            if operator == "*" and any(isinstance(n, int) and n > MOST_TIMES and not isinstance(other, int | float)
                                       for n, other in ((left, right), (right, left))):
                raise jinja2.sandbox.SecurityError(f"a text or list times more than {MOST_TIMES} is refused")
            if operator == "**" or (operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left)):
                raise jinja2.sandbox.SecurityError(f"{operator} of such values is refused")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson  # jinja2's own escapes for HTML
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"the chat template is not valid Jinja at line {error.lineno}: {error.message}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError, ArithmeticError) as error:  # of the Python made of it
        raise ChatError(f"the chat template is not valid Jinja: {type(error).__name__} {error}") from None


# ---- Messages -> tokens ----------------------------------------------------------------------------------------------

def encode_chat(tokenizer: Tokenizer, template: str, messages: list[dict], variables: dict | None = None) -> np.ndarray:
    """Ids of a rendered conversation, uint32 (n,): what a model is given to answer it; variables: others that the
    template reads, their texts as plain as the messages'. Raises ChatError."""
    guard = _Guard(tokenizer, template, messages, variables)
    guard.check_fields(messages)
    return guard.encode(guard.render(messages, add_generation_prompt=True))


def encode_special(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text whose special tokens are read as such, uint32 (n,)."""
    return _Guard(tokenizer, text, []).encode(text)


def learnt_turns(messages: list[dict]) -> list[int]:
    """Which messages are learnt: the assistant's but those of weight 0."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def encode_conversation(tokenizer: Tokenizer, template: str,
                        messages: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What there is to learn from a conversation: ids (n,) uint32 up to the end of an answer, and which of them the
    loss counts, bool (n,): the assistant's turns but those of weight 0, each from where the model begins to write to
    the token that ends it, which is end-of-text where the template writes none.

    The ids before a turn are those of encode_chat(the messages before it). Where they begin alike for all turns, that
    is one example; else (a template that rewrites earlier turns, text that merges over the start of one) it is one for
    each turn. Raises ChatError if the template cannot have it so.
    """
    guard = _Guard(tokenizer, template, messages)
    guard.check_fields(messages)
    turns = [_turn(guard, messages, number) for number in learnt_turns(messages)]
    ids = [np.concatenate(turn) for turn in turns]
    written = [np.arange(len(some)) >= len(asked) for some, (asked, _) in zip(ids, turns, strict=True)]
    if any(not np.array_equal(some, ids[-1][:len(some)]) for some in ids):
        return list(zip(ids, written, strict=True))
    for (asked, _), some in zip(turns, ids, strict=True):
        written[-1][len(asked):len(some)] = True
    return [(ids[-1], written[-1])]


def _turn(guard: "_Guard", messages: list[dict], number: int) -> tuple[np.ndarray, np.ndarray]:
    """What a model is asked with for message `number`, and what it is to answer. Raises ChatError."""
    try:
        asked = guard.render(messages[:number], add_generation_prompt=True)
    except ChatError as error:
        raise error if number else ChatError(f"message 1 is the assistant's, and {error}; begin with the user's, or "
                                             'give message 1 "weight": 0') from None
    told, header, tail = guard.told(messages[:number + 1], asked)
    if not told.startswith(asked):
        common = next((i for i, (a, b) in enumerate(zip(told, asked, strict=False)) if a != b), len(told))
        raise ChatError(f"the chat template asks for message {number + 1} with {asked[common:][:40]!r} but writes "
                        f"{told[common:][:40]!r} there once it is answered: what is learnt would not be what is asked; "
                        "training needs a template whose turns begin with its generation prompt (--chat-template, "
                        "data.chat_template)")
    if header.strip() and asked == guard.render(messages[:number], add_generation_prompt=False):
        raise ChatError(f"the chat template begins the assistant's turns with {header[:40]!r} but has no generation "
                        "prompt, so a model would not be asked with it; write {{ "
                        f"{json.dumps(header, ensure_ascii=False)} if add_generation_prompt }}}} at the end of the "
                        "template (--chat-template, data.chat_template)")
    ending = guard.pattern.search(tail)
    end = len(told) - len(tail) + (ending.end() if ending else 0)
    ids, whole = guard.encode(asked), guard.encode(told[:end])
    if not np.array_equal(ids, whole[:len(ids)]):  # the text merges over the start of the turn
        whole = np.concatenate([ids, guard.encode(told[len(asked):end], behind="text")])
    return ids, whole[len(ids):] if ending else np.append(whole[len(ids):], np.uint32(guard.tokenizer.eot))


def turn_end(tokenizer: Tokenizer, template: str) -> int:
    """The id that ends the assistant's turns: the special token that the template puts there, else end-of-text."""
    ending = _probe(tokenizer, template)[1]
    return tokenizer.eot if ending is None else ending


def answer_lead(tokenizer: Tokenizer, template: str) -> str:
    """What the template writes between its generation prompt and an answer, an empty block of thoughts say: the model
    learns to write it, and it is no part of the answer."""
    return _probe(tokenizer, template)[0]


def _probe(tokenizer: Tokenizer, template: str) -> tuple[str, int | None]:
    """answer_lead, and the id of the special token behind an answer, None if there is none."""
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    guard = _Guard(tokenizer, template, talk)
    try:
        _, header, tail = guard.told(talk, guard.render(talk[:1], add_generation_prompt=True))
    except ChatError:  # a template that wants other messages
        return "", None
    ending = guard.pattern.search(tail)
    return header, None if ending is None else tokenizer.special_ids[ending[ending.lastindex]]


class _Guard:
    """Renders and encodes one conversation so that special tokens in messages stay plain text: each is rendered as
    mark + its number + mark, a character that occurs nowhere else, and spelled out again before it is encoded."""

    def __init__(self, tokenizer: Tokenizer, template: str, messages: list[dict], variables: dict | None = None):
        self.tokenizer, self.template = tokenizer, template
        self.specials = sorted(tokenizer.special_ids, key=len, reverse=True)  # the longest of several that match
        self.spelled = re.compile("|".join(map(re.escape, self.specials)))
        blanks = [tokenizer.strips.get(token, (False, False)) for token in self.specials]
        self.pattern = re.compile("|".join(  # each in a group, with the blanks that it takes
            r"(?:(?<!\s)\s+)?" * left + f"({re.escape(token)})" + r"\s*" * right
            for token, (left, right) in zip(self.specials, blanks, strict=True)))
        used = set(template) | set(json.dumps([messages, variables], ensure_ascii=False))
        unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        self.mark, self.content = next(unused), next(unused)
        self.variables = self._hidden(variables or {})
        self._encoded: dict[tuple[str, str | None], np.ndarray] = {}  # turns share their beginnings

    def render(self, messages: list[dict], *, add_generation_prompt: bool) -> str:
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        return render(self.template, self._hidden(messages), add_generation_prompt=add_generation_prompt,
                      **self.tokenizer.named, **self.variables)

    def check_fields(self, messages: list[dict]) -> None:
        """Raise ChatError if a message has a field that the template does not show."""
        for name in sorted({key for message in messages for key in message} - {"role", "content", "weight"}):
            without = [{key: value for key, value in message.items() if key != name} for message in messages]
            if self.render(messages, add_generation_prompt=False) == self.render(without, add_generation_prompt=False):
                raise ChatError(f"has {name!r} in its messages, which the chat template does not show; remove it "
                                "there, or name a template that shows it (--chat-template, data.chat_template)")

    def told(self, messages: list[dict], asked: str) -> tuple[str, str, str]:
        """The rendering of messages, of which the last is an answer to `asked`; what the template itself writes before
        its content, behind `asked`, and after it."""
        told = self.render(messages, add_generation_prompt=False)
        marked = self.render([*messages[:-1], messages[-1] | {"content": self.content}], add_generation_prompt=False)
        head, _, tail = marked.rpartition(self.content)
        if not told.endswith(tail):  # it depends on the content: from the last special token
            tail = told[max((match.start() for match in self.pattern.finditer(told, len(asked))), default=len(told)):]
        return told, head.removeprefix(asked) if head.startswith(asked) else "", tail

    def _hidden(self, value: object) -> object:
        if isinstance(value, str):
            return self.spelled.sub(lambda m: f"{self.mark}{self.specials.index(m[0])}{self.mark}", value)
        if isinstance(value, dict):
            return {key: self._hidden(item) for key, item in value.items()}
        return [self._hidden(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str, *, behind: str | None = None) -> np.ndarray:
        """Ids of (a part of) a rendering; behind: what stands before it."""
        ids, start = [np.empty(0, dtype=np.uint32)], 0
        for match in self.pattern.finditer(text):
            special = self.tokenizer.special_ids[match[match.lastindex]]
            ids += [self._plain(text[start:match.start()], behind), np.array([special], np.uint32)]
            start, behind = match.end(), "special"
        return np.concatenate([*ids, self._plain(text[start:], behind)])

    def _plain(self, text: str, behind: str | None) -> np.ndarray:
        if (text, behind) not in self._encoded:
            spelled = re.sub(f"{self.mark}(\\d+){self.mark}", lambda m: self.specials[int(m[1])], text)
            self._encoded[text, behind] = self.tokenizer.encode(spelled, behind=behind)
        return self._encoded[text, behind]
