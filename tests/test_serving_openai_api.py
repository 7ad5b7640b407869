"""openai_api.py: what a request's fields mean, which are refused and how, and the shapes of the answers."""

import json
import time
from dataclasses import replace
from functools import partial

import pytest

import sample
from config import ModelConfig
from data import chat
from data.tokenizer import load_tokenizer
from serving.batching import Part, Scored
from serving.openai_api import (
    ApiError,
    Asked,
    Served,
    answer,
    chunk,
    merged,
    parse,
    spelled,
    tokenized,
    usage_chunk,
)
from tests.test_data_chat import loaded

BYTES = load_tokenizer("bytes")
EOT = BYTES.eot
SERVED = Served("tiny", ModelConfig(vocab_size=300, max_seq_len=32), BYTES, max_rows=10, time_limit_s=60.0)
CHATTING = Served("tiny", ModelConfig(vocab_size=300, max_seq_len=200), BYTES, chat.DEFAULT_TEMPLATE)
HELLO = [{"role": "user", "content": "Hi"}]


def completion(served: Served = SERVED, **body) -> Asked:
    return parse(body, served, lambda number, part: None, is_chat=False)


def chatting(**body) -> Asked:
    return parse({"messages": HELLO} | body, CHATTING, lambda number, part: None, is_chat=True)


def refusal(parse, **body) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse(**body)
    return error.value


# ---- Requests --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, tokens", [
    ("ab", [[97, 98]]), (["ab", "c"], [[97, 98], [99]]), ([97, 98], [[97, 98]]), ([[97], [298]], [[97], [298]]),
    ("", [[EOT]]), ([[], [97]], [[EOT], [97]]), (["", "é"], [[EOT], [0xC3, 0xA9]]),
    ("<|endoftext|>", [list(b"<|endoftext|>")]),
    ("\ud83d\ude00", [list("😀".encode())]), ("\ud83d", [list("\ufffd".encode())])], ids=repr)
def test_a_prompt_is_a_text_or_token_ids_or_several(prompt, tokens):
    assert [row.prompt for row in completion(prompt=prompt).rows] == tokens


def test_every_field_reaches_the_row():
    rows = completion(prompt=["a", "b"], n=2, max_tokens=7, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-3,
                      stop=["x", "yz"], logprobs=3, echo=True, presence_penalty=0.5, frequency_penalty=-2,
                      logit_bias={"5": -100, "299": 1.5}, model="tiny", user="me", best_of=2, suffix=None,
                      repetition_penalty=1.5, stop_token_ids=[7, 299]).rows
    assert [(row.prompt, row.number) for row in rows] == [([97], 0), ([97], 1), ([98], 2), ([98], 3)]
    row = rows[2]
    s = row.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (0.5, 0.9, 5, 0.1, -3)
    assert (row.max_new_tokens, row.stop, row.stop_tokens) == (7, ("x", "yz"), {EOT, 7, 299})
    assert (row.top_logprobs, row.scores_prompt) == (3, True)
    assert (row.presence_penalty, row.frequency_penalty, row.logit_bias) == (0.5, -2.0, {5: -100.0, 299: 1.5})
    assert row.repetition_penalty == 1.5
    assert 59 < row.deadline - time.monotonic() <= 60


@pytest.mark.parametrize("body, ends", [
    ({}, {EOT, 5}), ({"stop_token_ids": [9]}, {EOT, 5, 9}), ({"ignore_eos": True}, set()),
    ({"ignore_eos": True, "stop_token_ids": [9]}, {9})], ids=repr)
def test_a_text_ends_with_the_tokens_that_the_run_and_the_request_name(body, ends):
    named = {"ends": frozenset({5})}
    assert completion(replace(SERVED, **named), **body).rows[0].stop_tokens == ends
    chat_row = parse({"messages": HELLO} | body, replace(CHATTING, **named), print, is_chat=True).rows[0]
    assert chat_row.stop_tokens == ends


@pytest.mark.parametrize("body", [
    {"top_k": -1}, {"top_k": 0}, {"skip_special_tokens": True}, {"include_stop_str_in_output": False},
    {"min_tokens": 0}, {"spaces_between_special_tokens": True}, {"use_beam_search": False}, {"stop": []},
    {"repetition_penalty": 1}, {"stop_token_ids": []}], ids=repr)
def test_what_clients_of_vllm_send_as_its_default_changes_nothing(body):
    for parse_body in (completion, chatting):
        row, plain = (vars(replace(parse_body(**some, seed=1).rows[0], deliver=print, deadline=0.0))
                      for some in (body, {}))
        assert row == plain


def test_sixty_four_stop_texts_are_taken():
    stops = [f"stop {n}" for n in range(64)]
    assert completion(stop=stops).rows[0].stop == tuple(stops)
    assert completion(stop=["a", "b", "a", "\ud800"]).rows[0].stop == ("a", "b", "\ufffd")


def begun_tokenizer():
    """The bytes tokenizer with <s>, 257, before every text."""
    file = json.loads(BYTES.file_text)
    file["added_tokens"].append(file["added_tokens"][0] | {"id": 257, "content": "<s>"})
    file["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}}
    return loaded(file)


@pytest.mark.parametrize("body, tokens, echoed", [
    ({}, [257, *b"<s>a"], "<s>a"), ({"add_special_tokens": False}, [*b"<s>a"], "<s>a"),
    ({"parse_special": True}, [257, 97], "a"), ({"parse_special": True, "add_special_tokens": False}, [257, 97], "a"),
    ({"prompt": "a", "parse_special": True}, [257, 97], "a"), ({"prompt": ""}, [257], ""),
    ({"prompt": "a", "add_special_tokens": False}, [97], "a"),
    ({"prompt": "a<|endoftext|>b", "parse_special": True}, [257, 97, EOT, 98], "ab")], ids=repr)
def test_special_tokens_of_a_prompt_are_those_that_were_asked_for(body, tokens, echoed):
    served, body = replace(SERVED, tokenizer=begun_tokenizer()), {"prompt": "<s>a"} | body
    asked = completion(served, **body, echo=True, logprobs=0, max_tokens=0)
    assert asked.rows[0].prompt == tokens
    scored = Part(finish="length", prompt=tuple(Scored(token, 0, -1.0) for token in tokens))
    choice = answer(asked, [scored])["choices"][0]
    unseen = tokens[0] == 257 and "parse_special" not in body  # else it is told, as one in a list of ids
    assert choice["text"] == echoed and len(choice["logprobs"]["tokens"]) == len(tokens) - unseen
    if body["prompt"]:
        assert tokenized(body, served) == tokens


def test_tokenize_refuses_what_it_does_not_know():
    assert tokenized({"prompt": "", "model": "tiny"}, SERVED) == []
    for body, param in (({"prompt": 1}, "prompt"), ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
                        ({"prompt": "a", "model": "gpt-4"}, "model"), ({"messages": HELLO, "prompt": "a"}, "messages"),
                        ({"prompt": "a", "return_token_strs": True}, "return_token_strs")):
        assert refusal(tokenized, body=body, served=SERVED).param == param


def test_an_empty_prompt_without_special_tokens_is_refused():
    error = refusal(completion, prompt="", add_special_tokens=False)
    assert error.param == "prompt" and "add_special_tokens = true" in error.message
    assert completion(prompt="", add_special_tokens=True).rows[0].prompt == [EOT]


@pytest.mark.parametrize("tokens, expected", [
    ([], "a\ufffd"), ([0xA9, 98, EOT], "aéb"), ([98], "a\ufffdb"), ([EOT], "a\ufffd"), ([0xC3, 0xA9], "a\ufffdé")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_ids_that_ends_inside_a_character_is_echoed_up_to_it(tokens, expected, stream):
    asked = completion(prompt=[97, 0xC3], echo=True, logprobs=0, max_tokens=len(tokens), stream=stream)
    parts = [Part(prompt=(Scored(97, 0), Scored(0xC3, 0, -1.0)), finish=None if tokens else "length")]
    text = sample.TextStream(BYTES, asked.rows[0].prompt, (), frozenset({EOT}))
    for count, token in enumerate(tokens, start=1):
        offset = text.decoded
        said = text.add(token, is_last=count == len(tokens))
        parts.append(Part(said, (Scored(token, offset, -1.0),), count, text.finish))
    if stream:
        told = [chunk(asked, 0, part, is_first=number == 0) for number, part in enumerate(parts)]
        choices = [one["choices"][0] for one in told if one]
    else:
        choices = answer(asked, [merged(parts)])["choices"]
    assert "".join(choice["text"] for choice in choices) == expected
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert offsets[:3] == [0, 1, 1][:len(offsets)] and all(offset <= len(expected) for offset in offsets)


def test_defaults_are_those_of_openai():
    row = completion(prompt="a").rows[0]
    assert (row.max_new_tokens, row.sampling.temperature, row.sampling.top_p, row.stop) == (16, 1.0, 1.0, ())
    assert (row.top_logprobs, row.scores_prompt) == (None, False)
    assert completion(prompt="a").rows[0].sampling.seed != row.sampling.seed
    asked = completion(prompt="a", stop=None, n=None, logprobs=None, stream=None, stream_options=None)
    assert not asked.stream and len(asked.rows) == 1


def test_the_context_bounds_the_new_tokens():
    assert completion(prompt=[1] * 30, max_tokens=100).rows[0].max_new_tokens == 3
    assert completion(prompt=[1] * 32, max_tokens=100).rows[0].max_new_tokens == 1
    assert completion(prompt=[1] * 32, max_tokens=0).rows[0].max_new_tokens == 0
    prompt = chatting().rows[0]
    assert len(prompt.prompt) + prompt.max_new_tokens == 201
    assert chatting(max_completion_tokens=4).rows[0].max_new_tokens == 4


@pytest.mark.parametrize("body, param, message", [
    ({"prompt": [1] * 33}, "prompt", "the prompt has 33 tokens, more than the model's context of 32"),
    ({"prompt": "x" * 33}, "prompt", "at least 33 tokens"), ({"prompt": [[1, 2], [3] * 40]}, "prompt", "40 tokens"),
    ({"prompt": [300]}, "prompt", "token 300, but the model knows 0 to 299"), ({"prompt": [-1]}, "prompt", "token -1"),
    ({"prompt": []}, "prompt", "should be a text"), 
    ({"prompt": [1, "a"]}, "prompt", "should be a text"), ({"prompt": ["a", 1]}, "prompt", "should be a text"),
    ({"prompt": [True]}, "prompt", "should be a text"), ({"prompt": {"a": 1}}, "prompt", "should be a text"),
    ({"prompt": ["a"] * 11}, "prompt", "11 prompts are more than the 10 texts"),
    ({"prompt": ["a"] * 3, "n": 4}, "n", "3 prompts x n = 4 are more than"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"), ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
    ({"max_tokens": True}, "max_tokens", "a whole number"), ({"max_tokens": "9"}, "max_tokens", "a whole number"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "contradict"),
    ({"temperature": -0.1}, "temperature", "temperature = -0.1 should be"),
    ({"temperature": float("nan")}, "temperature", "a finite number"),
    ({"temperature": 10 ** 400}, "temperature", "a finite number"),
    ({"temperature": "hot"}, "temperature", "temperature = 'hot' should be a finite number"),
    ({"top_p": 1.1}, "top_p", "0 to 1"), ({"min_p": 2}, "min_p", "0 to 1"), ({"top_k": -2}, "top_k", "at least -1"),
    ({"n": 0}, "n", "from 1 to 128"), ({"n": 129}, "n", "from 1 to 128"), ({"seed": 2 ** 63}, "seed", "from -9"),
    ({"seed": "a"}, "seed", "a whole number"), ({"logprobs": 6}, "logprobs", "from 0 to 5"),
    ({"logprobs": True}, "logprobs", "a whole number"), ({"echo": 1}, "echo", "true or false"),
    ({"stop": ["a"] * 65}, "stop", "at most 64 texts"), ({"stop": ""}, "stop", "of texts of 1 to"),
    ({"stop": [1]}, "stop", "a list of at most 64"), ({"stop": "x" * 1001}, "stop", "1 to 1000 characters"),
    ({"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": "x"}, "frequency_penalty", "a finite number"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "token ids below 300"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"), ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": [1]}, "logit_bias", "an object"), ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream = true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "include_usage"),
    ({"logit_bias": {"01": 1}}, "logit_bias", "token ids"), ({"logit_bias": {"9" * 400: 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 10 ** 400}}, "logit_bias", "-100 to 100"), ({"max_tokens": -10 ** 400}, "max_tokens", "at l"),
    ({"prompt": [10 ** 400]}, "prompt", "but the model knows"), ({"seed": 10 ** 400}, "seed", "from -9"),
    ({"top_k": -10 ** 400}, "top_k", "at least -1"), ({"min_p": -10 ** 400}, "min_p", "a finite number"),
    ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01 to 100"),
    ({"repetition_penalty": 1e-46}, "repetition_penalty", "from 0.01 to 100"),
    ({"stop_token_ids": [300]}, "stop_token_ids", "a list of token ids below 300"),
    ({"stop_token_ids": [10 ** 400]}, "stop_token_ids", "a list of"), ({"stop_token_ids": 3}, "stop_token_ids", "a li"),
    ({"ignore_eos": 1}, "ignore_eos", "true or false"), ({"parse_special": 1}, "parse_special", "true or false"),
    ({"min_tokens": 3}, "min_tokens", "min_tokens = 3 is not supported"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "not supported"),
    ({"chat_template_kwargs": {}}, "chat_template_kwargs", "not a field"),
    ({"best_of": 3}, "best_of", "best_of = 3 is not supported by this server"),
    ({"suffix": "end"}, "suffix", "suffix = 'end' is not supported"),
    ({"max_token": 3}, "max_token", "'max_token' is not a field of this request")], ids=repr)
def test_wrong_fields_are_named(body, param, message):
    error = refusal(completion, **{"prompt": "a"} | body)
    assert (error.status, error.param) == (400, param) and message in error.message


def test_an_unknown_model_is_not_found():
    error = refusal(completion, prompt="a", model="gpt-4")
    assert error.status == 404 and error.as_json()["error"] == {
        "message": "model 'gpt-4' is not served here; this server has 'tiny'", "type": "not_found_error",
        "param": "model", "code": "model_not_found"}


def test_a_tokenizer_with_a_start_token_puts_it_before_texts_and_it_is_not_told():
    served = replace(SERVED, tokenizer=begun_tokenizer())
    asked = completion(served, prompt=["ab", "", [97]], echo=True, logprobs=0, max_tokens=0)
    assert [row.prompt for row in asked.rows] == [[257, 97, 98], [257], [97]]
    scored = Part(finish="length", prompt=(Scored(257, 0), Scored(97, 0, -1.0), Scored(98, 0, -2.0)))
    choice = answer(asked, [scored])["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", ["a", "b"])
    assert (choice["logprobs"]["token_logprobs"], choice["logprobs"]["text_offset"]) == ([-1.0, -2.0], [0, 1])
    assert refusal(partial(completion, served), prompt="x" * 32).code == "context_length_exceeded"


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(monkeypatch):
    monkeypatch.setattr(BYTES, "_encode_piece", lambda text: pytest.fail("encoded"))
    assert "at least 1000000 tokens" in refusal(completion, prompt="a" * 10 ** 6).message


# ---- Chats -----------------------------------------------------------------------------------------------------------

def test_messages_become_the_template_and_specials_in_them_stay_text():
    in_parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chatting(messages=[{"role": "system", "content": "Be <|endoftext|>"}, {"role": "user", "content": in_parts},
                               {"role": "assistant", "content": "c", "tool_calls": None},
                               {"role": "user", "content": "d"}])
    text = "System:\nBe <|endoftext|>\n\nUser:\nab\n\nAssistant:\nc"
    expected = [*text.encode(), EOT, *b"\n\nUser:\nd\n\nAssistant:\n"]
    assert asked.rows[0].prompt == expected


def test_template_kwargs_reach_the_template_and_specials_in_them_stay_text():
    template = "{% if not loud %}quiet {% endif %}{{ name }}:{{ messages[0].content }}{{ eos_token }}"
    served = replace(CHATTING, template=template)
    for given, text in (({}, "quiet :Hi"), ({"loud": True, "name": "<|endoftext|>"}, "<|endoftext|>:Hi")):
        body = {"messages": HELLO, "chat_template_kwargs": given}
        assert parse(body, served, print, is_chat=True).rows[0].prompt == [*text.encode(), EOT]


@pytest.mark.parametrize("body, param, message", [
    ({"messages": []}, "messages", "a list of messages"), ({"messages": "Hi"}, "messages", "a list of messages"),
    ({"messages": ["Hi"]}, "messages[0]", '"role"'), ({"messages": [{"content": "Hi"}]}, "messages[0]", '"role"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "should be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "parts"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages", "tool_calls is not"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages", "role wizard is none of"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "kwargs.messages is not supported"),
    ({"chat_template_kwargs": {"eos_token": ""}}, "chat_template_kwargs", "kwargs.eos_token is not supported"),
    ({"add_special_tokens": True}, "add_special_tokens", "not supported"),
    ({"add_generation_prompt": False}, "add_generation_prompt", "not supported"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"), ({"logprobs": 2}, "logprobs", "true or false"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs = true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"), ({"echo": True}, "echo", "not a field"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported")], ids=repr)
def test_wrong_fields_of_a_chat_are_named(body, param, message):
    error = refusal(chatting, **body)
    assert (error.status, error.param) == (400, param) and message in error.message


def test_a_chat_longer_than_the_context_is_cut_to_leave_room_for_its_answer():
    talk = [{"role": "user", "content": "x" * 170}, {"role": "assistant", "content": "c"},
            {"role": "user", "content": "y" * 120}]
    for max_tokens, kept in ((None, 100), (5, 139), (74, 127), (102, 100)):  # 139: all of the last exchange
        asked = chatting(messages=talk, max_tokens=max_tokens)
        said = "y" * (kept - len("User:\n\n\nAssistant:\n"))
        assert bytes(asked.rows[0].prompt).decode() == f"User:\n{said}\n\nAssistant:\n"
        assert asked.rows[0].max_new_tokens == min(max_tokens or 200, 201 - kept)
        assert asked.prompts[0].cut == 332 - kept
        usage = answer(asked, [Part(made=1, finish="length")])["usage"]
        assert usage == {"prompt_tokens": kept, "completion_tokens": 1, "total_tokens": kept + 1}
    served = replace(CHATTING, too_long="error")
    error = refusal(partial(parse, served=served, deliver=None, is_chat=True), body={"messages": talk})
    assert (error.status, error.param, error.code) == (400, "messages", "context_length_exceeded")
    assert error.message.startswith("the prompt has 332 tokens, more than the model's context of 200")


def test_fields_that_ask_for_nothing_are_accepted():
    chatting(tools=[], tool_choice="auto", response_format={"type": "text"}, store=False, metadata={"a": "b"}, user="x",
             parallel_tool_calls=True, modalities=["text"], audio=None)


def test_a_run_without_a_template_says_so():
    error = refusal(partial(parse, served=SERVED, deliver=None, is_chat=True), body={"messages": HELLO})
    assert (error.status, error.code) == (400, "no_chat_template") and "/v1/completions" in error.message


# ---- Answers ---------------------------------------------------------------------------------------------------------

def test_a_completion_has_openais_shape():
    asked = completion(prompt="aé", echo=True, logprobs=1, max_tokens=3)
    prompt = (Scored(97, 0), Scored(0xC3, 0, -1.0, ((98, -0.5),)), Scored(0xA9, 0, -2.0, ((0xA9, -2.0),)))
    parts = [Part(prompt=prompt), Part("x", (Scored(120, 0, -0.25, ((120, -0.25),)),), 1),
             Part("", (Scored(EOT, 1, -float("inf"), ((121, -0.5),)),), 2, "stop")]
    whole = answer(asked, [merged(parts)])
    assert whole["object"] == "text_completion" and whole["model"] == "tiny" and whole["id"].startswith("cmpl-")
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert whole["choices"] == [{"index": 0, "text": "aéx", "finish_reason": "stop", "logprobs": {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "x", "<|endoftext|>"],
        "token_logprobs": [None, -1.0, -2.0, -0.25, -9999.0],
        "top_logprobs": [None, {"b": -0.5, "bytes:\\xc3": -1.0}, {"bytes:\\xa9": -2.0}, {"x": -0.25},
                         {"y": -0.5, "<|endoftext|>": -9999.0}],
        "text_offset": [0, 1, 1, 2, 3]}}]
    assert list(whole["choices"][0]["logprobs"]["top_logprobs"][1]) == ["b", "bytes:\\xc3"]  # the likeliest first
    json.dumps(whole, allow_nan=False)


def test_without_logprobs_and_echo_there_is_only_the_new_text():
    asked = completion(prompt="ab")
    whole = answer(asked, [merged([Part("x", (Scored(120, 0),), 1), Part("y", (Scored(121, 1),), 2, "length")])])
    assert whole["choices"] == [{"index": 0, "text": "xy", "logprobs": None, "finish_reason": "length"}]


def test_an_empty_prompt_has_no_token_in_the_answer():
    asked = completion(prompt="", echo=True, logprobs=0, max_tokens=1)
    part = merged([Part(prompt=(Scored(EOT, 0),)), Part("x", (Scored(120, 0, -1.0),), 1, "length")])
    choice = answer(asked, [part])["choices"][0]
    assert choice["text"] == "x" and choice["logprobs"] == {
        "tokens": ["x"], "token_logprobs": [-1.0], "top_logprobs": [{"x": -1.0}], "text_offset": [0]}


def test_echoed_token_ids_are_told_as_text_without_specials():
    asked = completion(prompt=[EOT, 97, 0xC3], echo=True, max_tokens=0)
    choice = answer(asked, [Part(finish="length")])["choices"][0]
    assert choice["text"] == "a\ufffd"


def test_streamed_pieces_join_to_the_whole():
    asked = completion(prompt="ab", echo=True, logprobs=0, max_tokens=3, stream=True)
    parts = [Part(prompt=(Scored(97, 0), Scored(98, 0, -1.0))), Part("", (), 1),
             Part("xy", (Scored(120, 0, -1.0), Scored(121, 1, -2.0)), 2), Part("", (Scored(EOT, 2, -3.0),), 3, "stop")]
    pieces = [chunk(asked, 0, part, is_first=number == 0) for number, part in enumerate(parts)]
    assert pieces[1] is None  # nothing to tell
    choices = [piece["choices"][0] for piece in pieces if piece is not None]
    whole = answer(asked, [merged(parts)])["choices"][0]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == "abxy"
    for key, values in whole["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][key]] == values
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]


def test_a_chat_has_openais_shape():
    asked = chatting(logprobs=True, top_logprobs=1, max_tokens=5)
    part = Part("é", (Scored(0xC3, 0, -1.0, ((97, -0.5),)), Scored(0xA9, 0, -2.0, ((0xA9, -2.0),)),
                      Scored(EOT, 1, -0.1, ((EOT, -0.1),))), 3, "stop")
    whole = answer(asked, [part])
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-")
    a = {"token": "a", "logprob": -0.5, "bytes": [97]}
    first = {"token": "bytes:\\xc3", "logprob": -1.0, "bytes": [0xC3]}
    second = {"token": "bytes:\\xa9", "logprob": -2.0, "bytes": [0xA9]}
    assert whole["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": "é", "refusal": None}, "finish_reason": "stop",
        "logprobs": {"content": [first | {"top_logprobs": [a]}, second | {"top_logprobs": [second]}], "refusal": None}}]


def test_a_streamed_chat_begins_with_the_role():
    asked = chatting(stream=True, stream_options={"include_usage": True})
    first, last = Part("a", (Scored(97, 0),), 1), Part("", (Scored(EOT, 1),), 2, "stop")
    pieces = [chunk(asked, 0, first, is_first=True), chunk(asked, 0, last, is_first=False)]
    assert [piece["choices"][0] for piece in pieces] == [
        {"index": 0, "delta": {"role": "assistant", "content": "a"}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(piece["object"] == "chat.completion.chunk" and piece["usage"] is None for piece in pieces)
    prompt_tokens = len("User:\nHi\n\nAssistant:\n")
    assert usage_chunk(asked, [2])["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": 2,
                                                "total_tokens": prompt_tokens + 2}
    assert usage_chunk(asked, [2])["choices"] == []


@pytest.mark.parametrize("token, text", [(97, "a"), (0xFF, "bytes:\\xff"), (EOT, "<|endoftext|>"), (299, "token:299")])
def test_no_two_tokens_are_spelled_alike(token, text):
    assert spelled(BYTES, token) == text
