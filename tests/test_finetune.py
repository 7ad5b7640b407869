"""Fine-tuning runs from end to end: examples, parents, adapters, and what they refuse."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config as configuration
import convert
import sample
import train
from checkpoint import CheckpointError
from config import ConfigError, OptimConfig, UserError
from data.chat import DEFAULT_TEMPLATE, load_template
from data.loader import MicroBatch
from data.tokenizer import load_tokenizer
from finetune.runs import weights_of
from model import GPT
from optim import LossScale, Optimizer
from tests.test_train import CONFIG, assert_same_bits, losses, rows, run

ROOT = Path(__file__).resolve().parents[1]
TUNE = """
[data]
val_fraction = 0.2
[optim]
lr = 3e-3
schedule = "constant"
[train]
init_from = "parent"
tokens_per_step = 64
micro_batch = 2
max_steps = 6
dtype = "float32"
device = "cpu"
log_every = 1
eval_every = 3
save_every = 2
keep = 20
"""
LORA = ["lora.rank=2", "lora.alpha=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small parent run, examples and configs. Tests copy what they change."""
    path = tmp_path_factory.mktemp("finetune")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], size=1500)
    (path / "text.txt").write_text(" ".join(words))
    (path / "small.toml").write_text(CONFIG.replace("max_steps = 12", "max_steps = 2").replace("keep = 20", "keep = 1"))
    (path / "tune.toml").write_text(TUNE)
    lines = [{"prompt": f"{a}{b}", "response": f"{b}{a}" * (1 + i % 3)} for i, (a, b) in enumerate(
        (a, b) for a in "catsmeonh" for b in "thelpdiu")]
    (path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chats = [{"messages": [{"role": "assistant", "content": "b"}]}] * 8
    (path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chats))
    (path / "mine.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    before = os.getcwd()
    os.chdir(path)
    try:
        run(["small.toml", "data.source=text.txt"], "parent")
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def tune(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run on the examples; relative paths land in a copy of the folder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return ["tune.toml", "data.source=pairs.jsonl"]


def weights(run_dir: str | Path, step: int) -> dict[str, torch.Tensor]:
    return weights_of(Path(run_dir) / "checkpoints" / f"step_{step:08d}")


def raw(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    return load_file(path / "adapter_model.safetensors") | load_file(path / "optimizer.safetensors")


# ---- Examples --------------------------------------------------------------------------------------------------------

def shard_rows(run_dir: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    data = Path(configuration.load_run_config(run_dir).data.dir)
    tokens = np.fromfile(data / f"{split}_00000.bin", "<u2")[512:].astype(np.int64).reshape(-1, 17)
    loss, start = (np.fromfile(data / f"{split}_00000.{track}.bin", np.uint8).reshape(-1, 17)
                   for track in ("loss", "start"))
    return torch.from_numpy(tokens), torch.from_numpy(loss), torch.from_numpy(start)


def test_the_loss_is_the_mean_over_responses_as_if_each_example_stood_alone(tune):
    """The oracle runs every example by itself, from position 0, and sums its response tokens in float64."""
    run_dir = run(tune, "tuned", "optim.lr=1e-30", "train.max_steps=3", "train.eval_every=1")
    model = GPT(configuration.load_run_config(run_dir).model)
    checkpoint.load_into(model, weights("parent", 2), "parent")
    nats, count = 0.0, 0
    for tokens, loss, start in zip(*shard_rows(run_dir, "val"), strict=True):
        edges = [*start.nonzero().flatten().tolist(), 17]
        for a, b in zip(edges, edges[1:], strict=False):
            logits = model(tokens[a:b - 1][None]).double()[0]
            scored = loss[a + 1:b] == 1
            nats += torch.nn.functional.cross_entropy(logits[scored], tokens[a + 1:b][scored], reduction="sum")
            count += int(scored.sum())
    assert rows(run_dir, "val")[0]["loss"] == pytest.approx(nats.item() / count, rel=1e-6)
    log = (run_dir / "log.txt").read_text()
    assert "examples: 58 of prompt/response" in log and "gzip" not in log


ANSWERS = [("cat", "m"), ("dog", "w"), ("cow", "u"), ("hen", "k")]


def test_a_tuned_model_answers_and_stops(tune):
    Path("pairs.jsonl").write_text("".join(json.dumps({"prompt": a, "response": b * 3}) + "\n" for a, b in ANSWERS))
    run_dir = run(tune, "tuned", "train.max_steps=80", "train.eval_every=0", "train.save_every=80", "optim.lr=1e-2",
                  "data.val_source=pairs.jsonl", "train.tokens_per_step=128")
    model, tokenizer = sample.load_model(run_dir, device=torch.device("cpu"), dtype="float32", note=lambda line: None)
    pieces = list(sample.generate_text(model, tokenizer, [a for a, _ in ANSWERS], max_new_tokens=9,
                                       sampling=sample.Sampling(temperature=0.0)))
    answers = ["".join(p.text for p in pieces if p.row == row) for row in range(len(ANSWERS))]
    assert answers == [b * 3 for _, b in ANSWERS] and all(p.finish == "stop" for p in pieces if p.finish)


@pytest.mark.parametrize("knobs", [("model.dropout=0.1", "train.micro_batch=3"), (*LORA, "lora.dropout=0.3")],
                         ids=["all", "lora"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tune, knobs):
    unbroken = run(tune, "unbroken", *knobs)
    run(tune, "resumed", *knobs, "train.max_steps=3")
    Path("parent").rename("gone")
    Path("pairs.jsonl").unlink()
    resumed = run(tune, "resumed", *knobs)
    assert losses(resumed) == losses(unbroken) and rows(resumed, "val")[-1] == rows(unbroken, "val")[-1]
    assert_same_bits(weights(resumed, 6), weights(unbroken, 6))
    if "lora.rank=2" in knobs:
        assert_same_bits(raw(resumed, 6), raw(unbroken, 6))


def test_a_step_without_any_response_token_changes_nothing_but_decay_and_divides_by_no_zero():
    torch.manual_seed(0)
    model = GPT(configuration.ModelConfig(n_layer=1, n_head=2, n_embd=16, max_seq_len=8, vocab_size=20))
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = MicroBatch(torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), -100), None, 0, scored=0)
    result = train.train_step(model, Optimizer(model, OptimConfig(weight_decay=0.0, decay_steps=9)), [batch], lr=1e-2,
                              tokens_per_step=16, grad_clip=1.0, scale=LossScale(), step=0)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


UNEQUAL_RANKS = """
import sys, torch
sys.path.insert(0, {checkout!r})
import distributed, train
from finetune import lora
from config import LoraConfig, ModelConfig, OptimConfig
from data.loader import MicroBatch
from model import GPT
from optim import LossScale, Optimizer

def steps(world, adapts):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=16, vocab_size=50))
    if adapts:
        lora.add_adapters(model, LoraConfig(rank=2))
    optimizer = Optimizer(model, OptimConfig(decay_steps=10))
    wrapped = distributed.wrap(model, torch.device("cpu"), world)
    tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(3))
    targets = tokens[:, 1:].clone()
    for row, masked in enumerate((15, 3, 9, 0)):  # 1 + 13 scored targets on one rank, 7 + 16 on the other
        targets[row, :masked] = -100
    mine = range(2 * world.rank, 2 * world.rank + 2) if world.size == 2 else range(4)
    scored = (targets != -100).sum(1).tolist()
    batches = [MicroBatch(tokens[i:i + 1, :-1], targets[i:i + 1], None, i, scored[i]) for i in mine]
    found = [train.train_step(wrapped, optimizer, batches, lr=1e-3, tokens_per_step=64, grad_clip=1.0,
                              scale=LossScale(), step=step, world=world) for step in range(3)]
    return [number for result in found for number in (result.loss, result.grad_norm)]

world = distributed.read_world()
alone = [steps(distributed.World(), adapts) for adapts in (False, True)]
with distributed.process_group(world, torch.device("cpu"), 60.0):
    for adapts in (False, True):
        found = steps(world, adapts)
        assert all(abs(a - b) < 1e-5 * b for a, b in zip(found, alone[adapts], strict=True)), (found, alone[adapts])
print(f"rank {{world.rank}} agrees")  # one write: the other rank's may come at the same time
"""


def test_two_ranks_with_unequal_counts_give_the_losses_and_gradients_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNEQUAL_RANKS.format(checkout=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 0 agrees" in done.stdout and "rank 1 agrees" in done.stdout


# ---- Chat ------------------------------------------------------------------------------------------------------------

def test_a_run_on_chat_holds_its_template_and_hands_it_on(tune):
    chat = ["tune.toml", "data.source=chat.jsonl", "train.max_steps=1", "train.tokens_per_step=16"]
    Path("tune.toml").write_text(TUNE.replace("[train]", "[train]\nsave_every = 9").replace("save_every = 2\n", ""))
    first = run(chat, "first", "data.chat_template=mine.jinja")
    assert load_template(first) == Path("mine.jinja").read_text()
    second = run(chat, "second", "train.init_from=first")
    assert load_template(second) == load_template(first)
    log = (second / "log.txt").read_text()  # a text from nothing says nothing of answers
    assert "--- sample" not in log and "python sample.py second --chat --prompt" in log
    plain = run(chat, "plain")  # prepared anew, in a folder of its own
    assert load_template(plain) == DEFAULT_TEMPLATE
    assert load_template(Path("parent")) is None
    Path("other.jinja").write_text("{{ messages[0].content }}")
    # rows that are no chats do not take it away
    for name, more, kept in (("third", (), "mine.jinja"), ("adapted", ("lora.rank=2",), "mine.jinja"),
                             ("named", ("data.chat_template=other.jinja",), "other.jinja")):
        third = run(["tune.toml", "data.source=pairs.jsonl"], name, "train.init_from=first", "train.max_steps=1", *more)
        assert load_template(third) == Path(kept).read_text()


def test_a_template_that_is_not_there_is_refused_before_anything_is_written(tune):
    with pytest.raises(UserError, match="chat template 'nowhere.jinja' cannot be read"):
        run(["tune.toml", "data.source=chat.jsonl"], "tuned", "data.chat_template=nowhere.jinja")
    assert not Path("tuned").exists()


# ---- Adapters --------------------------------------------------------------------------------------------------------

def test_checkpoints_hold_adapters_only_and_the_base_is_kept_once(tune):
    run_dir = run(tune, "tuned", *LORA)
    assert_same_bits(load_file(run_dir / "base" / "model.safetensors"), weights("parent", 2))
    path = run_dir / "checkpoints" / "step_00000006"
    assert sorted(p.name for p in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors",
                                                      "manifest.json", "optimizer.safetensors", "state.json"]
    assert sum(p.stat().st_size for p in path.iterdir()) < 0.6 * (run_dir / "base" / "model.safetensors").stat().st_size
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 2
    assert "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight" in load_file(path / "adapter_model.safetensors")
    # r (C + M) for qkv 32 + 96, proj 32 + 32, fc 32 + 128, proj 128 + 32, in two blocks
    assert "lora: rank 2, alpha 4 on attn.qkv" in (run_dir / "log.txt").read_text()
    assert f"{2 * 2 * (128 + 64 + 160 + 160):,} of the parameters learn" in (run_dir / "log.txt").read_text()
    assert rows(run_dir)[0]["mfu"] is None


def test_readers_see_base_and_adapters_merged(tune):
    run_dir = run(tune, "tuned", *LORA, "optim.lr=0.05")
    adapters = raw(run_dir, 6)
    model, tokenizer = sample.load_model(run_dir, device=torch.device("cpu"), dtype="float32", note=lambda line: None)
    base = load_file(run_dir / "base" / "model.safetensors")
    stem = "base_model.model.transformer.h.1.attn.c_attn"
    product = adapters[f"{stem}.lora_B.weight"].double() @ adapters[f"{stem}.lora_A.weight"].double()
    expected = base["blocks.1.attn.qkv.weight"].double() + 2.0 * product
    assert product.abs().max() > 1e-3
    assert (model.blocks[1].attn.qkv.weight - expected).abs().max() < 1e-6
    assert tokenizer.encodes_like(load_tokenizer("parent"))
    convert.to_hf(run_dir, Path("hf"))
    exported = load_file("hf/model.safetensors")["transformer.h.1.attn.c_attn.weight"]  # GPT-2's are (in, out)
    assert (exported.T - expected).abs().max() < 1e-6
    command = [sys.executable, str(ROOT / "eval.py"), "tuned", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(rows(run_dir, "val")[-1]["loss"], rel=1e-5)


def test_a_run_may_start_from_the_merged_weights_of_another(tune):
    run(tune, "first", *LORA, "optim.lr=0.05")
    second = run(tune, "second", *LORA, "train.init_from=first", "optim.lr=1e-30", "optim.weight_decay=0.0")
    assert_same_bits(load_file(second / "base" / "model.safetensors"), weights("first", 6))
    third = run(tune, "third", "train.init_from=first", "optim.lr=1e-30", "optim.weight_decay=0.0")
    for name, tensor in weights(third, 6).items():
        torch.testing.assert_close(tensor, weights("first", 6)[name], rtol=0, atol=1e-7)


def test_a_fork_goes_on_with_the_adapters_and_their_moments(tune):
    trunk = run(tune, "trunk", *LORA)
    words = [w for w in tune if "init_from" not in w]
    Path("fork.toml").write_text(TUNE.replace('init_from = "parent"', 'fork_from = "trunk/checkpoints/step_00000004"'))
    branch = run(["fork.toml", *words[1:]], "branch")
    assert_same_bits(raw(branch, 6), raw(trunk, 6))
    assert [row["step"] for row in rows(branch)] == [5, 6]
    run(["fork.toml", *words[1:]], "branch", "train.max_steps=7")  # and it can be gone on with
    with pytest.raises(ConfigError, match="lora.rank: 2 -> 3"):
        run(["fork.toml", *words[1:]], "other", "lora.rank=3")


def test_a_base_that_was_swapped_or_lost_is_refused_by_name(tune):
    run_dir = run(tune, "tuned", *LORA, "train.max_steps=2")
    base = run_dir / "base" / "model.safetensors"
    original = base.read_bytes()
    data = bytearray(original)
    data[-3] ^= 1
    base.write_bytes(data)
    for use in (lambda: run(tune, "tuned", *LORA),
                lambda: sample.load_model(run_dir, device=torch.device("cpu"), dtype="float32", note=print),
                lambda: run(tune, "child", "train.init_from=tuned")):
        with pytest.raises(UserError, match="base/model.safetensors' is not what the adapters .* were trained on"):
            use()
    base.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file.*copy the run folder as a whole"):
        weights(run_dir, 2)
    assert (run_dir / "checkpoints" / "step_00000002").exists()  # the adapters themselves are not damaged
    base.write_bytes(original)
    run(tune, "tuned", *LORA)


def test_a_start_killed_before_the_first_checkpoint_can_be_repeated(tune, monkeypatch):
    def killed(run: train.Training) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "loop", killed)
        run(tune, "tuned", *LORA)
    assert (Path("tuned") / "base").exists() and not (Path("tuned") / "checkpoints").exists()
    Path("tuned/base/model.safetensors").write_bytes(b"half")
    assert_same_bits(raw(run(tune, "tuned", *LORA), 6), raw(run(tune, "unharmed", *LORA), 6))


@pytest.mark.parametrize(("words", "message"), [
    (["lora.rank=2", "optim.name=muon"], "optim.name = 'muon' does not go with lora.rank"),
    (["lora.rank=2", "lora.targets=['mlp.fcc']"], "lora.targets names 'mlp.fcc'; there are attn.qkv"),
    (["lora.rank=2", "lora.targets=[]"], "lora.targets is empty"),
    (["lora.rank=-1"], "lora.rank = -1 should be at least 0"),
    (["lora.rank=2", "lora.alpha=0"], "lora.alpha = 0.0 should be above 0"),
    (["train.init_from=nowhere"], "train.init_from = 'nowhere' does not exist"),
    (["data.tokenizer=bpe:260"], "differs from that of 'parent'"),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(tune, words, message):
    with pytest.raises(UserError, match=message):
        run(tune, "refused", *words)
    assert not Path("refused").exists()


def test_adapters_need_weights_to_adapt(tune):
    Path("alone.toml").write_text("[model]\nmax_seq_len = 16\n" + TUNE.replace('init_from = "parent"\n', ""))
    with pytest.raises(ConfigError, match="lora.rank = 2 needs weights to adapt; name them with train.init_from"):
        run(["alone.toml", *tune[1:]], "refused", "lora.rank=2")


def test_adapters_cannot_change_in_a_run_that_goes_on(tune):
    run(tune, "tuned", *LORA, "train.max_steps=2")
    with pytest.raises(CheckpointError, match="lora.rank: 2 -> 4"):
        run(tune, "tuned", "lora.rank=4", "lora.alpha=4")


def test_rows_packed_for_another_context_are_refused(tune):
    run_dir = run(tune, "tuned", "train.max_steps=1")
    data = configuration.load_run_config(run_dir).data.dir
    with pytest.raises(UserError, match="packed for a context of 16 tokens but model.max_seq_len = 8"):
        run(["tune.toml", f"data.dir={data}"], "other", "model.max_seq_len=8")
    run(tune, "shorter", "model.max_seq_len=8", "train.max_steps=1")  # prepared anew, in a folder of its own


# ---- A Hugging Face folder -------------------------------------------------------------------------------------------

HUGGING_FACE = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=257, bos_token_id=256,
                                   eos_token_id=256, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
model.save_pretrained(sys.argv[1])
"""


def test_a_hugging_face_folder_supplies_model_tokenizer_and_template(tune, tmp_path_factory):
    pytest.importorskip("transformers", reason="transformers is missing: starting from its folders is unchecked")
    done = subprocess.run([sys.executable, "-c", HUGGING_FACE, str(Path("hf").absolute())], capture_output=True,
                          text=True, cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    load_tokenizer("bytes").save(Path("hf/tokenizer.json"))
    shutil.copy("mine.jinja", "hf/chat_template.jinja")
    words = ["tune.toml", "data.source=chat.jsonl", "train.init_from=hf", "train.tokens_per_step=16", "optim.lr=1e-30",
             "optim.weight_decay=0.0", "train.max_steps=1"]
    for more in ([], LORA):
        run_dir = run(words, f"tuned{len(more)}", *more)
        theirs = load_file("hf/model.safetensors")
        tensors = weights(run_dir, 1)
        name = "transformer.h.1.mlp.c_fc.weight"
        theirs = theirs[name] if name in theirs else theirs[name.removeprefix("transformer.")]
        torch.testing.assert_close(tensors["blocks.1.mlp.fc.weight"], theirs.T, rtol=0, atol=1e-7)
        assert load_template(run_dir) == Path("mine.jinja").read_text()
        assert load_tokenizer(str(run_dir)).encodes_like(load_tokenizer("bytes"))
        assert math.isfinite(rows(run_dir)[0]["loss"])
