"""bench.py serve: many clients of serve.py beside one."""

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import cli
import files
import sample
from benchmarks import measure
from config import MachineError, to_toml
from data.tokenizer import load_tokenizer
from model import GPT


def add_to(commands) -> None:
    parser = measure.command(commands, run, "serve.py with many clients beside one.", repeats=5,
                             config="gpt2_124m.toml", lengths=True)
    parser.add_argument("--clients", type=cli.count, default=8, metavar="N", help="default 8")
    parser.add_argument("--dtype", choices=sample.DTYPES, default="float32", help="default float32")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    """One server process with random weights; per repeat one client, then --clients at once, each with one request."""
    config = measure.complete_config(args)
    cli.require("bench.py serve", "fastapi", "uvicorn")
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as temporary:
        folder = Path(temporary)
        files.write_whole(folder / "config.toml", to_toml(config))
        load_tokenizer("bytes").save(folder / "tokenizer.json")  # it knows 257 ids, but texts are asked for by ids
        torch.manual_seed(0)
        weights = dict(GPT(config.model).named_parameters())
        checkpoint.save(folder, 1, tensors={"model": weights}, state={}, keep=1)
        prompts = np.random.default_rng(0).integers(config.model.vocab_size, size=(args.clients, args.prompt_tokens))
        with _running_server(folder, args.dtype) as address:
            rate = partial(_served_rate, address, prompts.tolist())
            rate(clients=1, new_tokens=4)  # warms up
            figures.take_turns({f"{n} at once": partial(rate, clients=n, new_tokens=args.new_tokens)
                                for n in (1, args.clients)}, args.repeats)
    figures.add_ratios(f"{args.clients} clients / 1", f"{args.clients} at once", "1 at once", "tokens/s")
    return {"model": f"{measure.label(args.config)}, random weights, {args.dtype}",
            "tokens/s": f"of all clients' {args.new_tokens} new tokens each after {args.prompt_tokens}, over HTTP"}


@contextlib.contextmanager
def _running_server(run_dir: Path, dtype: str) -> Iterator[str]:
    """Host and port of a serve.py process. Raises MachineError with its last line if it does not start."""
    command = [sys.executable, str(measure.CHECKOUT / "serve.py"), str(run_dir), "--port", "0", "--device", "cpu",
               "--dtype", dtype]
    environment = {key: value for key, value in os.environ.items() if key != "FLATGPT_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = ""
        try:
            while not (started := re.search(r"^serving .*?(127\.0\.0\.1:\d+)", said, re.MULTILINE)):
                if not (line := process.stderr.readline()):
                    raise MachineError(f"serve.py did not start: {measure.last_line(said)}")
                said += line
            yield started[1]
        finally:
            process.terminate()


def _served_rate(address: str, prompts: list[list[int]], *, clients: int, new_tokens: int) -> dict[str, float]:
    def ask(client: int) -> int:
        """New tokens of one request."""
        body = {"prompt": prompts[client], "max_tokens": new_tokens, "seed": client,
                "logit_bias": {"256": -100}}  # no end
        with contextlib.closing(http.client.HTTPConnection(address)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body))
            answer = json.loads(connection.getresponse().read())
        if "usage" not in answer:
            raise MachineError(f"the server refused: {answer['error']['message']}")
        return answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(clients) as pool:
        seconds, made = measure.seconds_of(lambda: sum(pool.map(ask, range(clients))))
    if made != clients * new_tokens:
        raise MachineError(f"the server made {made} tokens instead of {clients * new_tokens}")
    return {"tokens/s": made / seconds}
