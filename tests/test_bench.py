"""bench.py on tiny settings: that it runs, compares what it says it compares, and cleans up. No figure is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bench
import cli
from benchmarks import measure, sample
from config import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = """
[model]
n_layer = 2
n_head = 2
n_embd = 32
max_seq_len = 64
vocab_size = 300
[data]
tokenizer = "bytes"
[optim]
warmup_steps = 2
[train]
tokens_per_step = 128
micro_batch = 2
max_steps = 4
"""

# A checkout that looks like nanoGPT from outside: its files, its arguments, its printed lines and its weights' names.
# The model predicts every character with equal probability.
FAKE_TRAIN = """
import sys
import torch
torch.manual_seed(1337)
assert torch.initial_seed() == 7, "the seed was not replaced"
assert "--max_iters=5" in sys.argv, sys.argv
from model import GPT, GPTConfig
vocab_size = len(set(open("data/shakespeare_char/train.txt").read()))
model = GPT(GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=1, n_head=4, n_embd=8, bias=False, dropout=0.0))
for step in range(5):
    print(f"iter {step}: loss 4.0, time {10 * step + 1:.2f}ms, mfu -100.00%")
"""
FAKE_MODEL = """
import torch
from types import SimpleNamespace as GPTConfig

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C), "ln_f.weight": (C,)}
        for layer in range(config.n_layer):
            block = {"ln_1": (C,), "ln_2": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
                     "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
            shapes |= {f"h.{layer}.{name}.weight": shape for name, shape in block.items()}
        self.tensors = {f"transformer.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        self.tensors["lm_head.weight"] = self.tensors["transformer.wte.weight"]

    def state_dict(self):
        return self.tensors

    def generate(self, tokens, new_tokens, top_k):
        print("what a peer prints does not disturb the answers")
        return torch.cat((tokens, tokens.new_zeros(len(tokens), new_tokens)), dim=1)
"""
FAKE_PREPARE = """
from pathlib import Path
folder = Path(__file__).parent
folder.joinpath("train.txt").write_text(folder.joinpath("input.txt").read_text())
"""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch) -> None:
    monkeypatch.setattr(measure, "WATCHED_S", 0.0)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(CONFIG)
    return tmp_path / "tiny.toml"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], size=2000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path / "text.txt"


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    contents = {"train.py": FAKE_TRAIN, "model.py": FAKE_MODEL, "data/shakespeare_char/prepare.py": FAKE_PREPARE}
    for name in measure.NANOGPT_FILES:
        path = tmp_path / "peer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents.get(name, ""))
    return tmp_path / "peer"


def run(*argv: object, json_file: Path) -> dict[tuple[str, str], dict]:
    """(subject, quantity) -> row of the JSON that a benchmark writes."""
    bench.main([*map(str, argv), "--repeats", "1", "--json", str(json_file)])
    content = json.loads(json_file.read_text())
    assert content["command"].startswith(f"python bench.py {argv[0]} ") and content["setting"]["threads"] >= 1
    return {(row["subject"], row["quantity"]): row for row in content["figures"]}


# ---- Commands --------------------------------------------------------------------------------------------------------

def test_training_is_compared_with_nanogpt(config_file, text_file, peer, tmp_path):
    alphabet = len(set(text_file.read_text()))
    figures = run("train", "--config", config_file, "model.vocab_size=257", "--data", text_file, "--peer", peer,
                  "--peer-steps", 5, "--seeds", 7, json_file=tmp_path / "result.json")
    ours = "flatgpt tiny model.vocab_size=257"
    for quantity in ("ms/step", "tokens/s", "wall s", "peak MiB", "val nats/char"):
        assert figures[ours, quantity]["median"] > 0
    assert figures["nanoGPT", "ms/step"]["median"] == pytest.approx(31.0)  # of 21, 31, 41: two of five warm up
    assert figures["nanoGPT", "tokens/s"]["median"] == pytest.approx(12 * 64 / 0.031)
    assert figures["nanoGPT", "val nats/char"]["median"] == pytest.approx(math.log(alphabet), rel=1e-5)
    ratio = figures[ours, "wall s"]["median"] / figures["nanoGPT", "wall s"]["median"]
    assert figures[f"{ours} / nanoGPT", "ratio of wall s"]["median"] == pytest.approx(ratio)
    assert sorted(p.name for p in peer.iterdir()) == ["config", "configurator.py", "data", "model.py", "train.py"]


def test_a_peer_that_cannot_prepare_is_left_out_with_its_reason(config_file, text_file, peer, tmp_path):
    (peer / "data/shakespeare_char/prepare.py").write_text("raise ValueError('no luck')")
    figures = run("train", "--config", config_file, "model.vocab_size=257", "--data", text_file, "--peer", peer,
                  "--seeds", 7, json_file=tmp_path / "result.json")
    assert {subject for subject, _ in figures} == {"flatgpt tiny model.vocab_size=257"}
    left_out = json.loads((tmp_path / "result.json").read_text())["setting"]["left out"]
    assert list(left_out) == ["nanoGPT"] and left_out["nanoGPT"].endswith("failed: ValueError: no luck")


def test_a_peer_that_cannot_generate_is_left_out_and_ours_is_measured(config_file, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "BANDWIDTH_BYTES", 1_000_000)
    monkeypatch.setattr(cli, "is_installed", lambda package: False)
    words = ("sample", "--config", config_file, "--new-tokens", 2, "--prompt-tokens", 3, "--dtypes", "float32",
             "--peer", peer)
    of = "float32, batch 1, top-k 200"
    (peer / "model.py").write_text(FAKE_MODEL.replace("print(", "raise ValueError("))
    figures = run(*words, json_file=tmp_path / "first.json")
    assert figures[f"flatgpt, {of}", "bound %"] and not any("nanoGPT" in subject for subject, _ in figures)
    left_out = json.loads((tmp_path / "first.json").read_text())["setting"]["left out"]
    assert left_out[f"nanoGPT, {of}"].endswith("ValueError: what a peer prints does not disturb the answers")
    (peer / "model.py").write_text("raise ValueError('no luck')")
    assert run(*words, json_file=tmp_path / "second.json")[f"flatgpt, {of}", "bound %"]
    assert json.loads((tmp_path / "second.json").read_text())["setting"]["nanoGPT"].startswith("left out: a process")


def test_preparing_is_compared_with_tiktoken_and_loading_with_a_batch_that_is_there(config_file, text_file, tmp_path):
    figures = run("data", "--mb", 3, "--source", text_file, "--tokenizer", "bpe:270", "--workers", 2, "--steps", 2,
                  "--config", config_file, json_file=tmp_path / "result.json")
    assert figures["data.prepare", "MB/s"]["median"] > 0 and figures["data.prepare", "wall s"]["median"] > 0
    assert figures["data.prepare / tiktoken", "ratio of MB/s"]["median"] > 0
    assert figures["loader alone", "ms/batch"]["median"] > 0
    assert figures["with loader / with one batch", "ratio of ms/step"]["median"] > 0


def test_sampling_is_compared_with_peers_and_with_the_bound_of_memory(config_file, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "BANDWIDTH_BYTES", 1_000_000)
    figures = run("sample", "--config", config_file, "--new-tokens", 6, "--prompt-tokens", 3, "--dtypes", "float32",
                  "--peer", peer, json_file=tmp_path / "result.json")
    for choice in ("greedy", "top-k 200"):
        rate = figures[f"flatgpt, float32, batch 1, {choice}", "tokens/s"]["median"]
        bound = 1e9 * figures["memory", "GB/s"]["median"] / (4 * (300 * 32 + 2 * 12 * 32 * 32 + 2 * (9 + 4) * 32 + 64))
        share = figures[f"flatgpt, float32, batch 1, {choice}", "bound %"]["median"]
        assert share == pytest.approx(100 * rate / bound)  # head, matrices, biases and norms of 2 blocks, last norm
        if cli.is_installed("transformers"):
            assert figures[f"flatgpt / transformers, float32, batch 1, {choice}", "ratio of tokens/s"]["median"] > 0
    assert figures["flatgpt / nanoGPT, float32, batch 1, top-k 200", "ratio of first token ms"]["median"] > 0
    assert ("nanoGPT, float32, batch 1, greedy", "tokens/s") not in figures
    assert not (peer / "__pycache__").exists()


@pytest.mark.skipif(not all(map(cli.is_installed, ("fastapi", "uvicorn"))),
                    reason="fastapi or uvicorn is not installed: the benchmark of the server stays unchecked")
def test_many_clients_are_compared_with_one(config_file, tmp_path):
    figures = run("serve", "--config", config_file, "--new-tokens", 5, "--prompt-tokens", 3, "--clients", 3,
                  "--repeats", 2, json_file=tmp_path / "result.json")
    one, three = figures["1 at once", "tokens/s"], figures["3 at once", "tokens/s"]
    ratios = [many / alone for many, alone in zip(three["samples"], one["samples"], strict=True)]
    assert figures["3 clients / 1", "ratio of tokens/s"]["samples"] == ratios and min(ratios) > 0


def test_saving_is_compared_with_dd_and_leaves_nothing_behind(config_file, tmp_path):
    (tmp_path / "disk").mkdir()
    figures = run("checkpoint", "--config", config_file, "--dir", tmp_path / "disk", json_file=tmp_path / "result.json")
    for place in ("first", "second"):
        for quantity in ("save s", "save GB/s", "stall s", "beside s", "verify s", "load s", "resume s"):
            assert figures[f"checkpoint, {place}", quantity]["repeats"] == 1
        ours, theirs = (figures[f"{who}, {place}", "save s"]["median"] for who in ("checkpoint", "dd"))
        assert figures[f"checkpoint / dd, both {place}", "ratio of save s"]["samples"] == [ours / theirs]
        stall, beside = (figures[f"checkpoint, {place}", quantity]["median"] for quantity in ("stall s", "beside s"))
        assert 0 < stall < beside and figures[f"checkpoint / dd, both {place}", "ratio of resume s"]["median"] > 0
    assert list((tmp_path / "disk").iterdir()) == []


# ---- Mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("argv", "message"), [
    (["kernel"], "invalid choice: 'kernel'"),
    (["train", "--repeats", "0"], "'0' should be a whole number, at least 1"),
    (["train", "--seeds", "1.5"], "'1.5' should be a whole number, at least 0"),
    (["train", "--peer", "."], "argument --peer: '.' is no nanoGPT checkout: it has no train.py"),
    (["train", "--config", "nowhere.toml"], "config file 'nowhere.toml' does not exist"),
    (["train", "--config", "tiny.toml", "--config", "tiny.toml"], "names the same contender twice"),
    (["train", "--config", "tiny.toml", "--data", "nowhere.txt"], "source 'nowhere.txt' does not exist"),
    (["train", "--json", "nowhere/result.json"], "lies in no folder that exists"),
    (["data", "--tokenizer", "bytes"], "--tokenizer 'bytes' is none that tiktoken runs"),
    (["data", "--mb", "1"], "--mb 1 is too little text"),
    (["data", "--config", "tiny.toml", "train.tokens_per_step=100"], "tokens_per_step = 100 does not divide"),
    (["sample", "--config", "tiny.toml", "--new-tokens", "64"], "exceed model.max_seq_len = 64"),
    (["serve", "--config", "tiny.toml", "--new-tokens", "64"], "exceed model.max_seq_len = 64"),
    (["checkpoint", "--config", str(CHECKOUT / "configs" / "shakespeare.toml")], "add model.vocab_size=50257"),
    (["checkpoint", "--dir", "nowhere"], "--dir 'nowhere' is no folder"),
])
def test_mistakes_are_named_before_anything_is_measured(argv, message, config_file, monkeypatch):
    monkeypatch.chdir(config_file.parent)
    monkeypatch.setattr(measure.Figures, "take_turns", lambda *arguments: pytest.fail("it began"))
    with pytest.raises(UserError, match=message):
        bench.main(argv)


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, str(CHECKOUT / "bench.py"), "data", "--workers", "few"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: argument --workers: 'few' should be a whole number, at least 1; python bench.py "
                           "data --help lists the arguments\n")
