"""HTTP requests, damaged or hostile, by the thousand: an answer, or OpenAI's error object; the server never fails."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests import fuzzing
from tests.fuzzing import JSON, fuzz, json_text, mutations, other_json, st
from tests.test_sample import make_model

for package in ("fastapi", "httpx", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: hostile requests stay unchecked")
import httpx  # noqa: E402

from tests.test_serving_server import FIELDS, in_process  # noqa: E402

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
COMMON = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"], "n": 2,
          "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1}, "stop_token_ids": [7],
          "stream": False, "model": "tiny", "user": "u", "repetition_penalty": 1.1, "ignore_eos": False}
BODIES = {"/v1/completions": COMMON | {"prompt": ["a", "b"], "echo": True, "logprobs": 1},
          "/v1/chat/completions": COMMON | {"messages": TALK, "logprobs": True, "top_logprobs": 1,
                                            "chat_template_kwargs": {"a": 1}},
          "/tokenize": {"prompt": "a", "add_special_tokens": True}, "/detokenize": {"tokens": [1, 2]}}


@pytest.fixture(scope="module")
def ask() -> Iterator:
    """ask(method, path, content, headers) -> the response of an application in this process."""
    loop = asyncio.new_event_loop()
    server = in_process(make_model(max_seq_len=64))
    client = loop.run_until_complete(server.__aenter__())
    yield lambda method, path, content, headers: loop.run_until_complete(
        client.request(method, path, content=content, headers=headers))
    loop.run_until_complete(server.__aexit__(None, None, None))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def check(response, content: bytes) -> None:
    assert response.status_code in (200, 400, 404, 405, 413), (response.status_code, content, response.text)
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.rstrip().endswith("data: [DONE]"), response.text
    elif response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and len(response.content) < 4000, response.text


@fuzz(300, path=st.sampled_from(list(BODIES)), data=st.data())
def test_bodies(ask, path, data):
    good = BODIES[path]
    content = data.draw(st.one_of(
        other_json(good).map(json_text), mutations(json_text(good)), JSON.map(json_text),
        st.dictionaries(st.sampled_from([*FIELDS, "stream", "echo", "tools", "x", "template", "self", "add_start"]),
                        JSON, max_size=3).map(lambda more: json_text(good | more)),
        st.dictionaries(st.sampled_from(["template", "self", "messages", "tokenizer", "eos_token", "a", "loop", ""]),
                        JSON, max_size=3).map(lambda more: json_text(good | {"chat_template_kwargs": more}))))
    with fuzzing.watched():
        response = ask("POST", path, content, {})
    check(response, content)
    if response.status_code == 200 and path == "/v1/completions" and not response.headers[
            "content-type"].startswith("text/event-stream"):
        body = json.loads(content)  # what was answered was asked, by Python's own reader
        prompts = body.get("prompt") or [""]
        prompts = [prompts] if isinstance(prompts, str) or isinstance(prompts[0], int) else prompts
        assert len(response.json()["choices"]) == len(prompts) * (body.get("n") or 1)


@fuzz(200, method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "X"]),
      path=st.one_of(st.sampled_from([*BODIES, "/", "/health", "/v1/models", "/v1/models/tiny", "/tokenizer_info"]),
                     st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="?#"),
                             max_size=9).map(lambda text: "/" + text),
                     st.sampled_from(["/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fetc", "/%00", "/..", "//"])),
      headers=st.dictionaries(
          st.sampled_from(["Authorization", "Content-Length", "Content-Type", "Host", "Origin", "Expect", "Cookie"]),
          st.one_of(st.sampled_from(["-1", "1e9", "9" * 99, "\u0661", "Bearer ", "Bearer x", "a.example", "[::1", ""]),
                    st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=9)).map(
              lambda text: text.strip().encode("utf-8"))), content=st.binary(max_size=20))
def test_addresses_and_headers(ask, method, path, headers, content):
    try:
        with fuzzing.watched():
            response = ask(method, path, content, headers)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):  # the client does not send it
        return
    if method in ("HEAD", "OPTIONS") or response.status_code == 200:
        assert response.status_code < 500
    else:
        check(response, content)
