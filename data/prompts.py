"""Prompts to tokens, as many as there is room for: one place that cuts for training, evaluation, sampling and serving.

The front of a plain prompt goes. Of a chat whole oldest turns go, then the front of what the user says; a system
message, the template's own text and a response to learn from stay.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from data.chat import encode_chat, encode_conversation, encode_special, learnt_turns
from data.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, *, parse_special: bool = False,
                  add_start: bool = True) -> np.ndarray:
    """Ids of a plain prompt, uint32 (n,): with add_start behind bos_token if the tokenizer has one, of an empty one
    end-of-text. parse_special: special tokens that it spells are read as such, also a bos_token of its own."""
    ids = encode_special(tokenizer, text) if parse_special else tokenizer.encode(text)
    has_start = len(ids) and (tokenizer.bos_token is None or ids[0] == tokenizer.start)
    return ids if has_start or not add_start else np.insert(ids, 0, tokenizer.start)


def answer_room(max_seq_len: int, max_new_tokens: int) -> int:
    """How many places of the context a prompt that is longer leaves free for its answer when it is cut: as many as the
    answer may need, but at most half. (An answer's last token needs none: even a full context is continued by one.)"""
    return min(max_new_tokens - 1, max_seq_len // 2)


def fit_prompt(tokenizer: Tokenizer, ids: np.ndarray, room: int, *, free: int = 0) -> tuple[np.ndarray, int]:
    """The ids of a plain prompt that stay where there is room for fewer, and how many were cut. What is cut leaves
    `free` of the room, which is larger; what fits stays whole."""
    stay = kept_tokens(tokenizer, ids, room - free if len(ids) > room else room)
    return ids[stay], len(ids) - len(stay)


def kept_tokens(tokenizer: Tokenizer, ids: np.ndarray, room: int, *, response: int = 0) -> np.ndarray:
    """Which tokens of a prompt and its response, the last `response` of the ids, stay: min(n, room) indices, in order.

    The front of the prompt goes, but for bos_token; the response stays. A response that does not fit by itself loses
    its end, and its prompt only what is more than half the room. room: at least 1, with a response 2.
    """
    prompt = len(ids) - response
    excess = max(0, prompt - _prompt_room(room, response))
    bos = int("bos_token" in tokenizer.named and prompt > excess and ids[0] == tokenizer.start)
    return np.delete(np.arange(len(ids)), slice(bos, bos + excess))[:room]


def _prompt_room(room: int, response: int) -> int:
    return room - response if response < room else room // 2


def fit_chat(tokenizer: Tokenizer, template: str, messages: list[dict], room: int, *, free: int = 0,
             variables: dict | None = None) -> tuple[np.ndarray, int]:
    """Ids, uint32 (n <= room,), of what a model is given to answer a conversation, and how many tokens were cut; `free`
    as in fit_prompt; variables of the template, see encode_chat. Raises ChatError."""
    def encode(some: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        ids = encode_chat(tokenizer, template, some, variables)
        return ids, np.zeros(len(ids), dtype=bool)

    ids, _, cut = _fit(tokenizer, messages, encode, room, free=free)
    return ids, cut


def fit_conversation(tokenizer: Tokenizer, template: str, messages: list[dict],
                     room: int = sys.maxsize) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """The examples of a conversation to learn from: ids, uint32 (n <= room,), which of them the loss counts, bool (n,),
    and how many tokens were cut. Raises ChatError (see encode_conversation)."""
    found = encode_conversation(tokenizer, template, messages)
    fitted = []
    for last, (ids, written) in zip(learnt_turns(messages)[-len(found):], found, strict=True):
        tokens = len(ids)
        if tokens > room:
            talk = messages[:last + 1]
            if len(found) > 1:  # each turn before has an example of its own
                talk = [message | {"weight": 0} if message["role"] == "assistant" else message for message in talk]
                talk[-1] = messages[last]
            ids, written, _ = _fit(tokenizer, talk, lambda some: encode_conversation(tokenizer, template, some)[-1],
                                   room)
        fitted.append((ids, written, tokens - len(ids)))
    return fitted


def _fit(tokenizer: Tokenizer, messages: list[dict], encode: Callable[[list[dict]], tuple[np.ndarray, np.ndarray]],
         room: int, *, free: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """What encode gives of messages that fit, ids and which of them the assistant wrote, and how many tokens were cut.

    Messages before the first turn, the system's, stay. Whole oldest turns go, so that a user's comes first again; then
    the front of what the user says in the last exchange; what is still too long is cut as by kept_tokens. free: as in
    fit_prompt.
    """
    ids, written = encode(messages)
    tokens = len(ids)
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role in ("user", "assistant")), len(roles))
    starts = [i for i in range(first, len(roles)) if roles[i] == "user"]

    def shorter(step: int) -> list[dict]:
        start, cut = (starts[step], 0) if step < len(starts) else (starts[-1], step - len(starts) + 1)
        user = messages[start] | {"content": messages[start]["content"][cut:]}
        return [*messages[:first], user, *messages[start + 1:]]

    if tokens > room:
        room -= free
    if tokens > room and starts:
        steps = range(len(starts) + len(messages[starts[-1]]["content"]))
        ids, written = encode(shorter(steps[-1]))
        response = _response(written)
        limit = response + _prompt_room(room, response)  # of tokens: room, unless the response does not fit by itself
        if len(ids) <= limit:  # else no step does, and trying some on a long system message would take long
            step = bisect_left(steps, True, hi=len(steps) - 1, key=lambda step: len(encode(shorter(step))[0]) <= limit)
            ids, written = encode(shorter(step))
    stay = kept_tokens(tokenizer, ids, room, response=_response(written))
    return ids[stay], written[stay], tokens - len(stay)


def _response(written: np.ndarray) -> int:
    """How many tokens there are from the first that the assistant wrote."""
    return len(written) - int(written.argmax()) if written.any() else 0
