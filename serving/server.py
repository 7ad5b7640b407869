"""An OpenAI-compatible HTTP server for one model, and a page to try it: `python serve.py RUN`.

To try a model and to point existing clients at it: requests that wait together are generated together (batching.py).
For production, export the run with `convert.py to-hf` and serve that with vLLM. Here is HTTP only: limits, the key,
streaming, shutdown; what the fields of a request mean is in openai_api.py. Prompts are not logged.

    GET  /                         the page (page.html)      GET  /health            alive, and how busy
    POST /v1/completions           POST /v1/chat/completions  GET  /v1/models, /v1/models/NAME
    POST /tokenize, /detokenize    GET  /tokenizer_info       as vLLM has them; lm-evaluation-harness asks for them

HEAD is answered where GET is, OPTIONS at every address.
"""

import argparse
import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import cli
import devices
from cli import note
from config import UserError
from finetune.runs import read_run
from kernels.cpu import pack_for_decoding
from sample import DTYPES, build_model
from serving import openai_api
from serving.batching import Batch, Batcher, Closed, Part, Parts, QueueFull
from serving.openai_api import ApiError, Asked, Served

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from starlette.middleware.cors import CORSMiddleware

PAGE = Path(__file__).with_name("page.html")
KEY_VARIABLE = "FLATGPT_API_KEY"
MAX_BODY_BYTES = 4 * 2 ** 20  # 64 prompts of 1,024 token ids are 0.4 MB
BODY_TIMEOUT_S = 30.0  # for a client to send its request
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, or one might be closed as it is used again
GRACE_S = 5.0  # after a stop signal: texts that run may go on for so long
RETRY = {"Retry-After": "1"}  # seconds
OWN_HOST = re.compile(r"((.*\.)?localhost\.?|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]*)?", re.IGNORECASE)  # of a Host header
READING = ("GET", "HEAD")
# The page needs nothing from elsewhere, and gets nothing.
PAGE_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# ---- The application -------------------------------------------------------------------------------------------------

def make_app(served: Served, batcher: Batcher, *, api_key: str | None = None, is_local: bool = False,
             allow_origins: tuple[str, ...] = ()) -> "FastAPI | CORSMiddleware":
    """batcher must deliver in the event loop that runs the application. Browsers let the pages of allow_origins read
    the answers, those of "*" all pages. is_local: without a key, requests by another name than this machine's own are
    refused: a web page may let its name lead here (DNS rebinding), and browsers take the answers for its own."""
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")  # the scheme in any case: RFC 9110
        if api_key is not None and not (scheme.lower() == "bearer"
                                        and hmac.compare_digest(given.strip().encode(), api_key.encode())):
            raise ApiError(401, "the API key is missing or wrong; send it as the header Authorization: Bearer KEY",
                           code="invalid_api_key")
        host = request.headers.get("host", "localhost")
        if is_local and api_key is None and not OWN_HOST.fullmatch(host):
            raise ApiError(403, f"the request is for host {host[:100]!r}, and without a key this server answers only "
                           f"those for localhost or an IP address; use one, or set {KEY_VARIABLE}", code="wrong_host")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None,  # their pages load scripts from elsewhere
                  exception_handlers=dict.fromkeys((ApiError, HTTPException, ClientDisconnect, RecursionError,
                                                    Exception), as_error))
    router = APIRouter(dependencies=[Depends(check_key)])
    tokenizer = served.tokenizer

    @app.api_route("/", methods=READING)
    async def page() -> Response:
        return Response(PAGE.read_bytes(), headers={"Content-Security-Policy": PAGE_POLICY}, media_type="text/html")

    @app.api_route("/health", methods=READING)
    async def health() -> Response:
        status = "stopping" if batcher.is_closing else "failed" if batcher.batch.is_lost else "ok"
        state = {"status": status, "running": len(batcher.batch.running), "waiting": len(batcher.waiting)}
        return as_response(state, 200 if status == "ok" else 503)

    @router.api_route("/v1/models", methods=READING)
    async def models() -> Response:
        return as_response({"object": "list", "data": [served.as_json()]})

    @router.api_route("/v1/models/{name:path}", methods=READING)
    async def model(name: str) -> Response:
        if name != served.name:
            raise openai_api.no_such_model(name, served)
        return as_response(served.as_json())

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, served, batcher, is_chat=False)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(request, served, batcher, is_chat=True)

    @router.api_route("/tokenizer_info", methods=READING)
    async def tokenizer_info() -> Response:
        template = {} if served.template is None else {"chat_template": served.template}
        return as_response({"bos_token": None} | tokenizer.named | template)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        ids = await asyncio.to_thread(openai_api.tokenized, await read_object(request), served)
        return as_response({"tokens": ids, "count": len(ids), "max_model_len": served.config.max_seq_len})

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        ids = (await read_object(request)).get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
            raise openai_api.wrong("tokens", ids, f"a list of token ids below {tokenizer.vocab_size}")
        return as_response({"prompt": await asyncio.to_thread(tokenizer.decode, ids)})

    app.include_router(router)
    if not allow_origins:
        return app
    from starlette.middleware.cors import CORSMiddleware
    return CORSMiddleware(app, allow_origins=allow_origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",),
                          expose_headers=tuple(RETRY))  # around all of it, so that a page may read errors too


async def as_error(request: "Request", error: Exception) -> "Response":
    """Every error is OpenAI's error object."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    headers = None
    if isinstance(error, HTTPException):  # no such address or method
        headers = error.headers
        if request.method == "OPTIONS" and error.status_code == 405:
            return as_response({}, headers={"Allow": f"{headers['Allow']}, OPTIONS"})
        error = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    elif isinstance(error, ClientDisconnect):
        error = ApiError(499, "the client hung up before it had sent its request")  # nobody reads it
    elif isinstance(error, RecursionError):
        error = ApiError(400, "the request is nested too deeply", code="invalid_json")
    elif isinstance(error, ApiError):
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: RETRY, 503: RETRY}.get(error.status)
    else:
        error = ApiError(500, f"the server failed ({type(error).__name__}); its log says more")
    return as_response(error.as_json(), error.status, headers)


def as_response(content: dict, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
    from fastapi import Response
    # ASCII: a lone surrogate in a client's text has no UTF-8
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")


# ---- One request -----------------------------------------------------------------------------------------------------

class _Gone(Exception):
    """The client hung up."""


async def generate(request: "Request", served: Served, batcher: Batcher, *, is_chat: bool) -> "Response":
    """The answer to a request for texts, whole or streamed. Raises ApiError."""
    from fastapi.responses import Response, StreamingResponse
    body = await read_object(request)
    inbox: asyncio.Queue = asyncio.Queue()
    # in a thread: encoding megabytes takes a while, and others are being streamed to
    asked = await asyncio.to_thread(openai_api.parse, body, served,
                                    lambda number, part: inbox.put_nowait((number, part)), is_chat=is_chat)
    if cut := asked.prompts[0].cut:
        note(f"{asked.id}: the conversation has {len(asked.prompts[0].tokens) + cut:,} tokens, more than the context "
             f"of {served.config.max_seq_len:,}: {cut:,} were cut from its front")
    answers = answer_parts(request, asked, inbox, batcher)
    try:
        if not asked.stream:
            parts: list[list[Part]] = [[] for _ in asked.rows]
            async for number, part in answers:
                parts[number].append(part)
            return as_response(openai_api.answer(asked, [openai_api.merged(row) for row in parts]))
        first = await anext(answers)  # what cannot begin gets a status of its own
    except _Gone:
        return Response(status_code=499)  # nobody reads it
    return StreamingResponse(stream(asked, first, answers), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


async def read_object(request: "Request") -> dict:
    """The JSON object that the client sends. Raises ApiError."""
    too_large = ApiError(413, f"the request is larger than {MAX_BODY_BYTES} bytes; send it in several",
                         code="request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_TIMEOUT_S:g} s") from None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request should be a JSON object", code="invalid_json")
    return value


async def answer_parts(request: "Request", asked: Asked, inbox: asyncio.Queue,
                       batcher: Batcher) -> AsyncIterator[tuple[int, Part]]:
    """Queue the rows and yield (number of the row, part) as they come, until all have ended; whoever stops listening
    frees their places. Raises ApiError, or _Gone if the client hangs up."""
    try:
        batcher.submit(asked.rows)
    except QueueFull:
        raise ApiError(429, f"{len(batcher.waiting)} texts wait and the queue holds {batcher.max_waiting}; try again "
                       "later", code="queue_full") from None
    except Closed:
        raise ApiError(503, "the server is shutting down", code="shutting_down") from None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        inbox.put_nowait(None)

    watcher = asyncio.create_task(watch())
    running = set(range(len(asked.rows)))
    try:
        while running:
            item = await inbox.get()
            if item is None:
                raise _Gone
            number, part = item
            if part.finish == "dropped":
                raise ApiError(503, part.error, code="dropped")
            if part.finish == "error":
                raise ApiError(500, part.error, code="model_failed")
            if part.finish is not None:
                running.remove(number)
            yield number, part
    finally:
        watcher.cancel()
        if running:
            batcher.cancel([asked.rows[number] for number in running])


async def stream(asked: Asked, item: tuple[int, Part] | None,
                 answers: AsyncIterator[tuple[int, Part]]) -> AsyncIterator[str]:
    """Server-sent events: a chunk per part, of which item is the first, the usage if wanted, [DONE]."""
    def event(content: dict) -> str:
        return f"data: {json.dumps(content, allow_nan=False)}\n\n"

    made, begun = [0] * len(asked.rows), set()
    async with contextlib.aclosing(answers):  # also if the client hangs up
        try:
            while item is not None:
                number, part = item
                made[number] = part.made
                piece = openai_api.chunk(asked, number, part, is_first=number not in begun)
                if piece is not None:
                    begun.add(number)
                    yield event(piece)
                item = await anext(answers, None)
        except _Gone:
            return
        except ApiError as error:  # too late for a status
            yield event(error.as_json())
            return
    if asked.include_usage:
        yield event(openai_api.usage_chunk(asked, made))
    yield "data: [DONE]\n\n"


# ---- Running it ------------------------------------------------------------------------------------------------------

async def run(served: Served, batch: Batch, listener: socket.socket, *, max_waiting: int, **settings) -> None:
    """Serve until a stop signal (cli.py); then let running texts end for GRACE_S while new requests are refused.
    settings: make_app's."""
    import uvicorn
    loop = asyncio.get_running_loop()

    def hand_out(parts: Parts) -> None:
        for row, part in parts:
            row.deliver(part)

    batcher = Batcher(batch, lambda parts: loop.call_soon_threadsafe(hand_out, parts), max_waiting=max_waiting)
    app = make_app(served, batcher, **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off",
                                           server_header=False, timeout_graceful_shutdown=2,
                                           timeout_keep_alive=KEEP_ALIVE_S))
    server.capture_signals = contextlib.nullcontext  # uvicorn's way ends the process by the signal, not with 0
    stopping: set[asyncio.Task] = set()

    async def drain() -> None:
        await asyncio.to_thread(batcher.join)
        server.should_exit = True

    def stop() -> None:
        if stopping:  # a second signal does not wait
            server.force_exit = True
        batcher.close(0.0 if stopping else GRACE_S)
        note("stopping now" if stopping else f"stopping: texts that run may go on for {GRACE_S:g} s")
        stopping.add(asyncio.create_task(drain()))

    for signum in cli.stop_signals():
        loop.add_signal_handler(signum, stop)
    try:
        await server.serve(sockets=[listener])
    finally:
        batcher.close(0.0)
        await asyncio.to_thread(batcher.join)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; nobody can connect before it listens. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host!r} is not an address of this machine; 127.0.0.1 is for this machine alone, "
                        "0.0.0.0 for all that reach it") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        ways_out = {errno.EADDRINUSE: "another program has it; choose another port with --port (0 = any free one)",
                    errno.EACCES: "ports below 1024 are not for everyone; choose another with --port",
                    errno.EADDRNOTAVAIL: "this machine does not have that address; choose another with --host"}
        why = ways_out.get(error.errno, error.strerror)
        raise UserError(f"port {port} of {host} cannot be listened on: {why}") from None
    return listener


# ---- Command line ----------------------------------------------------------------------------------------------------

def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python serve.py", description="Serve a trained model with OpenAI's API, and a page to "
                        "try it.", epilog=f"With {KEY_VARIABLE} set, clients must send it as their API key.")
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="default 127.0.0.1: this machine alone; 0.0.0.0: all that reach it")
    add("--port", type=int, default=8000, metavar="N", help="default 8000; 0 = any free one")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", default="float32", choices=DTYPES,
        help="of weights and matmuls; default float32; bfloat16 is about twice as fast where native")
    add("--batch-size", type=cli.count, default=16, metavar="N",
        help="texts generated at a time, each with a context of cache; default 16")
    add("--queue", type=cli.count, default=256, metavar="N",
        help="texts that may wait, and that one request may ask for; default 256")
    add("--time-limit", type=float, default=600.0, metavar="SECONDS",
        help="a text that takes longer ends there, as at its max_tokens; default 600")
    add("--allow-origin", nargs="+", action="extend", default=[], metavar="ORIGIN",
        help="web pages that may use the API from a browser, such as https://example.org; * = all; default none but "
        "the server's own")
    args = parser.parse_args(argv)
    for origin in args.allow_origin:
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UserError(f"--allow-origin {origin!r} should be scheme://host[:port] without a path, as "
                            "https://example.org, or *")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} should lie in 0 to 65535")
    if not args.time_limit > 0:
        raise UserError(f"--time-limit {args.time_limit} should be above 0 seconds")
    return args


def _api_key(host: str) -> str | None:
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and (not key.strip() or key != key.strip() or not key.isascii()):
        raise UserError(f"{KEY_VARIABLE} should be ASCII characters without blanks around them; unset it to serve "
                        "without a key")
    if key is None and not _is_local(host):
        note(f"warning: whoever reaches {host} may use the model; set {KEY_VARIABLE} to ask for a key")
    return key


def _is_local(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str]) -> None:
    args = _parse(argv)
    cli.require("serve.py", "fastapi", "uvicorn")
    api_key = _api_key(args.host)
    with listen(args.host, args.port) as listener:
        device, _ = devices.choose_device(args.device, option="--device ")
        saved = read_run(args.run, note)
        model = build_model(saved, device=device, dtype=args.dtype, note=note)
        note(pack_for_decoding(model))
        served = Served(saved.dir.name, model.config, saved.tokenizer, saved.chat_template, saved.config.data.too_long,
                        max_rows=args.queue, time_limit_s=args.time_limit, ends=saved.end_ids)
        batch = Batch(model, saved.tokenizer, max_rows=args.batch_size)
        listener.listen(1024)
        host = f"[{args.host}]" if ":" in args.host else args.host
        note(f"serving {served.name!r}{'' if served.template is None else ' with chat'} at http://{host}:"
             f"{listener.getsockname()[1]} (API under /v1{', with a key' if api_key else ''}); Ctrl-C stops")
        asyncio.run(run(served, batch, listener, max_waiting=args.queue, api_key=api_key,
                        is_local=_is_local(args.host), allow_origins=tuple(args.allow_origin)))
