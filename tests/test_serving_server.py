"""serve.py over HTTP: a real server of a small random model, asked by httpx, OpenAI's client and lm-evaluation-harness.

The two clients run in processes of their own, away from the checkout, whose modules would shadow some of theirs.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

import sample
from config import UserError
from data import chat
from data.tokenizer import load_tokenizer
from model import GPT
from sample import Sampling
from serving import server as serve
from serving.batching import Batch, Batcher
from serving.openai_api import Served
from tests.test_sample import make_model, save_run

for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason=f"{package} is not installed: the HTTP server stays unchecked")
import httpx  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BYTES = load_tokenizer("bytes")
EOT = BYTES.eot
LONG = 100_000  # tokens of context, so that a text can run for minutes


def make_run(folder: Path, *, template: str | None = None, **settings) -> Path:
    """A run folder with one checkpoint of a random model over bytes."""
    return save_run(folder, make_model(**{"max_seq_len": 64} | settings), template=template)


class Server:
    """`python serve.py RUN --port 0 ...` as a process; url is where it listens."""

    def __init__(self, run: Path, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "serve.py"), str(run), "--port", "0", "--device", "cpu", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
            # a shell that runs the tests in the background has them ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.log = ""
        while "serving" not in self.log:
            line = self.process.stderr.readline()
            assert line, f"the server ended: {self.log}"
            self.log += line
        self.url = re.search(r"http://\S+:\d+", self.log)[0]

    def post(self, path: str, body: dict, **settings) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **settings)

    def complete(self, **body) -> dict:
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def health(self) -> dict:
        return httpx.get(self.url + "/health", timeout=10).json()

    def wait_for(self, **state: int) -> None:
        """Until /health says so."""
        deadline = time.monotonic() + 20
        while not state.items() <= (health := self.health()).items():
            assert time.monotonic() < deadline, f"{health} instead of {state}"
            time.sleep(0.005)

    def end(self, signum: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and everything that stderr got."""
        self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=30)
        assert out == ""
        return self.process.returncode, self.log + err


@contextlib.contextmanager
def serving(run: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(run, *arguments, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        for pipe in (server.process.stdout, server.process.stderr):
            pipe.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Server]:
    """A short context and a chat template."""
    run = make_run(tmp_path_factory.mktemp("serve") / "tiny", template=chat.DEFAULT_TEMPLATE)
    with serving(run) as server:
        server.run = run
        yield server


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """A model whose texts run for minutes: end-of-text is hardly ever drawn."""
    return make_run(tmp_path_factory.mktemp("serve") / "long", std=0.02, position="rope", max_seq_len=LONG)


@pytest.fixture(scope="module")
def slow(long_run) -> Iterator[Server]:
    """One text at a time, two in the queue."""
    with serving(long_run, "--batch-size", "1", "--queue", "2") as server:
        yield server


def expected_texts(run: Path, prompt: str, rows: int = 1, **arguments) -> list[str]:
    """What sample.py makes of the prompt."""
    model, tokenizer = sample.load_model(run, device=torch.device("cpu"), dtype="float32", note=lambda text: None)
    texts = [""] * rows
    for piece in sample.generate_text(model, tokenizer, [prompt] * rows, **arguments):
        texts[piece.row] += piece.text
    return texts


def events(response: httpx.Response) -> Iterator[dict | str]:
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def streamed(server: Server, path: str, **body) -> list[dict]:
    """The chunks of a streamed answer, which ends with [DONE]."""
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=60) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response)
    assert last == "[DONE]"
    return chunks


def error_of(response: httpx.Response) -> tuple[int, dict]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error


# ---- Texts -----------------------------------------------------------------------------------------------------------

def test_texts_are_those_of_sample_py(tiny):
    answer = tiny.complete(model="tiny", prompt="Hé", max_tokens=40, n=3, seed=7, temperature=0.9, top_p=0.95, top_k=50)
    expected = expected_texts(tiny.run, "Hé", 3, max_new_tokens=40, sampling=Sampling(0.9, 50, 0.95, seed=7))
    assert [choice["text"] for choice in answer["choices"]] == expected and len(set(expected)) == 3
    assert answer["usage"]["prompt_tokens"] == 3


def test_token_ids_and_lists_of_prompts_continue_as_texts_do(tiny):
    settings = {"max_tokens": 9, "temperature": 0}
    choices = tiny.complete(prompt=["ab", "c"], **settings)["choices"]
    by_ids = tiny.complete(prompt=[[97, 98], [99]], **settings)["choices"]
    alone = tiny.complete(prompt=[97, 98], **settings)["choices"]
    assert [c["text"] for c in choices] == [c["text"] for c in by_ids] == \
        [expected_texts(tiny.run, p, max_new_tokens=9, sampling=Sampling(0.0))[0] for p in ("ab", "c")]
    assert alone == choices[:1] and [choice["index"] for choice in choices] == [0, 1]


def test_many_clients_at_once_get_what_each_gets_alone(tiny):
    bodies = [{"prompt": "x" * n, "max_tokens": 5 + n, "temperature": (0, 0.8, 1e-46)[n % 3], "seed": n % 2,
               "logprobs": n % 6} for n in range(1, 25)]
    alone = [tiny.complete(**body)["choices"] for body in bodies]
    together: dict[int, list] = {}
    threads = [threading.Thread(target=lambda i=i, body=body: together.update({i: tiny.complete(**body)["choices"]}))
               for i, body in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[c["text"] for c in together[i]] for i in range(24)] == [[c["text"] for c in one] for one in alone]


def test_an_echoed_prompt_is_scored_as_the_model_scores_it(tiny):
    model, _ = sample.load_model(tiny.run, device=torch.device("cpu"), dtype="float32", note=lambda text: None)
    choice = tiny.complete(prompt="Hello é", max_tokens=0, echo=True, logprobs=2)["choices"][0]
    tokens = list("Hello é".encode())
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0].double().log_softmax(dim=-1)
    assert (choice["text"], choice["finish_reason"]) == ("Hello é", "length")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [*"Hello ", "bytes:\\xc3", "bytes:\\xa9"] and logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx([expected[i, t].item() for i, t in enumerate(tokens[1:])],
                                                           abs=1e-5)
    assert [max(top.values()) for top in logprobs["top_logprobs"][1:]] == pytest.approx(
        expected[:-1].max(dim=-1).values.tolist(), abs=1e-5)
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_each_token_begins_where_its_offset_says(tiny):
    choice = tiny.complete(prompt="ab", max_tokens=30, echo=True, logprobs=0, seed=1)["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    whole = [i for i in range(1, len(tokens)) if len(tokens[i]) == 1 == len(tokens[i - 1])]  # no halves of characters
    assert len(whole) > 2 and [choice["text"][offsets[i]] for i in whole] == [tokens[i] for i in whole]


@pytest.mark.parametrize("stop", [None, ["never"], "found"])
def test_streamed_and_whole_answers_are_the_same(tiny, stop):
    body = {"prompt": "a", "max_tokens": 60, "seed": 3, "temperature": 0.9, "logprobs": 2, "n": 2}
    text = tiny.complete(**body)["choices"][0]["text"]
    body["stop"] = text[20:22] if stop == "found" else stop
    whole = tiny.complete(**body)
    chunks = streamed(tiny, "/v1/completions", **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for index, expected in enumerate(whole["choices"]):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in choices) == expected["text"]
        assert [t for c in choices for t in c["logprobs"]["tokens"]] == expected["logprobs"]["tokens"]
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [expected["finish_reason"]]
    if stop == "found":
        cut = text.index(body["stop"])
        assert whole["choices"][0]["text"] == text[:cut] and whole["choices"][0]["finish_reason"] == "stop"
        assert all(offset < max(cut, 1) for offset in whole["choices"][0]["logprobs"]["text_offset"])


def test_streaming_never_cuts_a_character(tiny):
    bias = {str(byte): 100 for byte in "😀".encode()} | {str(byte): 30 for byte in range(0x80, 0xC0)}
    chunks = streamed(tiny, "/v1/completions", prompt="a", max_tokens=40, seed=5, logit_bias=bias)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    whole = tiny.complete(prompt="a", max_tokens=40, seed=5, logit_bias=bias, logprobs=0)["choices"][0]
    data = b"".join(BYTES.spelling(int(token[-2:], 16)) for token in whole["logprobs"]["tokens"])
    assert "".join(pieces) == whole["text"] == data.decode(errors="replace")
    assert len(pieces) > 3


def test_a_text_may_fill_the_context_to_the_last_token(tiny):
    answer = tiny.complete(prompt=[97] * 64, max_tokens=1, temperature=0)
    assert answer["usage"] == {"prompt_tokens": 64, "completion_tokens": 1, "total_tokens": 65}
    answer = tiny.complete(prompt=[97] * 60, max_tokens=50, temperature=0, logit_bias={str(EOT): -100})
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"


def test_a_special_token_ends_a_text_where_it_is_a_stop_text(tiny):
    forced = {"prompt": "a", "max_tokens": 3, "temperature": 0, "logit_bias": {str(EOT): 100}, "ignore_eos": True}
    assert tiny.complete(**forced)["choices"][0]["finish_reason"] == "length"
    stopped = tiny.complete(**forced, stop=["never", "<|endoftext|>"])
    assert stopped["choices"][0] | {"logprobs": None} == {"index": 0, "text": "", "logprobs": None,
                                                          "finish_reason": "stop"}
    assert stopped["usage"]["completion_tokens"] == 1


# ---- Chats -----------------------------------------------------------------------------------------------------------

def test_a_chat_continues_its_template(tiny):
    messages = [{"role": "user", "content": "Hi<|endoftext|>"}]
    settings = {"max_tokens": 12, "temperature": 0}
    answer = tiny.post("/v1/chat/completions", {"messages": messages, "model": "tiny", **settings}).json()
    prompt = "User:\nHi<|endoftext|>\n\nAssistant:\n"
    continued = tiny.complete(prompt=prompt, **settings)["choices"][0]["text"]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": continued, "refusal": None}
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    chunks = streamed(tiny, "/v1/chat/completions", messages=messages, **settings)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == \
        continued


def test_a_chat_longer_than_the_context_is_cut_and_the_log_tells_how_much_but_not_of_what(tiny):
    def said(text: str) -> dict:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}

    with serving(tiny.run) as server:
        cut, short = (server.post("/v1/chat/completions", said(text)).json()
                      for text in ("secret" * 20, "cret" + "secret" * 5))
        _, log = server.end()
    assert cut["choices"] == short["choices"] and cut["usage"]["prompt_tokens"] == 53  # 53 + 12 = max_seq_len + 1
    note = "the conversation has 139 tokens, more than the context of 64: 86 were cut from its front"
    assert f"{cut['id']}: {note}" in log
    assert "secret" not in log and log.count("were cut") == 1
    config = (tiny.run / "config.toml").read_text()
    refusing = shutil.copytree(tiny.run, tiny.run.parent / "refusing")
    (refusing / "config.toml").write_text(config.replace('too_long = "cut"', 'too_long = "error"'))
    with serving(refusing) as server:
        status, error = error_of(server.post("/v1/chat/completions", said("secret" * 20)))
    assert (status, error["code"]) == (400, "context_length_exceeded") and "139 tokens" in error["message"]


def test_a_run_without_a_template_refuses_chats(slow):
    status, error = error_of(slow.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}))
    assert status == 400 and "chat_template.jinja" in error["message"]


# ---- Other routes ----------------------------------------------------------------------------------------------------

def test_models_are_listed_by_the_name_of_the_run(tiny):
    listed = httpx.get(tiny.url + "/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny"]
    assert httpx.get(tiny.url + "/v1/models/tiny").json() == listed["data"][0]
    assert error_of(httpx.get(tiny.url + "/v1/models/gpt-4"))[0] == 404


def test_the_page_is_one_file_that_may_load_nothing_from_elsewhere(tiny):
    response = httpx.get(tiny.url)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert re.findall(r"""(?:src|href)=(?!"data:)|https?://|@import|url\(""", response.text) == []


def test_the_tokenizer_is_served_as_vllm_serves_it(tiny):
    assert httpx.get(tiny.url + "/tokenizer_info").json() == {
        "eos_token": "<|endoftext|>", "bos_token": None, "chat_template": chat.DEFAULT_TEMPLATE}
    assert tiny.post("/tokenize", {"prompt": "é<|endoftext|>"}).json()["tokens"] == list("é<|endoftext|>".encode())
    assert tiny.post("/tokenize", {"prompt": "<|endoftext|>"}).json()["tokens"] == [EOT]
    assert tiny.post("/tokenize", {"prompt": "<|endoftext|>é", "parse_special": True, "add_special_tokens": False}
                     ).json() == {"tokens": [EOT, *"é".encode()], "count": 3, "max_model_len": 64}
    assert error_of(tiny.post("/tokenize", {"prompt": "a", "special": True}))[1]["param"] == "special"
    assert tiny.post("/detokenize", {"tokens": [97, EOT]}).json() == {"prompt": "a<|endoftext|>"}
    assert error_of(tiny.post("/detokenize", {"tokens": [257]}))[0] == 400


# ---- Refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, status, words", [
    (b"{", 400, "not valid JSON"), (b"", 400, "not valid JSON"), (b"[1]", 400, "should be a JSON object"),
    (b'"' + b"\xff" + b'"', 400, "not valid JSON"), (b"[" * 100_000, 400, "not valid JSON"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "a finite number"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    (b'{"prompt": "\\ud800", "model": "\\ud800"}', 404, "is not served here"),
    (b'{"prompt": "' + b"a" * 65 + b'"}', 400, "65 tokens, more than the model's context of 64"),
    (b" " * (serve.MAX_BODY_BYTES + 1), 413, "larger than")], ids=lambda v: repr(v)[:30])
def test_what_cannot_be_read_is_refused_in_openais_shape(tiny, content, status, words):
    told, error = error_of(httpx.post(tiny.url + "/v1/completions", content=content))
    assert told == status and words in error["message"]


def test_a_body_of_unknown_length_is_limited_too(tiny):
    def endless() -> Iterator[bytes]:
        for _ in range(serve.MAX_BODY_BYTES // 2 ** 16 + 2):
            yield b" " * 2 ** 16
    assert error_of(httpx.post(tiny.url + "/v1/completions", content=endless()))[0] == 413


def test_unknown_addresses_and_methods_are_refused_in_openais_shape(tiny):
    assert error_of(httpx.get(tiny.url + "/v1/engines"))[0] == 404
    assert error_of(httpx.get(tiny.url + "/v1/completions"))[0] == 405
    assert error_of(httpx.get(tiny.url + "/docs"))[0] == 404


def test_head_and_options_are_answered(tiny):
    for path in ("/", "/health", "/v1/models", "/v1/models/tiny", "/tokenizer_info"):
        head, get = httpx.head(tiny.url + path), httpx.get(tiny.url + path)
        assert (head.status_code, head.content) == (200, b"") and head.headers["content-type"] == \
            get.headers["content-type"]
        options = httpx.options(tiny.url + path)
        assert options.status_code == 200 and set(options.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert httpx.options(tiny.url + "/v1/completions").headers["allow"] == "POST, OPTIONS"
    assert error_of(httpx.options(tiny.url + "/v1/nothing"))[0] == 404
    assert "access-control-allow-origin" not in httpx.get(tiny.url, headers={"Origin": "https://a.example"}).headers


@contextlib.asynccontextmanager
async def in_process(model: GPT, **settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process."""
    loop = asyncio.get_running_loop()

    def deliver(parts: list) -> None:
        for row, part in parts:
            row.deliver(part)

    batcher = Batcher(Batch(model, BYTES, max_rows=8), lambda parts: loop.call_soon_threadsafe(deliver, parts),
                      max_waiting=64)
    app = serve.make_app(Served("tiny", model.config, BYTES, chat.DEFAULT_TEMPLATE), batcher, **settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        batcher.close(0.0)
        batcher.join()


NUMBERS = ("1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 300, "1e400", "1e308", "1e-46", "5e-324", "NaN", "Infinity",
           "-Infinity", "-0.0", "-1", "0")
FIELDS = ("prompt", "n", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "temperature", "top_p",
          "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
          "stop_token_ids", "stream_options", "best_of", "echo", "user", "model", "messages", "chat_template_kwargs",
          "tokens")


def test_no_number_and_no_nesting_makes_the_server_fail():
    nested = [left * depth + inner + right * depth for left, inner, right in (("[", "", "]"), ('{"a":', "1", "}"))
              for depth in (300, 900, 950, 980, 2000, 9000, 99_000)]

    async def ask_all() -> None:
        async with in_process(make_model(max_seq_len=64)) as client:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                body = '"messages": [{"role": "user", "content": "a"}]' if "chat" in path else '"prompt": "a"'
                for field in FIELDS:
                    for number in NUMBERS:
                        for value in (number, f"[{number}]", f'{{"1": {number}}}', f'{{"{number}": 1}}'):
                            content = f'{{{body}, "max_tokens": 2, "{field}": {value}}}' if "/v1" in path else \
                                f'{{"{field}": {value}}}'
                            response = await client.post(path, content=content)
                            assert response.status_code in (200, 400, 404), (path, content, response.text)
                for value in nested:
                    for field in ("prompt", "messages", "tokens", "user", "logit_bias"):
                        response = await client.post(path, content=f'{{{body}, "{field}": {value}}}')
                        assert response.status_code in (200, 400), (path, field, response.text)

    asyncio.run(ask_all())


def test_what_a_parser_of_unlimited_depth_read_is_refused(monkeypatch):
    nested = []
    for _ in range(5000):
        nested = [nested]
    monkeypatch.setattr(serve.json, "loads", lambda body: {"prompt": nested, "messages": nested, "tokens": nested})

    async def ask_all() -> None:
        async with in_process(make_model()) as client:
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                response = await client.post(path, content="{}")
                assert response.status_code == 400 and b"nested too deeply" in response.content

    asyncio.run(ask_all())


def test_a_request_whose_logits_are_not_finite_fails_alone():
    model = make_model(tie_embeddings=False)
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    bodies = [{"prompt": [n + 8, n], "max_tokens": 20, "seed": n, "logprobs": n % 3, "stream": n == 6}
              for n in range(8)]

    async def ask_all() -> tuple[list, list]:
        async with in_process(model) as client:
            async def ask(body: dict) -> httpx.Response:
                return await client.post("/v1/completions", json=body)
            together = await asyncio.gather(*map(ask, bodies))
            return together, [await ask(body) for body in bodies]

    together, alone = asyncio.run(ask_all())
    assert [response.status_code for response in together] == [200] * 7 + [500]
    assert error_of(together[7])[1]["message"].startswith("the model's logits are not finite")
    for one, other in list(zip(together, alone, strict=True))[:6]:
        assert [c["text"] for c in one.json()["choices"]] == [c["text"] for c in other.json()["choices"]]
    streamed = ["".join(re.findall('"text": "(.*?)", "logprobs"', one.text)) for one in (together[6], alone[6])]
    assert streamed[0] == streamed[1] != "" and together[6].text.endswith("[DONE]\n\n")


def test_pages_of_the_allowed_origins_may_read_answers_streams_and_errors(monkeypatch):
    ours, body = {"Origin": "https://a.example"}, {"prompt": "a", "max_tokens": 2}
    preflight = {"Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang"}

    async def ask_all() -> None:
        key = {"Authorization": "bearer s3cret"}
        async with in_process(make_model(), api_key="s3cret", allow_origins=("https://a.example",)) as client:
            told = await client.options("/v1/completions", headers=ours | preflight)  # a browser sends no key with it
            assert told.status_code == 200 and "POST" in told.headers["access-control-allow-methods"]
            assert {"authorization", "x-stainless-lang"} <= set(
                told.headers["access-control-allow-headers"].lower().split(", "))
            answers = [await client.post("/v1/completions", json=body | extra, headers=ours | sent)
                       for extra in ({}, {"stream": True}, {"n": 0}) for sent in (key, {})]
            monkeypatch.setattr(serve.openai_api, "parse", None)  # the server itself fails
            answers.append(await client.post("/v1/completions", json=body, headers=ours | key))
            assert [one.status_code for one in answers] == [200, 401] * 2 + [400, 401, 500]
            for one in (told, await client.get("/v1/nothing", headers=ours), *answers):
                assert one.headers["access-control-allow-origin"] == "https://a.example"
                assert "Origin" in one.headers["vary"]
            other = await client.get("/health", headers={"Origin": "https://b.example"})
            assert other.status_code == 200 and "access-control-allow-origin" not in other.headers
        async with in_process(make_model(), allow_origins=("*",)) as client:
            assert (await client.get("/health", headers=ours)).headers["access-control-allow-origin"] == "*"

    asyncio.run(ask_all())


def test_a_lone_surrogate_is_answered(tiny):
    response = httpx.post(tiny.url + "/v1/completions", content=b'{"prompt": "\\ud800", "echo": true, "max_tokens": 0}')
    assert response.json()["choices"][0]["text"] == "\ufffd"


# ---- Limits ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def endless(server: Server) -> Iterator[Iterator]:
    """A streamed text that runs for as long as the block; yields its events, one of which has come."""
    body = {"prompt": "a", "max_tokens": LONG, "stream": True, "logit_bias": {str(EOT): -100}}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
        arriving = events(response)
        next(arriving)
        yield arriving


def test_a_full_queue_answers_429_and_a_client_that_hangs_up_frees_its_place(slow):
    with endless(slow):
        body = {"prompt": ["b", "c"], "max_tokens": 2}
        hanging_up = threading.Thread(target=give_up, args=(slow, body))
        hanging_up.start()
        slow.wait_for(running=1, waiting=2)
        response = slow.post("/v1/completions", {"prompt": "d"})
        status, error = error_of(response)
        assert (status, error["code"], response.headers["retry-after"]) == (429, "queue_full", "1")
        hanging_up.join()
        slow.wait_for(running=1, waiting=0)  # the whole answer's client is gone
    slow.wait_for(running=0, waiting=0)  # and so is the streamed one's
    assert slow.complete(prompt="d", max_tokens=3)["usage"]["completion_tokens"] <= 3


def give_up(server: Server, body: dict) -> None:
    """Ask, and hang up before the answer."""
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=1.0)


def test_clients_that_hang_up_or_speak_no_http_free_their_places_and_leave_no_traceback(long_run):
    body = json.dumps({"prompt": "a", "max_tokens": LONG, "logit_bias": {str(EOT): -100}}).encode()
    streamed = body[:-1] + b', "stream": true}'
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    sent = [head % (b"/v1/completions", 1000) + body[:9], head % (b"/tokenize", 1000) + b"{", head[:30],
            head % (b"/v1/completions", len(body)) + body, head % (b"/v1/completions", len(streamed)) + streamed,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # a browser that was told https
            head % (b"/v1/completions", len(body) - 9) + body, head % (b"/v1/completions", -1) + body,
            head % (b"/v1/completions", int("9" * 400)) + body, b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000]
    with serving(long_run) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for content in sent:
            for wait, abort in ((0, False), (0, True), (0.1, False), (0.1, True)):
                with socket.create_connection(address) as client:
                    with contextlib.suppress(OSError):  # the server may be the one that hangs up
                        client.sendall(content)
                    time.sleep(wait)
                    if abort:  # with a reset
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.wait_for(running=0, waiting=0)
        assert server.complete(prompt="a", max_tokens=2)["usage"]["prompt_tokens"] == 1
        status, log = server.end()
    rest = [line for line in log.splitlines() if "Invalid HTTP request" not in line]
    assert status == 0 and rest[-2].startswith("serving") and rest[-1].startswith("stopping"), log


def test_more_texts_than_the_queue_holds_are_refused_for_good(slow):
    status, error = error_of(slow.post("/v1/completions", {"prompt": "a", "n": 3}))
    assert status == 400 and "more than the 2 texts" in error["message"]


def test_a_text_ends_at_the_time_limit_and_what_has_not_begun_by_then_fails(long_run):
    with serving(long_run, "--batch-size", "1", "--time-limit", "0.5") as server:
        body = {"prompt": "a", "max_tokens": LONG, "logit_bias": {str(EOT): -100}}
        answer = server.complete(**body)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 1 < answer["usage"]["completion_tokens"] < LONG
        response = server.post("/v1/completions", body | {"n": 2})
        status, error = error_of(response)
        assert status == 503 and "waited for too long" in error["message"] and "retry-after" in response.headers
        with httpx.stream("POST", server.url + "/v1/completions", json=body | {"n": 2, "stream": True}) as response:
            *_, failed = events(response)  # the status was sent before
        assert "waited for too long" in failed["error"]["message"]


def test_a_key_guards_the_api_and_the_log_tells_nothing(tiny):
    with serving(tiny.run, FLATGPT_API_KEY="s3cret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"},
                        {"Authorization": "Basic s3cret"}, {"Authorization": b"Bearer \xff"}):
            for path in ("/v1/models", "/tokenizer_info"):
                assert error_of(httpx.get(server.url + path, headers=headers))[0] == 401
            status, error = error_of(server.post("/v1/completions", {"prompt": "a"}, headers=headers))
            assert (status, error["code"]) == (401, "invalid_api_key")
        for scheme in ("bearer", "BEARER", "Bearer  "):
            assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"{scheme} s3cret"}).is_success
        good = {"Authorization": "Bearer s3cret"}
        assert server.post("/v1/completions", {"prompt": "a"}, headers=good).status_code == 200
        assert httpx.get(server.url).status_code == server.post("/v1/completions", {}, headers=good).status_code == 200
        server.post("/v1/completions", {"prompt": "very secret", "max_tokens": -1}, headers=good)
        assert server.health()["status"] == "ok"
        status, log = server.end(signal.SIGINT)
    assert status == 0 and "with a key" in log
    assert "s3cret" not in log and "very secret" not in log  # neither keys nor prompts are logged


@pytest.mark.parametrize(("arguments", "is_open"), [((), False), (("--host", "0.0.0.0"), True)])
def test_without_a_key_a_local_server_answers_no_page_whose_name_leads_to_it(tiny, arguments, is_open):
    """DNS rebinding: the browser sends the name of the page, and takes the answer for the page's own."""
    with serving(tiny.run, *arguments) if arguments else contextlib.nullcontext(tiny) as server:
        port = server.url.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        for name in ("localhost", "LOCALHOST", "app.localhost", "127.0.0.1", "[::1]", "192.168.1.7"):
            for host in (name, f"{name}:{port}"):
                assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200, host
        for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:80", "x@::1"):
            for path in ("/v1/models", "/tokenizer_info"):
                answer = httpx.get(url + path, headers={"Host": name})
                if is_open:
                    assert answer.status_code == 200
                    continue
                status, error = error_of(answer)
                assert (status, error["code"]) == (403, "wrong_host") and "set FLATGPT_API_KEY" in error["message"]
            status = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, headers={"Host": name}).status_code
            assert status == (200 if is_open else 403)


def test_with_a_key_a_local_server_answers_under_any_name():
    async def ask() -> list[int]:
        async with in_process(make_model(), is_local=True, api_key="k") as client:
            return [(await client.get("/v1/models", headers={"Host": "proxy.example"} | key)).status_code
                    for key in ({}, {"Authorization": "Bearer k"})]
    assert asyncio.run(ask()) == [401, 200]


@pytest.mark.parametrize("method", ["hidden", "logits"])
def test_a_device_that_answers_nothing_more_shows_in_health_and_other_errors_do_not(monkeypatch, method):
    model = make_model()
    errors = []
    own = getattr(model, method)

    def failing(*arguments, **settings):
        for error in errors:
            raise error
        return own(*arguments, **settings)
    monkeypatch.setattr(model, method, failing)

    async def ask() -> list[tuple]:
        seen = []
        async with in_process(model) as client:
            for error in (None, RuntimeError("no memory"), None, torch.AcceleratorError("CUDA error: illegal address")):
                errors[:] = [error] * (error is not None)
                answer = await client.post("/v1/completions", json={"prompt": "a"})
                health = await client.get("/health")
                seen.append((answer.status_code, health.status_code, health.json()["status"]))
        return seen
    assert asyncio.run(ask()) == [(200, 200, "ok"), (500, 200, "ok"), (200, 200, "ok"), (500, 503, "failed")]


# ---- Stopping --------------------------------------------------------------------------------------------------------

def test_a_signal_refuses_new_requests_ends_what_runs_and_exits_0(long_run):
    with serving(long_run) as server, endless(server) as arriving:
        server.process.send_signal(signal.SIGTERM)
        while server.health()["status"] != "stopping":
            time.sleep(0.005)
        status, error = error_of(server.post("/v1/completions", {"prompt": "b"}))
        assert status == 503 and "shutting down" in error["message"]
        started = time.monotonic()
        *_, last, done = arriving
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        assert time.monotonic() - started < serve.GRACE_S + 5
        _, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 0 and "Traceback" not in err


def test_a_text_that_ends_within_the_grace_is_not_cut(long_run):
    with serving(long_run) as server:
        body = {"prompt": "a", "max_tokens": 300, "stream": True, "logit_bias": {str(EOT): -100},
                "stream_options": {"include_usage": True}}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
            arriving = events(response)
            next(arriving)
            server.process.send_signal(signal.SIGINT)
            *_, usage, done = arriving
        assert usage["usage"]["completion_tokens"] == 300 and done == "[DONE]"
        assert server.process.wait(timeout=20) == 0


def test_a_server_whose_stderr_nobody_reads_serves_and_stops(long_run):
    with serving(long_run) as server:
        server.process.stderr.close()
        assert server.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] > 0
        server.process.send_signal(signal.SIGHUP)  # its terminal was closed
        assert server.process.wait(timeout=20) == 0


def test_a_second_signal_does_not_wait(long_run):
    with serving(long_run) as server, endless(server):
        server.process.send_signal(signal.SIGTERM)
        while server.health()["status"] != "stopping":
            time.sleep(0.005)
        started = time.monotonic()
        status, _ = server.end()
        assert status == 0 and time.monotonic() - started < serve.GRACE_S - 1


# ---- Command line ----------------------------------------------------------------------------------------------------

def test_a_port_in_use_is_one_line_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, str(ROOT / "serve.py"), str(tmp_path / "no run"), "--port", str(port)],
                              capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: port {port} of 127.0.0.1 cannot be listened on: another program has it; choose "
                           "another port with --port (0 = any free one)\n")


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(UserError, match="^serve.py needs the package uvicorn, which is not installed; pip install uv"):
        serve.main(["RUN"])


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "run 'nowhere' does not exist"), ([], "required: RUN"), (["R", "--port", "x"], "invalid int value"),
    (["R", "--port", "70000"], "--port 70000 should lie in 0 to 65535"),
    (["R", "--batch-size", "0"], "--batch-size: '0' should be"), (["R", "--queue", "0"], "--queue: '0' should be"),
    (["R", "--time-limit", "0"], "--time-limit 0.0 should be above 0"),
    (["R", "--allow-origin", "https://a.example/"], "--allow-origin 'https://a.example/' should be scheme://host"),
    (["R", "--allow-origin", "*", "a.example"], "--allow-origin 'a.example' should be"),
    (["R", "--host", "256.1.1.1.1"], "--host '256.1.1.1.1' is not an address"),
    (["R", "--host", "203.0.113.1"], "this machine does not have that address")], ids=" ".join)
def test_user_mistakes_are_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        serve.main([*arguments, *(["--port", "0"] if "--port" not in arguments else [])])
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["", " ", "a\n", "é"])
def test_a_key_that_no_client_can_send_is_refused(key, monkeypatch):
    monkeypatch.setenv("FLATGPT_API_KEY", key)
    with pytest.raises(UserError, match="FLATGPT_API_KEY should be"):
        serve.main(["RUN"])


def test_a_host_that_others_reach_is_warned_about_without_a_key(monkeypatch, capsys):
    monkeypatch.delenv("FLATGPT_API_KEY", raising=False)
    serve._api_key("127.0.0.1")
    assert capsys.readouterr().err == ""
    serve._api_key("0.0.0.0")
    assert "whoever reaches 0.0.0.0 may use the model; set FLATGPT_API_KEY" in capsys.readouterr().err


# ---- Other people's clients ------------------------------------------------------------------------------------------

def python_with(package: str, variable: str) -> str:
    """A Python that has the package: the one the variable names, or this one. Skips without one."""
    for python in filter(None, (os.environ.get(variable), sys.executable)):
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if subprocess.run([python, "-I", "-c", find]).returncode == 0:
            return python
    pytest.skip(f"{package} is not installed (pip install it, or name a Python that has it by {variable}): whether it "
                "works with the server stays unchecked")


def run_client(python: str, program: str, folder: Path, *arguments: str, timeout_s: float = 120) -> str:
    """stdout of a program, away from the checkout and the network."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FLATGPT_API_KEY")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([python, "-I", "-c", program, *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=timeout_s, env=environment | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


OPENAI_CLIENT = """
import json, sys
import openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
told = {"models": [model.id for model in client.models.list()], "model": client.models.retrieve("tiny").id}
settings = dict(model="tiny", prompt="Hello", max_tokens=8, temperature=0)
whole = client.completions.create(**settings, logprobs=2, echo=True)
told["text"], told["tokens"] = whole.choices[0].text, whole.choices[0].logprobs.tokens
told["usage"] = whole.usage.total_tokens
chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
told["streamed"] = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
told["streamed_usage"] = chunks[-1].usage.total_tokens
settings = dict(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=8, temperature=0)
whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
told["said"], told["logprobs"] = whole.choices[0].message.content, len(whole.choices[0].logprobs.content)
told["said_streamed"] = "".join(chunk.choices[0].delta.content or ""
                                for chunk in client.chat.completions.create(**settings, stream=True))
for name, call in {
        "BadRequestError": lambda: client.completions.create(model="tiny", prompt="a", max_tokens=-1),
        "NotFoundError": lambda: client.completions.create(model="gpt-4", prompt="a")}.items():
    try:
        call()
    except openai.APIStatusError as error:
        told[name] = [type(error).__name__, error.param]
print(json.dumps(told))
"""


def test_openais_client_works(tiny, tmp_path):
    python = python_with("openai", "FLATGPT_OPENAI_PYTHON")
    told = json.loads(run_client(python, OPENAI_CLIENT, tmp_path, tiny.url))
    text = expected_texts(tiny.run, "Hello", max_new_tokens=8, sampling=Sampling(0.0))[0]
    said = expected_texts(tiny.run, "User:\nHi\n\nAssistant:\n", max_new_tokens=8, sampling=Sampling(0.0))[0]
    assert told.pop("logprobs") == len(told["tokens"]) - 5 == 8
    assert told.pop("tokens")[:5] == list("Hello")
    assert told == {"models": ["tiny"], "model": "tiny", "text": "Hello" + text, "streamed": text, "usage": 13,
                    "streamed_usage": 13, "said": said, "said_streamed": said,
                    "BadRequestError": ["BadRequestError", "max_tokens"], "NotFoundError": ["NotFoundError", "model"]}


LM_EVAL = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
url, folder, batch_size, concurrent = sys.argv[1:]
results = lm_eval.simple_evaluate(
    "local-completions", tasks=["choices", "copying", "text"], batch_size=int(batch_size), log_samples=True,
    model_args={"base_url": url + "/v1/completions", "model": "tiny", "max_length": 64, "max_gen_toks": 8,
                "num_concurrent": int(concurrent), "max_retries": 1},
    task_manager=TaskManager(include_path=folder, include_defaults=False))
samples = {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in results["samples"].items()}
print(json.dumps({
    "results": results["results"],
    "choices": [[float(one[0][0]) for one in row["resps"]] for row in samples["choices"]],
    "is_greedy": [[one[0][1] in (True, "True") for one in row["resps"]] for row in samples["choices"]],
    "copying": [row["resps"][0][0] for row in samples["copying"]]}))
"""
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: "{{gold}}"
""",
    "copying": """
task: copying
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "text": """
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}


@pytest.mark.parametrize("batch_size, concurrent", [(4, 1), (1, 4)])
def test_lm_evaluation_harness_scores_as_the_model_does(tiny, tmp_path, batch_size, concurrent):
    python = python_with("lm_eval", "FLATGPT_LM_EVAL_PYTHON")
    model, _ = sample.load_model(tiny.run, device=torch.device("cpu"), dtype="float32", note=lambda text: None)
    best = chr(expected_logprobs(model, b"Q1: "[:4])[-1][:128].argmax())  # a choice that is the model's own
    documents = [{"question": "Q1:", "answers": [" " + best, " no", " maybé"], "gold": 1},
                 {"question": "What is longer than this?", "answers": [" A", " nothing", " é"], "gold": 0},
                 {"question": "", "answers": ["abc", "d"], "gold": 0}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(tmp_path / "data.jsonl")).lstrip())
    arguments = (tiny.url, str(tmp_path), str(batch_size), str(concurrent))
    told = json.loads(run_client(python, LM_EVAL, tmp_path, *arguments, timeout_s=300).splitlines()[-1])
    for row, document in enumerate(documents):
        context = [EOT] if not document["question"] else list(document["question"].encode())
        for column, choice in enumerate(document["answers"]):
            tokens = context + list(choice.encode())
            logprobs = expected_logprobs(model, tokens)[:-1]
            own = [logprobs[i, tokens[i + 1]].item() for i in range(len(context) - 1, len(tokens) - 1)]
            greedy = all(logprobs[i].argmax() == tokens[i + 1] for i in range(len(context) - 1, len(tokens) - 1))
            assert told["choices"][row][column] == pytest.approx(sum(own), abs=1e-4)
            assert told["is_greedy"][row][column] == greedy
    copies = [expected_texts(tiny.run, document["question"], max_new_tokens=8, sampling=Sampling(0.0),
                             stop=("\n", "<|endoftext|>"))[0] for document in documents]
    assert told["copying"] == copies
    nats = size = 0.0
    for text in (document["question"] for document in documents):
        tokens = [EOT, *text.encode()]
        logprobs = expected_logprobs(model, tokens)
        nats -= sum(logprobs[i, token].item() for i, token in enumerate(tokens[1:]))
        size += len(text.encode())
    assert told["results"]["text"]["bits_per_byte,none"] == pytest.approx(nats / size / 0.6931471805599453, abs=1e-4)


def expected_logprobs(model: GPT, tokens: list[int] | bytes) -> torch.Tensor:
    """(T, V) float64."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]))[0].double().log_softmax(dim=-1)
