"""train.shard on real ranks over gloo: the numbers of one process or of DDP, whatever is sharded, resumed or broken."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import checkpoint
from tests.test_train import CONFIG, assert_same_bits, losses, rows, run
from tests.test_train_processes import CHECKOUT, TORCHRUN, finish

# Uneven rows: 36, 60 and 257 go into neither 2 x 2 nor 3 equal parts; some ranks hold none of a norm's 12.
MODEL = """
[model]
n_layer = 2
n_head = 4
n_kv_head = 2
head_dim = 12
n_embd = 36
max_seq_len = 16
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
qk_norm = true
bias = false
"""
KNOBS = ["optim.name=muon", "train.tokens_per_step=192", "train.micro_batch=3", "train.eval_every=4",
         "train.sample_every=5"]
GPT2 = ["optim.name=adamw", "model.norm=layernorm", "model.position=learned", "model.mlp=gelu", "model.bias=true",
        "model.qk_norm=false", "model.tie_embeddings=false"]
VARIANTS = {  # name -> knobs of a run on two ranks, both ways
    "modern": ["train.max_steps=12"], "gpt2-checkpointing": [*GPT2, "train.activation_checkpointing=true"],
    "documents": ["data.document_mask=true"], "dropout": ["model.dropout=0.1", "train.micro_batch=2"],
    "padded-vocabulary": ["model.vocab_size=1030"], "compiled": ["train.compile=true"],
    "bfloat16": ["train.dtype=bfloat16"], "float16": ["train.dtype=float16"],
    "lora": ["train.init_from=base", "lora.rank=4", "lora.dropout=0.1", "optim.name=adamw", "train.micro_batch=2"],
    "init": ["train.init_from=base"]}
# Of losses, and of gradient norms relative to them. float32: sums in another order.
BOUNDS = {"bfloat16": (5e-4, 2e-3), "float16": (5e-4, 2e-3)}
FLOAT32 = 3e-6, 1e-5

# Runs train() once per list of words, in one process group: starting processes costs more than these runs.
RUNS = """
import contextlib, json, sys
sys.path.insert(0, {checkout!r})
import torch
import config as configuration, distributed, optim, train

class NoSignal:
    signal = None
    def __call__(self):
        return False

real_compile = torch.compile  # also of Module.compile(); by a compiler that takes no minute
torch.compile = lambda model, **options: real_compile(model, backend="aot_eager", **options)
world = distributed.read_world()
with distributed.process_group(world, torch.device("cpu"), 60.0):
    distributed.process_group = lambda *arguments: contextlib.nullcontext()
    for words in json.load(open(sys.argv[1])):
        config, given = configuration.parse_arguments(words)
        train.train(config, given, world=world, stop=NoSignal())

    # Muon's matrices shared over ranks, as DDP and as FSDP2 hold them: seven go into no number of ranks here
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    matrices = torch.randn(7, 22, 12, generator=torch.Generator().manual_seed(0))
    work = lambda some: optim.orthogonalise(some, dtype=torch.float32)
    assert torch.equal(optim.shared_over_ranks(work, matrices, matrices[0], world), work(matrices))
    weight = distribute_tensor(matrices[0], init_device_mesh("cpu", (world.size,)), [Shard(0)])
    start, stop = distributed.local_rows(weight)
    found = optim.shared_over_ranks(work, matrices[:, start:stop], weight, world)
    assert torch.equal(found, work(matrices)[:, start:stop])
"""


def run_all(ranks: int, runs: list[list[str]]) -> str:
    Path("runs.py").write_text(RUNS.format(checkout=str(CHECKOUT)))
    Path("runs.json").write_text(json.dumps(runs))
    command = [*TORCHRUN[:-1], f"--nproc_per_node={ranks}", "runs.py", "runs.json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output = finish(process, 600)
    assert process.returncode == 0, output
    return output


def words(name: str, *more: str) -> list[str]:
    config = "of_parent.toml" if "train.init_from=base" in more else "small.toml"
    return [config, "data.source=text.txt", *KNOBS, *more, f"train.out_dir={name}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of this file, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shard"))
        text = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], size=1500)
        Path("text.txt").write_text(" ".join(text))
        rest = CONFIG[CONFIG.index("[data]"):]
        Path("small.toml").write_text(MODEL + rest)
        Path("of_parent.toml").write_text(rest)
        run(words("base")[:-1], "base", "train.max_steps=3")
        run(words("one")[:-1], "one")
        patch.setenv("OMP_NUM_THREADS", "1")
        run_all(4, [words("hsdp", "train.shard=2"), words("moved", "train.shard=all", "train.max_steps=4")])
        run_all(3, [words("three", "train.shard=all")])
        pairs = [words(f"{name}-{way}", "train.max_steps=8", *knobs, *more) for name, knobs in VARIANTS.items()
                 for way, more in (("ddp", []), ("sharded", ["train.shard=all"]))]
        run_all(2, [words("moved", "train.shard=2", "train.max_steps=8"), *pairs,
                    words("resumed", "train.shard=2", "train.max_steps=5"), words("resumed", "train.shard=2")])
        run(words("moved")[:-1], "moved")
        yield Path.cwd()


def assert_same_numbers(one: Path, other: Path, bounds: tuple[float, float] = FLOAT32) -> None:
    """Losses, gradient norms and validation losses of the steps that both made."""
    absolute, relative = bounds
    for kind, field, atol, rtol in (("train", "loss", absolute, 0), ("val", "loss", absolute, 0),
                                    ("train", "grad_norm", 0, relative)):
        left, right = ({row["step"]: row[field] for row in rows(path, kind)} for path in (one, other))
        steps = sorted(left.keys() & right.keys())
        assert len(steps) == min(len(left), len(right)) >= 2
        np.testing.assert_allclose([right[step] for step in steps], [left[step] for step in steps], rtol, atol)


@pytest.mark.parametrize("name", ["hsdp", "three", "moved", "modern-ddp", "modern-sharded"])
def test_any_number_of_ranks_has_the_losses_of_one_process(folder, name):
    """hsdp: two copies of two ranks each; moved: four ranks, then two, then one, on one run."""
    assert [row[0] for row in losses(folder / name)] == list(range(1, 13))
    assert_same_numbers(folder / "one", folder / name)


@pytest.mark.parametrize("name", VARIANTS)
def test_sharded_runs_have_the_losses_of_ddp(folder, name):
    assert_same_numbers(folder / f"{name}-ddp", folder / f"{name}-sharded", BOUNDS.get(name, FLOAT32))


def test_a_resumed_sharded_run_has_the_bits_of_an_unbroken_one(folder):
    assert losses(folder / "resumed") == losses(folder / "modern-sharded")
    resumed, unbroken = ({file: checkpoint.load_tensors(folder / name / "checkpoints/step_00000012", file)
                          for file in ("model", "optimizer")} for name in ("resumed", "modern-sharded"))
    for file, saved in resumed.items():
        assert_same_bits(saved, unbroken[file])


def test_all_ranks_sample_the_text_that_one_samples(folder):
    found = [re.findall(r"--- sample at step \d+\n(.*?)\n---\n", (folder / name / "log.txt").read_text(), re.DOTALL)
             for name in ("modern-ddp", "modern-sharded")]
    assert len(found[0]) == 3 and found[0] == found[1]
