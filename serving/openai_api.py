"""OpenAI's request and answer formats: JSON fields to rows of a batch, and their parts back to JSON.

/v1/completions and /v1/chat/completions as platform.openai.com/docs/api-reference describes them, whole and streamed. A
field is honoured or refused by its name, never ignored. Nothing here knows HTTP but the status that an error has.

Beyond OpenAI's fields: top_k and min_p, as in sample.py. logprobs are the model's own, before temperature, filters,
penalties and biases; text_offset counts the characters of the answer's text (a token inside a character, or that breaks
one off, begins where that character does).
"""

import math
import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from config import ModelConfig
from data import chat
from data.tokenizer import Tokenizer, replace_surrogates
from sample import Detokenizer, SampleError, Sampling
from serving.batching import Part, Row, Scored

MAX_STOPS, MAX_STOP_CHARS = 4, 1000
MAX_N = 128  # as OpenAI's
MAX_TOP_LOGPROBS, MAX_CHAT_TOP_LOGPROBS = 5, 20
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat answer may fill the context
LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot spell

# Fields of OpenAI's that ask for nothing here when they have one of these values; any other value is refused.
COMPLETION_NEUTRAL = {"suffix": ("",), "best_of": (1,)}
CHAT_NEUTRAL = {"tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
                "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
                "audio": (), "prediction": (), "store": (False,), "service_tier": ("auto", "default"),
                "reasoning_effort": ("none",), "verbosity": (), "web_search_options": ()}
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # of the caller's; they change no answer


class ApiError(Exception):
    """A request that is refused: OpenAI's error object, with its HTTP status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 retry_after_s: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def as_json(self) -> dict:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Served:
    """What the server offers."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: str | None = None  # of chats
    max_rows: int = 256  # texts of one request
    time_limit_s: float = 600.0
    created: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "flatgpt",
                "max_model_len": self.config.max_seq_len, "chat": self.template is not None}


@dataclass(frozen=True)
class Prompt:
    text: str
    tokens: list[int]
    has_start: bool = False  # the first token is the tokenizer's start, which is no part of the text


@dataclass(frozen=True)
class Asked:
    """One request, understood."""

    id: str
    model: str
    is_chat: bool
    prompts: list[Prompt]
    rows: list[Row]  # n of each prompt, in order
    echo: bool
    stream: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def prompt_of(self, number: int) -> Prompt:
        return self.prompts[number * len(self.prompts) // len(self.rows)]


Deliver = Callable[[int, Part], None]  # number of the row in its request, part


# ----------------------------------------------------------------------------------------------------------------------
# Fields

class _Fields:
    """Takes fields out of a request's JSON object one by one; null is as good as left out. Raises ApiError."""

    def __init__(self, body: dict):
        self._body = {key: value for key, value in body.items() if value is not None}

    def take(self, name: str, default: object = None) -> object:
        return self._body.pop(name, default)

    def number(self, name: str, default: float, *, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong(name, value, "a finite number")
        if not low <= value <= high:
            raise wrong(name, value, f"from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, default: int | None, *, low: int, high: int | None = None) -> int | None:
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, value, "a whole number")
        if value < low or (high is not None and value > high):
            raise wrong(name, value, f"at least {low}" if high is None else f"from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def refuse_rest(self, neutral: dict[str, tuple]) -> None:
        """What was not taken must ask for nothing."""
        for name, value in self._body.items():
            if name in LABELS or any(value == allowed for allowed in neutral.get(name, ())):
                continue
            known = name in neutral
            raise ApiError(400, f"{name} = {_short(value)} is not supported by this server; leave it out" if known else
                           f"{_short(name)} is not a field of this request", param=name[:100],
                           code="unsupported_value" if known else "unknown_parameter")


def wrong(name: str, value: object, should: str) -> ApiError:
    return ApiError(400, f"{name} = {_short(value)} should be {should}", param=name, code="invalid_value")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------------------------------------------------------
# Requests

def parse_completion(body: dict, served: Served, deliver: Deliver) -> Asked:
    """Raises ApiError."""
    fields = _Fields(body)
    _check_model(fields, served)
    prompts = _prompts(fields.take("prompt", ""), served)
    echo = fields.flag("echo")
    top_logprobs = fields.whole("logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
    max_tokens = _max_tokens(fields, DEFAULT_MAX_TOKENS, low=0)
    settings = {"top_logprobs": top_logprobs, "scores_prompt": echo and top_logprobs is not None,
                "stop_tokens": frozenset({served.tokenizer.eot})}
    return _asked(fields, served, prompts, settings, deliver, max_tokens=max_tokens, echo=echo, is_chat=False)


def parse_chat(body: dict, served: Served, deliver: Deliver) -> Asked:
    """Raises ApiError."""
    if served.template is None:
        raise ApiError(400, f"{served.name!r} was not trained on chats: its run has no {chat.TEMPLATE_FILE}; use "
                       "/v1/completions", code="no_chat_template")
    fields = _Fields(body)
    _check_model(fields, served)
    messages = _messages(fields.take("messages"))
    try:
        tokens = _known(chat.encode_chat(served.tokenizer, served.template, messages).tolist(), served)
    except chat.ChatError as error:
        raise ApiError(400, str(error), param="messages") from None
    prompts = [Prompt("", _fitting(tokens, served, "messages") or [served.tokenizer.eot])]
    wants_logprobs = fields.flag("logprobs")
    top_logprobs = fields.whole("top_logprobs", None, low=0, high=MAX_CHAT_TOP_LOGPROBS)
    if top_logprobs is not None and not wants_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs", code="invalid_value")
    max_tokens = _max_tokens(fields, served.config.max_seq_len, low=1)
    settings = {"top_logprobs": top_logprobs or 0 if wants_logprobs else None,
                "stop_tokens": chat_stop_tokens(served.tokenizer, served.template)}
    return _asked(fields, served, prompts, settings, deliver, max_tokens=max_tokens, echo=False, is_chat=True)


def _asked(fields: _Fields, served: Served, prompts: list[Prompt], settings: dict, deliver: Deliver, *,
           max_tokens: int, echo: bool, is_chat: bool) -> Asked:
    """What completions and chats have in common."""
    n = fields.whole("n", 1, low=1, high=MAX_N)
    if len(prompts) * n > served.max_rows:
        raise _too_many(f"{len(prompts)} prompts x n = {n}", served, "n" if n > 1 else "prompt")
    settings |= {"sampling": _sampling(fields), "stop": _stops(fields.take("stop", [])),
                 "logit_bias": _logit_bias(fields.take("logit_bias", {}), served.config.vocab_size),
                 "deadline": time.monotonic() + served.time_limit_s}
    for name in ("presence_penalty", "frequency_penalty"):
        settings[name] = fields.number(name, 0.0, low=-2.0, high=2.0)
    stream, include_usage = fields.flag("stream"), _include_usage(fields.take("stream_options"))
    if include_usage is not None and not stream:
        raise ApiError(400, "stream_options needs stream = true", param="stream_options", code="invalid_value")
    fields.refuse_rest(CHAT_NEUTRAL if is_chat else COMPLETION_NEUTRAL | {"best_of": (n,)})
    rows = [Row(prompt.tokens, min(max_tokens, served.config.max_seq_len - len(prompt.tokens) + 1),
                partial(deliver, number), number=number, **settings)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(n))]
    kind = "chatcmpl" if is_chat else "cmpl"
    return Asked(f"{kind}-{uuid.uuid4().hex}", served.name, is_chat, prompts, rows, echo, stream, bool(include_usage))


def _check_model(fields: _Fields, served: Served) -> None:
    name = fields.take("model", served.name)
    if name != served.name:
        raise no_such_model(name, served)


def no_such_model(name: object, served: Served) -> ApiError:
    return ApiError(404, f"model {_short(name)} is not served here; this server has {served.name!r}", param="model",
                    code="model_not_found")


def _prompts(value: object, served: Served) -> list[Prompt]:
    """A text, texts, token ids, or lists of token ids."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0]))
    values = [value] if is_one else value
    if not isinstance(values, list) or not values:
        raise wrong("prompt", value, "a text, a list of texts, a list of token ids, or a list of such lists")
    if len(values) > served.max_rows:
        raise _too_many(f"{len(values)} prompts", served, "prompt")
    return [_prompt(one, served) for one in values]


def _too_many(what: str, served: Served, param: str) -> ApiError:
    return ApiError(400, f"{what} are more than the {served.max_rows} texts of one request; send them in several",
                    param=param, code="too_many_texts")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(value: object, served: Served) -> Prompt:
    if isinstance(value, str):
        text = replace_surrogates(value)
        tokens = encode_bounded(text, served, "prompt")
        has_start = served.tokenizer.bos_token is not None or not tokens  # as sample.encode_prompt
        start = [served.tokenizer.start] if has_start else []
        return Prompt(text, _fitting(start + tokens, served, "prompt"), has_start)
    if not isinstance(value, list) or not all(map(_is_token, value)):
        raise wrong("prompt", value, "a text, a list of texts, a list of token ids, or a list of such lists")
    if not value:  # lm-evaluation-harness sends an empty context so
        return _prompt("", served)
    tokens = _known(_fitting(value, served, "prompt"), served)
    return Prompt(detokenized(served.tokenizer, tokens)[0], tokens)


def encode_bounded(text: str, served: Served, param: str) -> list[int]:
    """The text's ids, special tokens as plain text; a text that is far too long is refused before it is encoded."""
    most = served.config.max_seq_len * int(served.tokenizer.token_bytes().max())  # bytes that could fit
    if served.tokenizer.byte_level and len(text) > most:
        raise _too_long(f"at least {-(-len(text) * served.config.max_seq_len // most)}", served, param)
    return _known(_fitting(served.tokenizer.encode(text).tolist(), served, param), served)


def _known(tokens: list[int], served: Served) -> list[int]:
    unknown = [token for token in tokens if not 0 <= token < served.config.vocab_size]
    if unknown:
        raise ApiError(400, f"the prompt has token {unknown[0]}, but the model knows 0 to "
                       f"{served.config.vocab_size - 1}", param="prompt", code="invalid_value")
    return tokens


def _fitting(tokens: list[int], served: Served, param: str) -> list[int]:
    if len(tokens) > served.config.max_seq_len:
        raise _too_long(str(len(tokens)), served, param)
    return tokens


def _too_long(tokens: str, served: Served, param: str) -> ApiError:
    return ApiError(400, f"the prompt has {tokens} tokens, more than the model's context of "
                    f"{served.config.max_seq_len}; shorten it", param=param, code="context_length_exceeded")


def _max_tokens(fields: _Fields, default: int, *, low: int) -> int:
    """max_tokens, or its newer name; the context bounds it too."""
    old = fields.whole("max_tokens", None, low=low)
    new = fields.whole("max_completion_tokens", old, low=low)
    if old is not None and new != old:
        raise ApiError(400, f"max_tokens = {old} and max_completion_tokens = {new} contradict each other; give one",
                       param="max_tokens", code="invalid_value")
    return default if new is None else new


def _sampling(fields: _Fields) -> Sampling:
    try:
        return Sampling(
            temperature=fields.number("temperature", 1.0), top_p=fields.number("top_p", 1.0),
            top_k=fields.whole("top_k", None, low=1), min_p=fields.number("min_p", 0.0),
            seed=fields.whole("seed", secrets.randbits(63), low=-2 ** 63, high=2 ** 63 - 1))
    except SampleError as error:
        raise ApiError(400, str(error), param=str(error).split()[0], code="invalid_value") from None


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops) or len(stops) > MAX_STOPS:
        raise wrong("stop", value, f"a text or a list of at most {MAX_STOPS} texts")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise wrong("stop", value, f"of texts of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _logit_bias(value: object, vocab_size: int) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong("logit_bias", value, "an object: token id -> bias")
    biases = {}
    for token, bias in value.items():
        if not (token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
            raise wrong("logit_bias", token, f"keyed by token ids below {vocab_size}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("logit_bias", bias, "of numbers from -100 to 100")
        biases[int(token)] = float(bias)
    return biases


def _include_usage(value: object) -> bool | None:
    """None = no stream_options."""
    if value is None:
        return None
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", value, 'an object such as {"include_usage": true}')
    options = _Fields(value)
    if options.flag("include_obfuscation"):
        raise ApiError(400, "stream_options.include_obfuscation is not supported by this server; leave it out",
                       param="stream_options", code="unsupported_value")
    return options.flag("include_usage")


def _messages(value: object) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "a list of messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def _message(value: object, name: str) -> dict:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise wrong(name, value, 'an object {"role": ..., "content": ...}')
    extra = {key for key, item in value.items() if item is not None} - {"role", "content", "name"}
    if extra:
        raise ApiError(400, f"{name}.{min(extra)} is not supported by this server; leave it out", param="messages",
                       code="unsupported_value")
    content = value.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise wrong(f"{name}.content", content, "a text")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{name}.content", part, 'text, or parts {"type": "text", "text": ...}')
    message = {key: value[key] for key in ("role", "name") if isinstance(value.get(key), str)}
    return message | {"content": replace_surrogates("".join(part["text"] for part in parts))}


def chat_stop_tokens(tokenizer: Tokenizer, template: str) -> frozenset[int]:
    """End-of-text, and the special token that the template puts behind what the assistant says."""
    said = "\ue000said\ue000"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    try:
        text = chat.render(template, messages, add_generation_prompt=False, bos_token=tokenizer.bos_token or "",
                           eos_token=tokenizer.eot_token)
    except chat.ChatError:  # a template that wants other messages
        return frozenset({tokenizer.eot})
    after = text.partition(said)[2]
    places = {token: place for token in tokenizer.special_ids if (place := after.find(token)) >= 0}
    return frozenset({tokenizer.eot, *(tokenizer.special_ids[token] for token in places
                                       if places[token] == min(places.values()))})


def detokenized(tokenizer: Tokenizer, tokens: list[int]) -> tuple[str, list[int]]:
    """The text of tokens, special ones left out, and the characters of it before each."""
    detokenizer = Detokenizer(tokenizer, [])
    text, offsets = "", []
    for token in tokens:
        offsets.append(len(text))
        text += detokenizer.add(token)
    return text + detokenizer.end(), offsets


# ----------------------------------------------------------------------------------------------------------------------
# Answers

def merged(parts: list[Part]) -> Part:
    """A row's parts as one."""
    return Part("".join(part.text for part in parts), tuple(one for part in parts for one in part.tokens),
                parts[-1].made, parts[-1].finish, parts[-1].error, parts[0].prompt)


def answer(asked: Asked, parts: list[Part], tokenizer: Tokenizer) -> dict:
    """The answer that is not streamed; parts: each row's, merged."""
    choices = []
    for number, part in enumerate(parts):
        choice = _choice(asked, number, part, tokenizer, is_first=True)
        if asked.is_chat:
            choice = {"index": number, "message": {"role": "assistant", "content": part.text, "refusal": None},
                      "logprobs": choice["logprobs"], "finish_reason": part.finish}
        choices.append(choice)
    kind = "chat.completion" if asked.is_chat else "text_completion"
    return _object(asked, kind, choices) | {"usage": usage(asked, [part.made for part in parts])}


def chunk(asked: Asked, number: int, part: Part, tokenizer: Tokenizer, *, is_first: bool) -> dict | None:
    """A streamed piece of a row; None if there is nothing to tell yet."""
    if not (part.text or part.tokens or part.finish or part.prompt or (is_first and (asked.is_chat or asked.echo))):
        return None
    choice = _choice(asked, number, part, tokenizer, is_first=is_first)
    return _object(asked, _chunk_kind(asked), [choice]) | ({"usage": None} if asked.include_usage else {})


def usage_chunk(asked: Asked, made: list[int]) -> dict:
    return _object(asked, _chunk_kind(asked), []) | {"usage": usage(asked, made)}


def _chunk_kind(asked: Asked) -> str:
    return "chat.completion.chunk" if asked.is_chat else "text_completion"


def _object(asked: Asked, kind: str, choices: list[dict]) -> dict:
    return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model, "choices": choices}


def usage(asked: Asked, made: list[int]) -> dict:
    prompt_tokens = sum(len(prompt.tokens) for prompt in asked.prompts)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": sum(made), "total_tokens": prompt_tokens + sum(made)}


def _choice(asked: Asked, number: int, part: Part, tokenizer: Tokenizer, *, is_first: bool) -> dict:
    """One element of choices, of a completion or of a chat's chunk."""
    row, prompt = asked.rows[number], asked.prompt_of(number)
    has_logprobs, logprobs = row.top_logprobs is not None, None
    if asked.is_chat:
        delta = ({"role": "assistant"} if is_first else {}) | ({"content": part.text} if part.text or is_first else {})
        if has_logprobs:
            shown = [one for one in part.tokens if one.token not in row.stop_tokens]
            logprobs = {"content": [_chat_logprob(one, tokenizer) for one in shown], "refusal": None}
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": part.finish}
    if has_logprobs:
        start = len(prompt.text) if asked.echo else 0
        tokens = [(one, start + one.offset) for one in part.tokens]
        if part.prompt:
            own = slice(1 if prompt.has_start else 0, None)
            tokens = [*zip(part.prompt[own], detokenized(tokenizer, prompt.tokens[own])[1], strict=True), *tokens]
        logprobs = _completion_logprobs(tokens, tokenizer)
    text = prompt.text + part.text if asked.echo and is_first else part.text
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": part.finish}


def _completion_logprobs(tokens: Iterable[tuple[Scored, int]], tokenizer: Tokenizer) -> dict:
    """The four parallel lists of the completions API."""
    logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one, offset in tokens:
        logprobs["tokens"].append(spelled(tokenizer, one.token))
        logprobs["text_offset"].append(offset)
        if one.logprob is None:  # nothing precedes it
            logprobs["token_logprobs"].append(None)
            logprobs["top_logprobs"].append(None)
            continue
        logprobs["token_logprobs"].append(_finite(one.logprob))
        # The token itself is told too. Of tokens that are spelled alike the likelier one comes last, and stays.
        pairs = sorted({(one.token, one.logprob), *one.top}, key=lambda pair: pair[1])
        by_text = {spelled(tokenizer, token): _finite(logprob) for token, logprob in pairs}
        logprobs["top_logprobs"].append(dict(reversed(by_text.items())))
    return logprobs


def _chat_logprob(one: Scored, tokenizer: Tokenizer) -> dict:
    def entry(token: int, logprob: float) -> dict:
        data = list(tokenizer.spelling(token))
        return {"token": spelled(tokenizer, token), "logprob": _finite(logprob), "bytes": data}

    return entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """One token as text; what is no UTF-8 as OpenAI spells it (`bytes:\\xe2\\x80`), so that no two look alike."""
    data = tokenizer.spelling(token)
    if not data:
        return f"token:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
