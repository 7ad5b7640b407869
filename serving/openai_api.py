"""OpenAI's request and answer formats: JSON fields to rows of a batch, and their parts back to JSON.

/v1/completions and /v1/chat/completions as platform.openai.com/docs/api-reference describes them, whole and streamed. A
field is honoured or refused by its name, never ignored. Nothing here knows HTTP but the status that an error has.

Beyond OpenAI's fields, as vLLM names them: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos,
add_special_tokens, chat_template_kwargs; as llama.cpp does: parse_special. logprobs are the model's own, before
temperature, filters, penalties and biases; text_offset counts the characters of the answer's text (a token inside a
character, or that breaks one off, begins where that character does).
"""

import math
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial, partialmethod

from config import ModelConfig
from data import chat
from data.prompts import answer_room, encode_prompt, fit_chat
from data.tokenizer import Tokenizer, replace_surrogates
from sample import SampleError, Sampling, TextStream
from serving.batching import Part, Row, Scored

MAX_STOPS, MAX_STOP_CHARS = 64, 1000
MAX_N = 128  # as OpenAI's
MAX_TOP_LOGPROBS, MAX_CHAT_TOP_LOGPROBS = 5, 20
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat answer may fill the context
LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot spell

# Fields of OpenAI's and vLLM's that ask for nothing here when they have one of these values; others are refused.
NEUTRAL = {"skip_special_tokens": (True,), "spaces_between_special_tokens": (True, False), "min_tokens": (0,),
           "include_stop_str_in_output": (False,), "use_beam_search": (False,), "length_penalty": (1,)}
COMPLETION_NEUTRAL = NEUTRAL | {"suffix": ("",)}
CHAT_NEUTRAL = NEUTRAL | {
    "add_special_tokens": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "store": (False,), "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": ()}
PROMPTS = "a text, a list of texts, a list of token ids, or a list of such lists"
TEMPLATE_NAMES = ("messages", "add_generation_prompt", "tools", "documents")  # and the special tokens'
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # of the caller's; they change no answer


class ApiError(Exception):
    """A request that is refused: OpenAI's error object, with its HTTP status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

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
    too_long: str = "cut"  # what becomes of a chat longer than the context; "error": it is refused
    max_rows: int = 256  # texts of one request
    time_limit_s: float = 600.0
    ends: frozenset[int] = frozenset()  # the run's end_ids; end-of-text ends a text without being told
    created: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "flatgpt",
                "max_model_len": self.config.max_seq_len, "chat": self.template is not None}


@dataclass(frozen=True)
class Prompt:
    text: str
    tokens: list[int]
    has_start: bool = False  # the first token is the tokenizer's start, which is no part of the text
    cut: int = 0  # tokens of a chat that are left out, as it is longer than the context


@dataclass(frozen=True)
class Asked:
    """One request, understood."""

    id: str
    served: Served
    is_chat: bool
    prompts: list[Prompt]
    rows: list[Row]  # n of each prompt, in order
    echo: bool
    stream: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))


# ---- Fields ----------------------------------------------------------------------------------------------------------

class _Fields:
    """Takes fields out of a request's JSON object one by one; null is as good as left out. Raises ApiError."""

    def __init__(self, body: dict):
        self._body = {key: value for key, value in body.items() if value is not None}

    def take(self, name: str, default: object = None) -> object:
        return self._body.pop(name, default)

    def number(self, name: str, default: float | None, *, low: float = -math.inf, high: float = math.inf,
               is_whole: bool = False) -> float | int | None:
        value = self.take(name, default)
        if value is None:
            return None
        if not (_is_whole(value) if is_whole else _is_number(value)):
            raise wrong(name, value, "a whole number" if is_whole else "a finite number")
        if not low <= value <= high:
            raise wrong(name, value, f"at least {low}" if high == math.inf else f"from {low} to {high}")
        return value if is_whole else float(value)

    whole = partialmethod(number, is_whole=True)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def refuse_rest(self, neutral: dict[str, tuple]) -> None:
        """What was not taken must ask for nothing."""
        for name, value in self._body.items():
            if name in LABELS or any(value == allowed for allowed in neutral.get(name, ())):
                continue
            if name in neutral:
                raise unsupported(name, f"{name} = {_short(value)}")
            raise ApiError(400, f"{_short(name)} is not a field of this request", param=name[:100],
                           code="unknown_parameter")


def invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def wrong(name: str, value: object, should: str) -> ApiError:
    return invalid(name, f"{name} = {_short(value)} should be {should}")


def unsupported(param: str, what: str) -> ApiError:
    return ApiError(400, f"{what} is not supported by this server; leave it out", param=param, code="unsupported_value")


def no_such_model(name: object, served: Served) -> ApiError:
    return ApiError(404, f"model {_short(name)} is not served here; this server has {served.name!r}", param="model",
                    code="model_not_found")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


# ---- Requests --------------------------------------------------------------------------------------------------------

def parse(body: dict, served: Served, deliver: Callable[[int, Part], None], *, is_chat: bool) -> Asked:
    """What a completion or a chat asks for. deliver receives the number of a row in it, and a part. Raises ApiError."""
    if is_chat and served.template is None:
        raise ApiError(400, f"{served.name!r} was not trained on chats: its run has no {chat.TEMPLATE_FILE}; use "
                       "/v1/completions", code="no_chat_template")
    fields = _Fields(body)
    model = fields.take("model", served.name)
    if model != served.name:
        raise no_such_model(model, served)

    if is_chat:
        values = [fields.take("messages")]
    else:  # a text, texts, token ids, or lists of token ids
        values = fields.take("prompt", "")
        if isinstance(values, str) or (isinstance(values, list) and values and _is_whole(values[0])):
            values = [values]
        if not isinstance(values, list) or not values:
            raise wrong("prompt", values, PROMPTS)
    n = fields.whole("n", 1, low=1, high=MAX_N)
    if len(values) * n > served.max_rows:
        what, param = (f"{len(values)} prompts x n = {n}", "n") if n > 1 else (f"{len(values)} prompts", "prompt")
        raise ApiError(400, f"{what} are more than the {served.max_rows} texts of one request; send them in several",
                       param=param, code="too_many_texts")

    old = fields.whole("max_tokens", None, low=int(is_chat))
    most = served.config.max_seq_len if is_chat else DEFAULT_MAX_TOKENS
    new = fields.whole("max_completion_tokens", most if old is None else old, low=int(is_chat))
    if old not in (None, new):
        raise invalid("max_tokens", f"max_tokens = {old} contradicts max_completion_tokens = {new}; give one")
    if is_chat:
        prompts = [_chat_prompt(values[0], served, new, _variables(fields.take("chat_template_kwargs", {})))]
    else:
        how = {"add_start": fields.flag("add_special_tokens", True), "parse_special": fields.flag("parse_special")}
        prompts = [_prompt(value, served, is_whole=new == 0, **how) for value in values]
    echo = not is_chat and fields.flag("echo")

    if is_chat:
        wants_logprobs = fields.flag("logprobs")
        top_logprobs = fields.whole("top_logprobs", None, low=0, high=MAX_CHAT_TOP_LOGPROBS)
        if top_logprobs is not None and not wants_logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs = true")
        top_logprobs = top_logprobs or 0 if wants_logprobs else None
    else:
        top_logprobs = fields.whole("logprobs", None, low=0, high=MAX_TOP_LOGPROBS)

    ends = frozenset() if fields.flag("ignore_eos") else served.ends | {served.tokenizer.eot}
    settings = {
        "sampling": _sampling(fields), "stop": _stops(fields.take("stop", [])), "top_logprobs": top_logprobs,
        "stop_tokens": ends | _token_ids(fields.take("stop_token_ids", []), served.config.vocab_size),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, low=0.01, high=100),
        "presence_penalty": fields.number("presence_penalty", 0.0, low=-2, high=2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, low=-2, high=2),
        "logit_bias": _logit_bias(fields.take("logit_bias", {}), served.config.vocab_size),
        "scores_prompt": echo and top_logprobs is not None, "deadline": time.monotonic() + served.time_limit_s}
    rows = [Row(prompt.tokens, min(new, served.config.max_seq_len - len(prompt.tokens) + 1), partial(deliver, number),
                number=number, **settings)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(n))]

    stream = fields.flag("stream")
    include_usage = _include_usage(fields.take("stream_options"), stream)
    fields.refuse_rest(CHAT_NEUTRAL if is_chat else COMPLETION_NEUTRAL | {"best_of": (n,)})
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return Asked(name, served, is_chat, prompts, rows, echo, stream, include_usage)


def tokenized(body: dict, served: Served) -> list[int]:
    """The ids of a text: those that a completion has for it as a prompt. Raises ApiError."""
    fields, tokenizer = _Fields(body), served.tokenizer
    prompt, model = fields.take("prompt"), fields.take("model", served.name)
    if not isinstance(prompt, str):
        raise wrong("prompt", prompt, "a text")
    if model != served.name:
        raise no_such_model(model, served)
    add_start = fields.flag("add_special_tokens", True) and tokenizer.bos_token is not None
    # lm-evaluation-harness learns the id of end-of-text from its spelling; inside a text it is plain text
    parse_special = fields.flag("parse_special") or prompt in tokenizer.special_ids
    fields.refuse_rest({"return_token_strs": (False,)})
    return encode_prompt(tokenizer, prompt, parse_special=parse_special, add_start=add_start).tolist()


def _prompt(value: object, served: Served, *, is_whole: bool, add_start: bool, parse_special: bool) -> Prompt:
    """A text, or token ids; is_whole: nothing follows, so that a character that it leaves unfinished is its own."""
    tokenizer = served.tokenizer
    if value == []:  # lm-evaluation-harness sends an empty context so
        value = ""
    if isinstance(value, str):
        text = replace_surrogates(value)
        most = served.config.max_seq_len * int(tokenizer.token_bytes().max())  # bytes that could fit
        if tokenizer.cuttable and not parse_special and len(text) > most:  # far too long: it is not encoded first
            raise _too_long(f"at least {-(-len(text) * served.config.max_seq_len // most)}", served, "prompt")
        value = encode_prompt(tokenizer, text, parse_special=parse_special, add_start=add_start).tolist()
        if not value:
            raise invalid("prompt", "an empty prompt has no tokens without a special one; add_special_tokens = true "
                          "puts one there")
        tokens = _fitting(value, served, "prompt")
        if not parse_special:
            return Prompt(text, tokens, has_start=tokens[0] == tokenizer.start)  # no text has that token
    if not isinstance(value, list) or not all(map(_is_whole, value)):
        raise wrong("prompt", value, PROMPTS)
    tokens = _fitting(value, served, "prompt")
    return Prompt(detokenized(tokenizer, tokens, is_whole=is_whole)[0], tokens)


def _variables(value: object) -> dict:
    """Of chat_template_kwargs."""
    if not isinstance(value, dict):
        raise wrong("chat_template_kwargs", value, "an object: variable of the template -> value")
    if taken := [name for name in value if name in TEMPLATE_NAMES or name.endswith("_token")]:
        raise unsupported("chat_template_kwargs", f"chat_template_kwargs.{taken[0]}")
    return value


def _chat_prompt(value: object, served: Served, max_new_tokens: int, variables: dict) -> Prompt:
    """Messages; longer than the context they are cut so that they leave answer_room, or refused."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "a list of messages")
    messages = [_message(message, f"messages[{number}]") for number, message in enumerate(value)]
    try:
        ids, cut = fit_chat(served.tokenizer, served.template, messages, served.config.max_seq_len,
                            free=answer_room(served.config.max_seq_len, max_new_tokens), variables=variables)
    except chat.ChatError as error:
        raise ApiError(400, str(error), param="messages") from None
    if cut and served.too_long == "error":
        raise _too_long(str(len(ids) + cut), served, "messages")
    return Prompt("", _fitting(ids.tolist(), served, "messages") or [served.tokenizer.eot], cut=cut)


def _fitting(tokens: list[int], served: Served, param: str) -> list[int]:
    """The tokens, which the context holds and the model knows. Raises ApiError."""
    if len(tokens) > served.config.max_seq_len:
        raise _too_long(str(len(tokens)), served, param)
    unknown = [token for token in tokens if not 0 <= token < served.config.vocab_size]
    if unknown:
        raise invalid(param, f"the prompt has token {unknown[0]}, but the model knows 0 to "
                      f"{served.config.vocab_size - 1}")
    return tokens


def _too_long(tokens: str, served: Served, param: str) -> ApiError:
    return ApiError(400, f"the prompt has {tokens} tokens, more than the model's context of "
                    f"{served.config.max_seq_len}; shorten it", param=param, code="context_length_exceeded")


def _sampling(fields: _Fields) -> Sampling:
    top_k = fields.whole("top_k", None, low=-1)
    try:
        return Sampling(
            temperature=fields.number("temperature", 1.0), top_p=fields.number("top_p", 1.0),
            top_k=None if top_k in (-1, 0) else top_k, min_p=fields.number("min_p", 0.0),
            seed=fields.whole("seed", secrets.randbits(63), low=-2 ** 63, high=2 ** 63 - 1))
    except SampleError as error:
        raise invalid(str(error).split()[0], str(error)) from None


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops) or len(stops) > MAX_STOPS:
        raise wrong("stop", value, f"a text or a list of at most {MAX_STOPS} texts")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise wrong("stop", value, f"of texts of 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(map(replace_surrogates, stops)))


def _token_ids(value: object, vocab_size: int) -> frozenset[int]:
    if not isinstance(value, list) or not all(_is_whole(token) and 0 <= token < vocab_size for token in value):
        raise wrong("stop_token_ids", value, f"a list of token ids below {vocab_size}")
    return frozenset(value)


def _logit_bias(value: object, vocab_size: int) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong("logit_bias", value, "an object: token id -> bias")
    for token, bias in value.items():
        if not (token.isdecimal() and len(token) < 10 and str(int(token)) == token and int(token) < vocab_size):
            raise wrong("logit_bias", token, f"keyed by token ids below {vocab_size}")
        if not _is_number(bias) or not -100 <= bias <= 100:
            raise wrong("logit_bias", bias, "of numbers from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", options, 'an object such as {"include_usage": true}')
    if not stream:
        raise invalid("stream_options", "stream_options needs stream = true")
    fields = _Fields(options)
    if fields.flag("include_obfuscation"):
        raise unsupported("stream_options", "stream_options.include_obfuscation")
    return fields.flag("include_usage")


def _message(value: object, name: str) -> dict:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise wrong(name, value, 'an object {"role": ..., "content": ...}')
    extra = {key for key, item in value.items() if item is not None} - {"role", "content", "name"}
    if extra:
        raise unsupported("messages", f"{name}.{min(extra)}")
    content = value.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise wrong(f"{name}.content", content, "a text")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{name}.content", part, 'text, or parts {"type": "text", "text": ...}')
    message = {key: value[key] for key in ("role", "name") if isinstance(value.get(key), str)}
    return message | {"content": replace_surrogates("".join(part["text"] for part in parts))}


def detokenized(tokenizer: Tokenizer, tokens: list[int], *, is_whole: bool = True) -> tuple[str, list[int]]:
    """The text of tokens, special ones left out, and the characters of it before each. Unless it is whole, a character
    that it leaves unfinished is left out too: it is in the text of the tokens that follow, see TextStream."""
    stream = TextStream(tokenizer, [])
    text, offsets = "", []
    for token in tokens:
        offsets.append(len(text))
        text += stream.add(token)
    return text + stream.end() if is_whole else text, offsets


# ---- Answers ---------------------------------------------------------------------------------------------------------

def merged(parts: list[Part]) -> Part:
    """A row's parts as one."""
    return Part("".join(part.text for part in parts), tuple(one for part in parts for one in part.tokens),
                parts[-1].made, parts[-1].finish, parts[-1].error, parts[0].prompt)


def answer(asked: Asked, parts: list[Part]) -> dict:
    """The answer that is not streamed; parts: each row's, merged."""
    choices = [_choice(asked, number, part, is_first=True) for number, part in enumerate(parts)]
    return _object(asked, choices, made=[part.made for part in parts])


def chunk(asked: Asked, number: int, part: Part, *, is_first: bool) -> dict | None:
    """A streamed piece of a row; None if there is nothing to tell yet."""
    if not (part.text or part.tokens or part.finish or part.prompt or (is_first and (asked.is_chat or asked.echo))):
        return None
    choice = _choice(asked, number, part, is_first=is_first)
    return _object(asked, [choice]) | ({"usage": None} if asked.include_usage else {})


def usage_chunk(asked: Asked, made: list[int]) -> dict:
    """The last chunk; made: new tokens of each row."""
    return _object(asked, [], made=made)


def _object(asked: Asked, choices: list[dict], *, made: list[int] | None = None) -> dict:
    kind = f"chat.completion{'.chunk' if asked.stream else ''}" if asked.is_chat else "text_completion"
    told = {"id": asked.id, "object": kind, "created": asked.created, "model": asked.served.name, "choices": choices}
    if made is not None:
        read, new = sum(len(prompt.tokens) for prompt in asked.prompts), sum(made)
        told["usage"] = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
    return told


def _choice(asked: Asked, number: int, part: Part, *, is_first: bool) -> dict:
    """One element of choices."""
    row, tokenizer = asked.rows[number], asked.served.tokenizer
    prompt = asked.prompts[number * len(asked.prompts) // len(asked.rows)]
    has_logprobs, logprobs = row.top_logprobs is not None, None
    if asked.is_chat:
        said = ({"role": "assistant"} if is_first else {}) | ({"content": part.text} if part.text or is_first else {})
        if has_logprobs:
            shown = [one for one in part.tokens if one.token not in row.stop_tokens]
            logprobs = {"content": [_chat_logprob(one, tokenizer) for one in shown], "refusal": None}
        told = {"delta": said} if asked.stream else {"message": said | {"refusal": None}}
    else:
        if has_logprobs:
            start = len(prompt.text) if asked.echo else 0
            tokens = [(one, start + one.offset) for one in part.tokens]
            if part.prompt:
                own = slice(1 if prompt.has_start else 0, None)
                tokens = [*zip(part.prompt[own], detokenized(tokenizer, prompt.tokens[own])[1], strict=True), *tokens]
            logprobs = _completion_logprobs(tokens, tokenizer)
        told = {"text": prompt.text + part.text if asked.echo and is_first else part.text}
    return {"index": number, **told, "logprobs": logprobs, "finish_reason": part.finish}


def _completion_logprobs(tokens: Iterable[tuple[Scored, int]], tokenizer: Tokenizer) -> dict:
    """The four parallel lists of the completions API."""
    logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one, offset in tokens:
        own = top = None  # of a prompt's first token: nothing precedes it
        if one.logprob is not None:
            own = max(one.logprob, LOWEST_LOGPROB)
            # The token itself is told too. Of tokens that are spelled alike the likelier one comes last, and stays.
            pairs = sorted({(one.token, one.logprob), *one.top}, key=lambda pair: pair[1])
            by_text = {spelled(tokenizer, token): max(logprob, LOWEST_LOGPROB) for token, logprob in pairs}
            top = dict(reversed(by_text.items()))
        for told, value in zip(logprobs.values(), (spelled(tokenizer, one.token), own, top, offset), strict=True):
            told.append(value)
    return logprobs


def _chat_logprob(one: Scored, tokenizer: Tokenizer) -> dict:
    def entry(token: int, logprob: float) -> dict:
        return {"token": spelled(tokenizer, token), "logprob": max(logprob, LOWEST_LOGPROB),
                "bytes": list(tokenizer.spelling(token))}

    return entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]}


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """One token as text; what is no UTF-8 as OpenAI spells it (`bytes:\\xe2\\x80`), so that no two look alike."""
    data = tokenizer.spelling(token)
    if not data:
        return f"token:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
