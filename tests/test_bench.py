"""bench.py on tiny settings: that it runs, compares what it says it compares, and cleans up. No figure is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bench
from config import MachineError, ModelConfig, UserError
from data.tokenizer import load_tokenizer
from model import GPT

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
    for name in bench.NANOGPT_FILES:
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


# ----------------------------------------------------------------------------------------------------------------------
# Figures

def test_figures_have_medians_and_spreads_and_ratios_are_paired_by_repeat():
    figures = bench.Figures()
    for ours, theirs in ((1.0, 2.0), (2.0, 8.0), (30.0, 30.0)):
        figures.add("ours", {"wall s": ours, "tokens/s": 1234567.0})
        figures.add("peer", {"wall s": theirs})
    figures.add_ratios("ours / peer", "ours", "peer", ("wall s", "tokens/s"))
    rows = {(row["subject"], row["quantity"]): row for row in figures.rows()}
    assert rows["ours", "wall s"]["median"] == 2.0 and rows["ours", "wall s"]["repeats"] == 3
    assert rows["ours", "wall s"]["p10"] == pytest.approx(1.2)  # a fifth of the way from the first to the second
    assert rows["ours / peer", "ratio of wall s"]["samples"] == [0.5, 0.25, 1.0]
    assert ("ours / peer", "ratio of tokens/s") not in rows  # the peer has none
    assert figures.table() == "\n".join([
        "median (p10-p90) of 3 repeats",
        "",
        "            wall s                         tokens/s",
        "ours  2 (1.2-24.4)  1,234,567 (1,234,567-1,234,567)",
        "",
        "            wall s",
        "peer  8 (3.2-25.6)",
        "",
        "             ratio of wall s",
        "ours / peer    0.5 (0.3-0.9)"])


def test_contenders_take_turns_and_begin_in_turn():
    calls = []
    contenders = {name: lambda repeat, name=name: calls.append((repeat, name)) or {"s": 1.0} for name in "ab"}
    figures = bench.Figures()
    bench.take_turns(contenders, 2, figures)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert figures.samples == {("a", "s"): [1.0, 1.0], ("b", "s"): [1.0, 1.0]}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    bench.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        bench.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(MachineError, match="cannot be written"):
        bench.write_json(tmp_path, {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_cpu_time_of_others_is_what_is_busy_and_not_ours(monkeypatch):
    snapshots = iter([(100.0, 1000.0, 50.0), (110.0, 1020.0, 54.0)])  # busy, busy or idle, ours
    monkeypatch.setattr(bench.OthersCpu, "_now", lambda self: next(snapshots))
    assert bench.OthersCpu().percent() == 30.0
    monkeypatch.setattr(bench.OthersCpu, "_now", lambda self: None)
    assert bench.OthersCpu().percent() is None


# ----------------------------------------------------------------------------------------------------------------------
# Processes

def test_the_peak_memory_of_a_process_is_its_own(tmp_path):
    done = bench.run_to_end([sys.executable, "-c", "print('done')"], cwd=tmp_path)
    assert done.output == "done\n" and done.seconds > 0
    assert done.peak_bytes < 100 * 2 ** 20  # this process, with torch in it, has more


def test_a_process_that_fails_is_reported_with_its_last_line(tmp_path):
    with pytest.raises(MachineError, match="failed: ValueError: no luck"):
        bench.run_to_end([sys.executable, "-c", "raise ValueError('no luck')"], cwd=tmp_path)
    with bench.Worker("raise ValueError('no luck')", cwd=tmp_path) as worker:
        with pytest.raises(MachineError, match="ended early: ValueError: no luck"):
            worker.receive()


# ----------------------------------------------------------------------------------------------------------------------
# Text

def test_texts_are_repeated_and_shared_out_evenly():
    texts = bench.repeated(["aaaa", "é"], size=11)
    assert texts == ["aaaa", "é", "aaaa", "é"]  # 4 + 2 bytes, twice
    shares = bench.shared_out(["x" * n for n in (1, 2, 3, 4, 10)], 2)
    assert sorted(sum(map(len, share)) for share in shares) == [10, 10]


def test_a_text_is_read_as_nanogpt_reads_it_and_documents_up_to_a_limit(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert bench.read_text(str(tmp_path / "dos.txt")) == "one\ntwo\n"
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert bench.read_documents(str(tmp_path / "rows.jsonl"), limit_bytes=5) == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        bench.read_documents(str(tmp_path / "rows.jsonl"), limit_bytes=5)


# ----------------------------------------------------------------------------------------------------------------------
# Training

def nanogpt_like_weights(*, n_layer: int, C: int, V: int, T: int, bias: bool) -> dict[str, Tensor]:
    """Random weights, all of a size that matters, by the names and shapes of nanoGPT's state_dict."""
    linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,)}
    for layer in range(n_layer):
        for name, shape in {"ln_1": (C,), "ln_2": (C,), **linear}.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()
                   if not name.startswith(("wte", "wpe"))}
    generator = torch.Generator().manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def nanogpt_like_logits(weights: dict[str, Tensor], tokens: Tensor, *, n_layer: int, n_head: int) -> Tensor:
    """GPT-2's forward pass with the erf GELU, from the paper's equations, in float64. tokens (B, T) -> (B, T, V)."""
    w = {name.removeprefix("transformer."): t.double() for name, t in weights.items()}
    B, T = tokens.shape
    C = w["wte.weight"].shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(n_layer):
        h = f"h.{layer}"
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1))
        scores = q @ k.mT / math.sqrt(C // n_head)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(out, f"{h}.attn.c_proj")
        hidden = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize(("V", "bias"), [(65, False), (1030, True)])  # from 1,024 up our table is padded
def test_nanogpts_weights_give_its_logits_in_our_model(V, bias):
    weights = nanogpt_like_weights(n_layer=2, C=24, V=V, T=15, bias=bias)
    model = bench.gpt_from_nanogpt(weights, n_head=3)
    tokens = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = nanogpt_like_logits(weights, tokens, n_layer=2, n_head=3)
    assert not model.training
    with torch.no_grad():
        logits = model(tokens).double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)  # float32, values up to about 10


def test_loss_per_character_is_that_of_all_characters_but_the_first():
    text = "to be or not to be, " * 11
    alphabet = sorted(set(text))
    ids, token_bytes = bench.encode_characters(text, alphabet)
    assert "".join(alphabet[i] for i in ids) == text and token_bytes.tolist() == [1] * len(alphabet)
    weights = nanogpt_like_weights(n_layer=1, C=16, V=len(alphabet), T=64, bias=False)
    nats = []
    for start in range(0, len(ids) - 1, 64):  # windows of 64 that do not overlap, the last one short
        window = torch.from_numpy(ids[start:start + 65])
        logits = nanogpt_like_logits(weights, window[None, :-1], n_layer=1, n_head=2)
        nats.append(F.cross_entropy(logits[0], window[1:], reduction="sum").item())
    loss = bench.nats_per_character(bench.gpt_from_nanogpt(weights, n_head=2), ids, token_bytes, text)
    assert loss == pytest.approx(sum(nats) / (len(text) - 1), rel=1e-5)  # float32


def test_a_character_of_two_bytes_counts_once():
    text = "é" * 200
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=256, max_seq_len=16))
    torch.nn.init.zeros_(model.wte.weight)  # every byte is as likely as any other: ln 256 nats, two bytes a character
    loss = bench.nats_per_character(model, np.frombuffer(text.encode(), dtype=np.uint8), np.ones(256, np.int32), text)
    assert loss == pytest.approx(2 * math.log(256), rel=1e-5)


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


# ----------------------------------------------------------------------------------------------------------------------
# The other benchmarks

def test_preparing_is_compared_with_tiktoken_and_loading_with_a_batch_that_is_there(config_file, text_file, tmp_path):
    figures = run("data", "--mb", 3, "--source", text_file, "--tokenizer", "bpe:270", "--workers", 2, "--steps", 2,
                  "--config", config_file, json_file=tmp_path / "result.json")
    assert figures["data.prepare", "MB/s"]["median"] > 0 and figures["data.prepare", "wall s"]["median"] > 0
    assert figures["data.prepare / tiktoken", "ratio of MB/s"]["median"] > 0
    assert figures["loader alone", "ms/batch"]["median"] > 0
    assert figures["with loader / with one batch", "ratio of ms/step"]["median"] > 0


def test_both_sides_of_the_data_benchmark_make_the_same_tokens(tmp_path):
    texts = ["the cat sat on a mat", "naïve café, 123 don't"]
    name, description = bench._tokenizer_for_both("bpe:262", texts, tmp_path)
    (tmp_path / "encoding.json").write_text(json.dumps(description))
    bench.write_jsonl(tmp_path / "part.jsonl", texts)
    expected = sum(len(load_tokenizer(name).encode(text)) for text in texts)
    with bench.Worker(bench.TIKTOKEN_WORKER, str(tmp_path / "part.jsonl"), str(tmp_path / "encoding.json"),
                      cwd=tmp_path) as worker:
        assert worker.receive() == {} and worker.ask(action="load") == {}
        assert worker.ask(action="encode") == {"tokens": expected}


def test_sampling_is_compared_with_peers_and_with_the_bound_of_memory(config_file, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 1_000_000)
    figures = run("sample", "--config", config_file, "--new-tokens", 6, "--prompt-tokens", 3, "--dtypes", "float32",
                  "--peer", peer, json_file=tmp_path / "result.json")
    for choice in ("greedy", "top-k 200"):
        rate = figures[f"flatgpt, float32, batch 1, {choice}", "tokens/s"]["median"]
        bound = 1e9 * figures["memory", "GB/s"]["median"] / (4 * (300 * 32 + 2 * 12 * 32 * 32 + 2 * (9 + 4) * 32 + 64))
        share = figures[f"flatgpt, float32, batch 1, {choice}", "bound %"]["median"]
        assert share == pytest.approx(100 * rate / bound)  # head, matrices, biases and norms of 2 blocks, last norm
        if bench.importlib.util.find_spec("transformers"):
            assert figures[f"flatgpt / transformers, float32, batch 1, {choice}", "ratio of tokens/s"]["median"] > 0
    assert figures["flatgpt / nanoGPT, float32, batch 1, top-k 200", "ratio of first token ms"]["median"] > 0
    assert ("nanoGPT, float32, batch 1, greedy", "tokens/s") not in figures
    assert not (peer / "__pycache__").exists()


@pytest.mark.parametrize("op", bench.kernels.OPS)
def test_an_operation_is_compared_with_pytorch_and_the_roofline(op, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.bench_kernels, "seconds_per_call", lambda work, device: (work(), 0.5)[1])
    monkeypatch.setattr(bench.bench_kernels, "TABLE_ROWS", 384)
    monkeypatch.setattr(bench.bench_kernels, "VOCAB_SIZE", 300)
    bench.main(["kernels", "--device", "cpu", "--ops", op, "--rows", "9", "--repeats", "1", "--json",
                str(tmp_path / "ops.json")])
    rows = {(row["subject"], row["quantity"]): row["median"]
            for row in json.loads((tmp_path / "ops.json").read_text())["figures"]}
    if op == "linear_cross_entropy":
        label = "linear_cross_entropy 9 x 768 x 384"
        assert rows[f"reference: {label}", "TFLOP/s"] == 6 * 9 * 768 * 384 / 1e12 / 0.5  # three matmuls in 0.5 s
        assert rows[f"reference: {label} / PyTorch", "ratio of forward + backward ms"] == 1.0
    elif op == "attention":
        forward = rows["reference: attention causal 1 x 9 x 12 x 64", "forward TFLOP/s"]
        assert forward == 2 * 2 * 64 * 12 * (9 * 10 / 2) / 1e12 / 0.5  # two matmuls of the 45 pairs under the diagonal
        assert rows["reference: attention causal 1 x 9 x 12 x 64", "backward TFLOP/s"] == pytest.approx(2.5 * forward)
        alone = rows["reference: attention window 1 1 x 9 x 12 x 64", "forward TFLOP/s"]
        assert alone == pytest.approx(forward * 9 / 45)  # each query sees itself alone
    else:
        for label, tensors in ((f"{op} 9 x 768", 2), (f"{op} + residual 9 x 768", 4)):  # read or written forward
            assert rows[f"PyTorch: {label}", "forward GB/s"] == tensors * 9 * 768 * 4 / 1e9 / 0.5
        assert rows[f"reference: {op} 9 x 768 / copy", "ratio of forward GB/s"] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the measure of peak memory is unchecked here")
def test_the_growth_of_memory_is_that_of_the_work_alone():
    held = torch.ones(2 ** 24)  # 64 MiB, before
    growth = bench.bench_kernels.peak_growth_bytes(lambda: torch.ones(2 ** 23).sum(), torch.device("cpu"))
    assert held.sum() == 2 ** 24 and 30 <= growth / 2 ** 20 < 48  # 32, give or take what the process frees meanwhile


@pytest.mark.skipif(not all(map(bench.importlib.util.find_spec, ("fastapi", "uvicorn"))),
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
    for quantity in ("save s", "save GB/s", "verify s", "load s"):
        assert figures["checkpoint", quantity]["median"] > 0
    assert figures["checkpoint / dd", "ratio of save s"]["median"] > 0
    assert list((tmp_path / "disk").iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize(("argv", "message"), [
    (["kernel"], "invalid choice: 'kernel'"),
    (["train", "--repeats", "0"], "'0' should be at least 1"),
    (["train", "--seeds", "1.5"], "'1.5' should be a whole number"),
    (["train", "--peer", "."], "--peer '.' is no nanoGPT checkout, it has no train.py"),
    (["train", "--config", "nowhere.toml"], "config file 'nowhere.toml' does not exist"),
    (["train", "--config", "tiny.toml", "--config", "tiny.toml"], "names the same contender twice"),
    (["train", "--config", "tiny.toml", "--data", "nowhere.txt"], "source 'nowhere.txt' does not exist"),
    (["train", "--json", "nowhere/result.json"], "lies in a folder that does not exist"),
    (["data", "--tokenizer", "bytes"], "--tokenizer 'bytes' is none that tiktoken runs"),
    (["data", "--mb", "1"], "--mb 1 is too little text"),
    (["sample", "--config", "tiny.toml", "--new-tokens", "64"], "exceed model.max_seq_len = 64"),
    (["serve", "--config", "tiny.toml", "--new-tokens", "64"], "exceed model.max_seq_len = 64"),
    (["checkpoint", "--config", str(CHECKOUT / "configs" / "shakespeare.toml")], "add model.vocab_size=50257"),
    (["checkpoint", "--dir", "nowhere"], "--dir 'nowhere' is no folder"),
])
def test_mistakes_are_named_before_anything_is_measured(argv, message, config_file, monkeypatch):
    monkeypatch.chdir(config_file.parent)
    monkeypatch.setattr(bench, "take_turns", lambda *arguments: pytest.fail("it began"))
    with pytest.raises(UserError, match=message):
        bench.main(argv)


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, str(CHECKOUT / "bench.py"), "data", "--workers", "few"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: argument --workers: 'few' should be a whole number; python bench.py data --help "
                           "lists the arguments\n")
