"""The promises of a run (DESIGN.md, section 8), on one process in this one; test_train_processes.py has the others."""

import errno
import json
import math
import re
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config as configuration
import curves
import eval as evaluation
import gpus
import sample
import train
from config import OVERRIDE, ConfigError, MachineError, OptimConfig, UserError
from data.loader import MicroBatch
from data.prepare import prepare
from data.shards import ShardError
from distributed import World
from finetune.runs import read_run
from model import GPT
from optim import LossScale, Optimizer, SpikeGuard
from start import Progress

CONFIG = """
[model]
n_layer = 2
n_head = 2
n_embd = 32
max_seq_len = 16
[data]
tokenizer = "bytes"
val_fraction = 0.1
[optim]
lr = 1e-2
warmup_steps = 2
decay_steps = 12
[train]
tokens_per_step = 128
micro_batch = 4
max_steps = 12
dtype = "float32"
device = "cpu"
log_every = 1
eval_every = 5
save_every = 4
keep = 20
"""


class NoSignal:
    signal = None

    def __call__(self) -> bool:
        return False


class StopAtStep:
    """Asks to stop once a run has logged a step."""

    signal = "SIGTERM"

    def __init__(self, run_dir: str, step: int):
        self.rows, self.words = Path(run_dir) / "metrics.jsonl", f'"step": {step},'

    def __call__(self) -> bool:
        return self.rows.exists() and self.words in self.rows.read_text()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small run on a text of 6,000 characters; relative paths land in tmp_path."""
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], size=1500)
    Path("text.txt").write_text(" ".join(words))
    Path("small.toml").write_text(CONFIG)
    return ["small.toml", "data.source=text.txt"]


def run(arguments: list[str], out_dir: str, *more: str, stop=None) -> Path:
    config, given = configuration.parse_arguments([*arguments, f"train.out_dir={out_dir}", *more])
    train.train(config, given, world=World(), stop=stop or NoSignal())
    return Path(out_dir)


def rows(run_dir: Path, kind: str = "train") -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(run_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run_dir)]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---- Promise 1: the same command goes on to the same numbers ---------------------------------------------------------

@pytest.mark.parametrize("knobs", [
    ("model.dropout=0.2",),
    ("optim.name=muon", "train.micro_batch=3", "data.document_mask=true"),
    ("train.dtype=float16", "optim.schedule=wsd"),
], ids=["adamw-dropout", "muon-uneven-micro-batches", "fp16-scaler"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(settings, knobs):
    unbroken = run(settings, "unbroken", *knobs)
    run(settings, "resumed", "train.max_steps=5", *knobs)
    resumed = run(settings, "resumed", *knobs)
    assert losses(resumed) == losses(unbroken)
    assert_same_bits(tensors(resumed, 12), tensors(unbroken, 12))


@pytest.mark.parametrize("knobs", [[], ["data.document_mask=true"]], ids=["plain", "document-mask"])
@pytest.mark.parametrize("way", ["resume", "fork"])
def test_a_run_of_the_older_mask_rule_is_told_of_the_newer_one(settings, monkeypatch, knobs, way):
    with monkeypatch.context() as patched:  # the versions of that rule did not count tokens
        real = Progress.as_state
        patched.setattr(Progress, "as_state", lambda self, **more: {
            name: value for name, value in real(self, **more).items() if name != "tokens"})
        run(settings, "old", "train.max_steps=5", *knobs)
    new = run(settings, "old", *knobs) if way == "resume" else run(settings, "new", "train.fork_from=old", *knobs)
    assert (new / "log.txt").read_text().count("the version that trained this run") == len(knobs)


def test_another_seed_gives_other_numbers(settings):
    assert losses(run(settings, "one")) != losses(run(settings, "other", "train.seed=7"))


def test_evaluation_and_samples_leave_the_training_numbers_alone(settings):
    often = run(settings, "often", "train.eval_every=1", "train.sample_every=3", "model.dropout=0.2")
    never = run(settings, "never", "train.eval_every=0", "model.dropout=0.2")
    assert losses(often) == losses(never)


def test_metrics_name_no_step_twice_after_a_crash(settings):
    run_dir = run(settings, "crashed", "train.max_steps=6")
    for folder in (run_dir / "checkpoints").glob("step_00000006"):  # as if killed between step 4 and this save
        folder.rename(run_dir / "gone")
    run(settings, "crashed")
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 13))
    assert [row["step"] for row in rows(run_dir, "val")] == [5, 10, 12]


def test_a_finished_run_says_so_and_changes_nothing(settings, capsys):
    run_dir = run(settings, "done")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    run(settings, "done")
    assert "is finished: step 12 of 12" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def advice(text: object) -> list[str]:
    """The section.key=value words that a message tells its reader to add, as a shell would split them."""
    return [word.rstrip(",;") for word in shlex.split(str(text).replace("'", "")) if OVERRIDE.match(word)]


@pytest.fixture
def no_decay_steps(settings) -> list[str]:
    Path("small.toml").write_text(CONFIG.replace("decay_steps = 12\n", ""))
    return settings


def test_raising_max_steps_goes_on_at_min_lr_and_says_so(no_decay_steps):
    settings = [*no_decay_steps, "optim.min_lr=1e-3"]
    run_dir = run(settings, "longer")
    run(settings, "longer", "train.max_steps=14")
    assert [row["lr"] for row in rows(run_dir)[-2:]] == [1e-3, 1e-3]
    assert configuration.load_run_config(run_dir).optim.decay_steps == 12
    log = (run_dir / "log.txt").read_text()
    assert log.count("ends at step 12, the steps after it are made at optim.min_lr = 0.001") == 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("stopped_at", [7, 12])
def test_raising_max_steps_past_a_schedule_that_ends_at_0_is_refused_with_words_that_work(
        no_decay_steps, schedule, stopped_at):
    settings = [*no_decay_steps, f"optim.schedule={schedule}"]
    run_dir = run(settings, "a run", stop=StopAtStep("a run", stopped_at))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="ends at step 12 at learning rate 0.*train.fork_from='a run'") as error:
        run(settings, "a run", "train.max_steps=20")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    words = shlex.split(str(error.value).partition("adding to this command: ")[2])
    assert "train.out_dir=NEW" in words
    new = run([*settings, "train.max_steps=20"], "a run", *words)  # train.out_dir=NEW comes last, and counts
    made = {row["step"]: row["lr"] for row in rows(Path("NEW"))}
    assert list(made) == list(range(stopped_at + 1, 21)) and new == Path("a run")
    for step, lr in made.items():
        done = step - 1
        share = (0.5 * (1 + math.cos(math.pi * (done - 2) / 18)) if schedule == "cosine" else min(1.0, (20 - done) / 4))
        assert lr == pytest.approx(1e-2 * share, rel=1e-12) and lr > 0


@pytest.mark.parametrize("knobs, words", [
    (["optim.schedule=constant"], ["train.max_steps=14"]),
    (["optim.schedule=wsd", "optim.decay_steps=20"], ["train.max_steps=20"]),
    (["optim.min_lr=1e-3"], ["train.max_steps=14"]),
    (["optim.decay_steps=12"], None),
    (["train.init_from=base"], None),
], ids=["constant", "wsd-before-its-decay", "min_lr", "over", "over-and-tuned"])
def test_the_advice_of_a_finished_run_fits_its_schedule(no_decay_steps, capsys, knobs, words):
    if "train.init_from=base" in knobs:
        run(no_decay_steps, "base", "train.max_steps=3")
    settings = [*no_decay_steps, *knobs]
    run(settings, "done")
    capsys.readouterr()
    run(settings, "done")
    said = capsys.readouterr().out
    assert "is finished: step 12 of 12" in said and ("raise train.max_steps" in said) == (words is not None)
    if words is None:
        words = advice(said.replace("STEPS", "14").partition(", or choose")[0])
        assert "train.fork_from=done" in words
    else:
        assert ("at optim.min_lr = 0.001" in said, "= 20 at most" in said) == ("optim.min_lr=1e-3" in knobs,
                                                                              "optim.decay_steps=20" in knobs)
    run(settings, "done", *words)
    made = rows(Path("NEW" if "train.out_dir=NEW" in words else "done"))
    assert made[-1]["step"] == int(words[-1].partition("=")[2]) and all(row["lr"] > 0 for row in made)


@pytest.mark.parametrize("change", ["optim.lr=0.5", "model.n_head=4", "train.seed=5", "train.tokens_per_step=64",
                                    "train.dtype=bfloat16", "optim.decay_steps=13"])
def test_a_resume_with_other_settings_is_refused_with_the_list(settings, change):
    run(settings, "fixed", "train.max_steps=4")
    with pytest.raises(UserError, match="cannot go on with other settings") as error:
        run(settings, "fixed", change)
    assert change.partition("=")[0] in str(error.value)


def test_a_resume_on_other_data_is_refused(settings):
    run(settings, "fixed", "train.max_steps=4")
    Path("other.txt").write_text("something else entirely. " * 200)
    with pytest.raises(UserError, match="data: hash"):
        run(["small.toml", "data.source=other.txt"], "fixed")


def test_the_saved_config_loads_back_equal(settings):
    run_dir = run(settings, "saved", "train.max_steps=1")
    saved = configuration.load_run_config(run_dir)
    config, _ = configuration.parse_arguments([*settings, "train.out_dir=saved", "train.max_steps=1"])
    assert (saved.train, saved.optim) == (config.train, config.optim)
    assert saved.model.vocab_size == 257


# ---- Promise 2: micro-batches do not change a step -------------------------------------------------------------------

def test_micro_batch_size_changes_no_loss_beyond_rounding(settings):
    whole = losses(run(settings, "whole", "train.micro_batch=8"))
    for size in (1, 3):
        split = losses(run(settings, f"split{size}", f"train.micro_batch={size}"))
        # float32: sums in another order differ in the last bits, which 12 steps of AdamW do not blow up past 1e-5
        np.testing.assert_allclose([row[1] for row in split], [row[1] for row in whole], rtol=0, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: that a compiled model trains is unchecked")
def test_a_compiled_model_with_recomputed_blocks_gives_the_losses_of_the_eager_one(settings):
    words = [*settings, "train.max_steps=3", "train.micro_batch=3", "model.dropout=0.0"]
    eager = losses(run(words, "eager"))
    compiled = losses(run(words, "compiled", "train.compile=true", "train.activation_checkpointing=true"))
    # float32: fused kernels round elsewhere; three steps of AdamW at 1e-2 do not blow that up past 1e-4
    np.testing.assert_allclose([row[1] for row in compiled], [row[1] for row in eager], rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: how often a run compiles is unchecked")
def test_a_run_compiles_one_graph_for_full_micro_batches_and_one_for_the_short_last(settings, monkeypatch):
    """Neither for any size, which would be slower and serve both; evaluations and samples are not compiled."""
    real, symbolic = torch.compile, []
    def backend(graph, inputs):
        symbolic.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=backend, **options))
    run(settings, "graphs", "train.max_steps=3", "train.micro_batch=3", "train.compile=true", "train.sample_every=2")
    assert symbolic == [False, False]


@pytest.mark.parametrize("grad_clip", [0.3, 1e9, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_step_equals_plain_pytorch_on_the_whole_batch(grad_clip, scale):
    config = configuration.ModelConfig(n_layer=2, n_head=2, n_embd=32, max_seq_len=16, vocab_size=50)
    # eps far above the rounding of gradients: else the first step is lr x sign, and a gradient near 0 decides by a bit
    optim = OptimConfig(lr=1e-2, decay_steps=10, eps=1e-3)
    tokens = torch.randint(50, (6, 17), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    ours, oracle = GPT(config), GPT(config)
    oracle.load_state_dict(ours.state_dict())
    batches = [MicroBatch(tokens[i:j, :-1], tokens[i:j, 1:], None, i) for i, j in ((0, 4), (4, 6))]
    result = train.train_step(ours, Optimizer(ours, optim), batches, lr=1e-2, tokens_per_step=6 * 16,
                              grad_clip=grad_clip, scale=LossScale(scale), step=0)
    loss = torch.nn.functional.cross_entropy(oracle(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), grad_clip)
    groups = [{"params": [p for p in oracle.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in oracle.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3).step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for mine, theirs in zip(ours.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-7)  # float32 rounding of weights below 1


def test_a_step_waits_for_the_device_once_and_meets_other_ranks_once(monkeypatch):
    """Beside the gradients; what the ranks have to say to each other travels with the loss."""
    waits, sums, fills = [], [], []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, real=real, name=name: waits.append(name) or real(self))
    monkeypatch.setattr(train.distributed, "sum_over_ranks", lambda mine, world: sums.append(mine) or mine)
    real_full = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **k: fills.append(a) or real_full(*a, **k))
    config = configuration.ModelConfig(n_layer=2, n_head=2, n_embd=32, max_seq_len=16, vocab_size=50)
    model, tokens = GPT(config), torch.randint(50, (3, 17))
    optimizer = Optimizer(model, OptimConfig(decay_steps=10))
    batches = [MicroBatch(tokens[i:i + 1, :-1], tokens[i:i + 1, 1:], None, i) for i in range(3)]
    result = train.train_step(model, optimizer, batches, lr=1e-2, tokens_per_step=48, grad_clip=1.0, scale=LossScale(),
                              step=0, flags=lambda: [1.0, 0.0])
    assert waits == ["tolist"] and len(sums) == 1 and sums[0].shape == (4,)
    assert len(fills) == 2  # AdamW's counts: of what decays, of what does not
    assert list(result.flags) == [1.0, 0.0]


def test_spikes_are_left_out_counted_and_remembered_by_a_resumed_run(settings, monkeypatch):
    """A low threshold, so that there are some; a step that is left out changes nothing but the data's place."""
    monkeypatch.setattr(SpikeGuard, "LEAST", 3)
    words = [*settings, "train.skip_spikes=0.1", "optim.lr=0.05", "train.max_steps=24", "optim.decay_steps=24",
             "train.save_every=1"]
    unbroken = run(words, "unbroken")
    run(words, "resumed", "train.max_steps=13")
    resumed = run(words, "resumed")
    assert losses(resumed) == losses(unbroken)
    assert_same_bits(tensors(resumed, 24), tensors(unbroken, 24))
    skipped = [row["step"] for row in rows(unbroken) if row["skipped"]]
    assert 1 <= len(skipped) <= 12 and any(step < 13 for step in skipped)
    for step in skipped:
        assert_same_bits(tensors(unbroken, step), tensors(unbroken, step - 1))
    state = json.loads((unbroken / "checkpoints/step_00000024/state.json").read_text())
    assert state["spikes"]["skipped"] == len(skipped) and state["skips_in_a_row"] == 0
    assert (unbroken / "log.txt").read_text().count("| skipped: a spike | loss ") == len(skipped)
    assert not any(row["skipped"] for row in rows(run(settings, "off")))


# ---- Promise 4: damage is named --------------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(settings):
    run_dir = run(settings, "damaged", "train.max_steps=8")
    weights = run_dir / "checkpoints" / "step_00000008" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    run(settings, "damaged")
    assert (run_dir / "checkpoints" / "step_00000008.damaged").exists()
    log = (run_dir / "log.txt").read_text()
    assert "model.safetensors" in log and "going on from step 4" in log
    assert_same_bits(tensors(run_dir, 12), tensors(run(settings, "whole"), 12))


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_anew(settings, capsys):
    run_dir = run(settings, "damaged", "train.max_steps=4")
    (run_dir / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # also when they have been set aside already
        with pytest.raises(UserError, match="every checkpoint .* is damaged"):
            run(settings, "damaged")
    assert "model.safetensors" in capsys.readouterr().err  # said when it was set aside, the first time


def test_a_damaged_shard_stops_the_run_with_its_name(settings):
    run_dir = run(settings, "first", "train.max_steps=1")
    data_dir = Path(configuration.load_run_config(run_dir).data.dir)
    shard = data_dir / "train_00000.bin"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="train_00000.bin.*sha256"):
        run(settings, "second", "train.max_steps=2000", "optim.decay_steps=2000", "train.log_every=500")


# ---- Promise 5 and failed saves: see also test_train_processes.py ----------------------------------------------------

def test_a_stop_between_steps_saves_and_leaves_a_mark(settings):
    run_dir = run(settings, "stopped", stop=StopAtStep("stopped", 3))
    step = json.loads((run_dir / "STOPPED").read_text())["step"]
    assert step == 3
    assert (run_dir / "checkpoints" / f"step_{step:08d}").exists()
    run(settings, "stopped")
    assert not (run_dir / "STOPPED").exists()
    assert_same_bits(tensors(run_dir, 12), tensors(run(settings, "whole"), 12))


class StopInEvaluation:
    """Asks to stop while the evaluation at a step looks at it, not before."""

    signal = "SIGTERM"

    def __init__(self, monkeypatch):
        self.on, real = False, train.evaluate
        monkeypatch.setattr(train, "evaluate", lambda run: (setattr(self, "on", True), real(run))[1])

    def __call__(self) -> bool:
        return self.on


@pytest.mark.parametrize("max_steps", [12, 5], ids=["in-the-middle", "at-the-last-step"])
def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(settings, monkeypatch, max_steps):
    words = [*settings, f"train.max_steps={max_steps}"]
    for _ in range(2):  # the next start is stopped as early
        with monkeypatch.context() as patched:
            stopped = run(words, "stopped", stop=StopInEvaluation(patched))
    log = (stopped / "log.txt").read_text()
    assert "finished" not in log and log.count("stopped at step 5 (SIGTERM)") == 2 and (stopped / "STOPPED").exists()
    assert rows(stopped, "val") == [] and checkpoint.load_state(stopped / "checkpoints" / "step_00000005")["val_due"]
    run(words, "stopped")
    whole = run(words, "whole")
    assert rows(stopped, "val") == rows(whole, "val")
    assert losses(stopped) == losses(whole)


def test_a_failed_save_warns_and_training_goes_on(settings, monkeypatch):
    real, calls = checkpoint.save, []

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise checkpoint.SaveError("disk full: 9 GB needed, 1 GB free")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", fails_once)
    run_dir = run(settings, "full")
    assert "warning: disk full: 9 GB needed, 1 GB free; training goes on" in (run_dir / "log.txt").read_text()
    assert not (run_dir / "checkpoints" / "step_00000004").exists()
    assert (run_dir / "checkpoints" / "step_00000012").exists()


def test_a_failed_last_save_ends_the_run_with_an_error(settings, monkeypatch):
    def fails(*args, **kwargs):
        raise checkpoint.SaveError("disk full")

    monkeypatch.setattr(checkpoint, "save", fails)
    with pytest.raises(MachineError, match="last checkpoint could not be saved"):
        run(settings, "full")


# ---- train.async_save: checkpoints are written beside the training ---------------------------------------------------

@pytest.fixture
def late_writer(settings, monkeypatch):
    """Writes a checkpoint only when the second step after it is logged: a loop that waits for it would hang. errors:
    what it raises, by step."""
    real, errors = checkpoint._Save.write, {}

    def write(save: checkpoint._Save) -> dict:
        assert threading.current_thread() is not threading.main_thread()
        log, later, deadline = save.run_dir / "metrics.jsonl", min(save.step + 2, 12), time.monotonic() + 60
        while f'"step": {later},' not in log.read_text():
            assert time.monotonic() < deadline, "training does not go on"
            time.sleep(0.01)
        if save.step in errors:
            raise errors[save.step]
        return real(save)

    monkeypatch.setattr(checkpoint._Save, "write", write)
    return errors


def test_a_checkpoint_written_beside_the_training_is_that_of_its_step(settings, request):
    waited = run(settings, "waited", "optim.name=muon")
    request.getfixturevalue("late_writer")
    beside = run(settings, "beside", "optim.name=muon", "train.async_save=true")
    assert losses(beside) == losses(waited)
    for step in (4, 8, 12):
        assert_same_bits(tensors(beside, step), tensors(waited, step))
        assert checkpoint.load_state(beside / f"checkpoints/step_{step:08d}") == checkpoint.load_state(
            waited / f"checkpoints/step_{step:08d}")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SystemExit(3)], ids=["full-disk", "dead-thread"])
def test_what_fails_beside_the_training_is_a_warning_and_an_error_if_it_is_the_last(settings, late_writer, error):
    words = "disk full" if isinstance(error, OSError) else "its thread ended with SystemExit: 3"
    late_writer[4] = error
    run_dir = run(settings, "once", "train.async_save=true")
    warnings = [line for line in (run_dir / "log.txt").read_text().splitlines() if "warning" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: checkpoint of step 4 was not saved")
    assert words in warnings[0] and warnings[0].endswith("training goes on and tries again at the next save")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]
    late_writer[12] = error
    with pytest.raises(MachineError, match="last checkpoint could not be saved"):
        run(settings, "last", "train.async_save=true")
    assert [path.name for path in Path("last/checkpoints").iterdir()] == ["step_00000008"]


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(settings, monkeypatch):
    real = checkpoint._Save.write
    monkeypatch.setattr(checkpoint._Save, "write", lambda save: (time.sleep(0.5), real(save))[1])
    settings = [*settings, "train.async_save=true"]
    run_dir = run(settings, "stopped", stop=StopAtStep("stopped", 5))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]
    assert (run_dir / "STOPPED").exists()
    run(settings, "stopped")
    assert_same_bits(tensors(run_dir, 12), tensors(run(settings, "whole"), 12))


# ---- Promise 6: what is not finite changes nothing -------------------------------------------------------------------

class Poisoned(torch.nn.Module):
    """A model whose loss, or gradient alone, is not finite in some calls."""

    def __init__(self, model: GPT, poison: str):
        super().__init__()
        self.model, self.poison, self.armed = model, poison, True

    def forward(self, *args, **kwargs):
        loss = self.model(*args, **kwargs)
        if not self.armed:
            return loss
        if self.poison == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss * 1.0


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(poison, name):
    config = configuration.ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=16, vocab_size=50)
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = Optimizer(model, OptimConfig(name=name, decay_steps=10))
    wrapped = Poisoned(model, poison)
    tokens = torch.randint(50, (2, 17))
    batches = [MicroBatch(tokens[:, :-1], tokens[:, 1:], None, 0)]
    arguments = dict(lr=1e-3, tokens_per_step=32, grad_clip=1.0, scale=LossScale(), step=0)
    wrapped.armed = False
    train.train_step(wrapped, optimizer, batches, **arguments)  # so that moments are not all zero
    before = {k: v.clone() for k, v in (model.state_dict() | optimizer.state_tensors()).items()}
    wrapped.armed = True
    result = train.train_step(wrapped, optimizer, batches, **arguments)
    assert result.skipped and optimizer.updates == 1
    assert_same_bits(model.state_dict() | optimizer.state_tensors(), before)
    wrapped.armed = False
    assert not train.train_step(wrapped, optimizer, batches, **arguments).skipped


def test_a_skipped_step_is_a_null_row_and_ten_in_a_row_stop_the_run(settings, monkeypatch):
    real = train.train_step

    def overflows_from_step_3(*args, **kwargs):
        if kwargs["step"] < 2:
            return real(*args, **kwargs)
        return train.StepResult(math.nan, math.nan, skipped=True)

    monkeypatch.setattr(train, "train_step", overflows_from_step_3)
    with pytest.raises(MachineError, match="not finite for 10 steps in a row.*no checkpoint from before.*optim.lr"):
        run(settings, "diverged", "train.log_every=100")
    skipped = [row for row in rows(Path("diverged")) if row["skipped"]]
    assert [row["step"] for row in skipped] == list(range(3, 13))
    assert all(row["loss"] is None and row["grad_norm"] is None for row in skipped)


@pytest.fixture
def ruined_after_step_6(monkeypatch):
    """The update of step 6 blows the weights up: what is saved then loads, but its loss is not finite. In run folders
    called ruined only."""
    real = train.train_step

    def step(wrapped, *args, **kwargs):
        result = real(wrapped, *args, **kwargs)
        if kwargs["step"] == 5 and Path("ruined").exists() and not Path("NEW").exists():
            with torch.no_grad():
                wrapped.wte.weight.fill_(1e38)
        return result

    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize("keep, left, beside", [(2, [4, 6], "false"), (1, [6], "false"), (2, [4, 6], "true")],
                         ids=["two-kept", "one-kept", "written-beside"])
def test_checkpoints_of_skipped_steps_replace_no_good_one_and_the_advice_works(
        settings, ruined_after_step_6, keep, left, beside):
    settings = [*settings, "train.save_every=2", f"train.keep={keep}", "train.eval_every=0", "train.max_steps=20",
                "optim.decay_steps=20", f"train.async_save={beside}"]
    for _ in range(2):  # the same command again ends the same way
        with pytest.raises(MachineError, match="step 16 of 20: loss or gradient was not finite for 10 steps") as error:
            run(settings, "ruined")
        saved = sorted(int(path.name[5:]) for path in Path("ruined/checkpoints").iterdir())
        assert saved == [*left, 14]  # the last one made while steps were skipped, and all good ones that were there
    if keep == 2:
        words = advice(str(error.value).partition(" and a lower")[0])
        assert words == ["train.fork_from=ruined/checkpoints/step_00000004", "train.out_dir=NEW"]
    else:
        assert "no checkpoint from before is left" in str(error.value)
        words = ["train.out_dir=NEW"]
    Path("NEW").mkdir()
    run(settings, "ruined", *words, "optim.lr=5e-3")
    made = rows(Path("NEW"))
    assert made[-1]["step"] == 20 and not any(row["skipped"] for row in made)


@pytest.mark.parametrize("max_steps, what, val_steps", [
    (9, "not finite for 3 steps in a row", [5, 9]), (9, "not finite for 3 steps in a row", []),
    (6, "validation loss is not finite", [5, 6])], ids=["skipped", "skipped-without-validation", "val-loss"])
def test_a_run_that_ends_in_losses_that_are_not_finite_is_not_finished(
        settings, ruined_after_step_6, max_steps, what, val_steps):
    words = [f"train.max_steps={max_steps}", *([] if val_steps else ["data.val_fraction=0"])]
    for _ in range(2):
        with pytest.raises(MachineError, match=f"step {max_steps} of {max_steps}: .*{what}.*step_00000004"):
            run(settings, "ruined", *words)
    log = (Path("ruined") / "log.txt").read_text()
    assert "finished" not in log and log.count("error: step ") == 2
    assert [row["step"] for row in rows(Path("ruined"), "val")] == val_steps


def test_a_fork_counts_its_own_skipped_steps(settings, monkeypatch):
    real, skipped = train.train_step, train.StepResult(math.nan, math.nan, skipped=True)
    monkeypatch.setattr(train, "train_step", lambda *args, **kwargs: (
        skipped if 3 <= kwargs["step"] < 13 else real(*args, **kwargs)))
    with pytest.raises(MachineError, match="step 8 of 8: .* 5 steps in a row"):
        run(settings, "trunk", "train.max_steps=8")
    branch = run(settings, "branch", "train.fork_from=trunk/checkpoints/step_00000008", "train.max_steps=15",
                 "optim.decay_steps=15")  # 5 more steps are skipped
    assert [row["skipped"] for row in rows(branch)] == 5 * [True] + 2 * [False]


def test_running_out_of_memory_says_which_knob_to_turn(settings, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(MachineError, match="lower train.micro_batch .now 4"):
        run(settings, "big")


# ---- Parents: init_from and fork_from --------------------------------------------------------------------------------

def test_init_from_takes_weights_model_and_tokenizer_but_no_moments(settings):
    run(settings, "parent")
    Path("tune.toml").write_text("[optim]\nlr = 1e-9\nweight_decay = 0.0\nschedule = 'constant'\n"
                                 "[train]\ntokens_per_step = 128\nmax_steps = 1\ndtype = 'float32'\ndevice = 'cpu'\n")
    tuned = run(["tune.toml", "data.source=text.txt", "data.val_fraction=0.1", "train.init_from=parent",
                 "model.max_seq_len=8", "model.dropout=0.1"], "tuned")
    model = configuration.load_run_config(tuned).model
    assert (model.n_embd, model.max_seq_len, model.dropout) == (32, 8, 0.1)
    parent, child = tensors(Path("parent"), 12), tensors(tuned, 1)
    torch.testing.assert_close(child["blocks.0.mlp.fc.weight"], parent["blocks.0.mlp.fc.weight"], rtol=0, atol=1e-7)
    torch.testing.assert_close(child["wpe.weight"], parent["wpe.weight"][:8], rtol=0, atol=1e-7)
    assert checkpoint.load_state(tuned / "checkpoints" / "step_00000001")["updates"] == 1


def test_a_run_from_a_parent_goes_on_after_the_parent_is_gone(settings):
    run(settings, "parent", "train.max_steps=4")
    words = [*settings, "train.init_from=parent", "optim.decay_steps=6"]
    run(words, "child", "train.max_steps=3")
    Path("parent").rename("elsewhere")
    run(words, "child", "train.max_steps=6")
    assert [row["step"] for row in rows(Path("child"))] == [1, 2, 3, 4, 5, 6]


def test_fork_from_goes_on_with_moments_and_step_as_a_new_run(settings):
    run(settings, "trunk", "optim.schedule=constant")
    fork = ["train.fork_from=trunk/checkpoints/step_00000008", "optim.schedule=constant"]
    branch = run(settings, "branch", *fork)
    assert_same_bits(tensors(branch, 12), tensors(Path("trunk"), 12))
    assert [row["step"] for row in rows(branch)] == [9, 10, 11, 12]


def test_a_fork_may_shorten_the_context_moments_and_all(settings):
    run(settings, "trunk", "train.max_steps=4")
    branch = run(settings, "branch", "train.fork_from=trunk", "model.max_seq_len=8", "train.max_steps=6")
    assert tensors(branch, 6)["exp_avg.wpe.weight"].shape == (8, 32)


@pytest.mark.parametrize("tokens_per_step, max_steps", [(256, 8), (64, 20)])
@pytest.mark.parametrize("is_old", [False, True], ids=["", "checkpoint-without-tokens"])
def test_a_fork_with_other_batches_goes_on_where_its_parent_stopped(settings, monkeypatch, tokens_per_step, max_steps,
                                                                    is_old):
    """It meets the windows that the unbroken trunk meets, in their order, each once; its rows count the tokens."""
    words, met, real_step, real_state = [*settings, "optim.schedule=constant"], [], train.train_step, Progress.as_state

    def remember(model, optimizer, micro_batches, **more):
        met.extend(batch.tokens for batch in micro_batches)
        return real_step(model, optimizer, micro_batches, **more)

    monkeypatch.setattr(train, "train_step", remember)
    with monkeypatch.context() as patched:
        if is_old:
            patched.setattr(Progress, "as_state", lambda self, **more: {
                name: value for name, value in real_state(self, **more).items() if name != "tokens"})
        run(words, "trunk")
    trunk = torch.cat(met)
    met.clear()
    fork = [*words, "train.fork_from=trunk/checkpoints/step_00000004", f"train.tokens_per_step={tokens_per_step}",
            f"train.max_steps={max_steps}"]
    run(fork, "branch", stop=StopAtStep("branch", 6))
    branch = run(fork, "branch")
    assert torch.equal(torch.cat(met), trunk[4 * 128 // 16:])
    assert [row["tokens"] for row in rows(branch)] == list(range(512 + tokens_per_step, 1537, tokens_per_step))
    log = (branch / "log.txt").read_text()
    assert f"; {max_steps} steps = {1536 / 5362:.2f} epochs" in log, log


def test_a_fork_from_float32_into_float16_starts_with_a_loss_scale_of_its_own(settings):
    run(settings, "trunk", "train.max_steps=4")
    branch = run(settings, "branch", "train.fork_from=trunk", "train.dtype=float16", "train.max_steps=5")
    assert checkpoint.load_state(branch / "checkpoints" / "step_00000005")["loss_scale"][0] >= 2.0 ** 10


def test_fork_from_past_max_steps_is_refused(settings):
    run(settings, "trunk")
    with pytest.raises(ConfigError, match="starts at step 12 but train.max_steps = 12"):
        run(settings, "branch", "train.fork_from=trunk")


def test_another_model_beside_init_from_is_refused(settings):
    run(settings, "parent", "train.max_steps=1")
    with pytest.raises(ConfigError, match="model.n_layer = 3 but the run it starts from has 2"):
        run(settings, "child", "train.init_from=parent", "model.n_layer=3")
    assert not Path("child").exists()


def test_another_tokenizer_beside_init_from_is_refused(settings):
    run(settings, "parent", "train.max_steps=1")
    with pytest.raises(UserError, match="data.tokenizer = .* differs"):
        run(settings, "child", "train.init_from=parent", "data.tokenizer=bpe:257")
    assert not Path("child").exists()


# ---- What a run says and writes --------------------------------------------------------------------------------------

def test_nanogpts_files_train_a_model_and_the_log_says_how_they_were_read(settings):
    Path("nanogpt").mkdir()
    for split, tokens in (("train", 3000), ("val", 400)):
        np.random.default_rng(1).integers(256, size=tokens).astype(np.uint16).tofile(f"nanogpt/{split}.bin")
    out = run(settings[:1], "out", "data.dir=nanogpt", "train.max_steps=2", "optim.decay_steps=9")
    assert [row["step"] for row in rows(out)] == [1, 2]
    assert "3,000 training and 400 validation tokens, vocabulary 257; no header in train.bin, val.bin: read as bare " \
           "uint16 ids" in (out / "log.txt").read_text()


@pytest.mark.parametrize("prepared", [False, True], ids=["source", "folder"])
def test_a_run_without_validation_goes_from_text_to_its_end(settings, capsys, prepared):
    if prepared:
        prepare(["text.txt"], Path("whole"), tokenizer="bytes", val_fraction=0.0)
        with pytest.raises(ShardError, match="no val shard.*data.val_fraction=0"):
            run(settings[:1], "none", "data.dir=whole")
        settings = [settings[0], "data.dir=whole"]
    words = [*settings, "data.val_fraction=0"]
    run(words, "none", "train.eval_every=0", stop=StopAtStep("none", 6))
    run_dir = run(words, "none")
    log = (run_dir / "log.txt").read_text()
    assert "and 0 validation tokens (nothing is evaluated)" in log and "finished 12 steps" in log
    assert "val loss" not in log
    assert rows(run_dir, "val") == [] and len(rows(run_dir)) == 12
    with_val = run([word for word in settings if "dir" not in word] + ["data.source=text.txt"], "some")
    assert losses(run_dir) != losses(with_val)  # it learns from all of the text
    capsys.readouterr()
    curves.main(["none"])
    assert "none" in capsys.readouterr().out
    with pytest.raises(UserError, match="no val shard.*--data"):
        evaluation.main(["none"])
    evaluation.main(["none", "--data", "text.txt"])
    assert json.loads(capsys.readouterr().out)["bytes"] == len(Path("text.txt").read_bytes())


def test_what_is_said_on_stderr_is_not_said_on_stdout_again(settings, capsys, monkeypatch):
    run_dir = run(settings, "said", "train.max_steps=8")
    (run_dir / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    skipped = train.StepResult(math.nan, math.nan, skipped=True)
    monkeypatch.setattr(train, "train_step", lambda *args, **kwargs: skipped)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = [*settings, "train.out_dir=said", "train.max_steps=8"]
    with pytest.raises(SystemExit) as exit_info:
        configuration.exit_cleanly(lambda argv: run(arguments, "said"))
    said = "".join(capsys.readouterr())
    assert exit_info.value.code == 1
    for words in ("is damaged: model.safetensors", "error: step 8 of 8: "):
        assert said.count(words) == (run_dir / "log.txt").read_text().count(words) == 1, words


def test_a_run_without_a_checkpoint_is_trained_by_the_command_that_the_message_names(settings):
    run_dir = run(settings, "a run", "train.max_steps=2")
    moved = run_dir.rename("moved run")
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint") as refused:
        read_run(moved, pytest.fail)
    run(shlex.split(str(refused.value).partition("python train.py ")[2])[:1], "moved run")
    assert str(refused.value).endswith("train.out_dir='moved run'")
    assert losses(moved) == losses(run(settings, "whole", "train.max_steps=2"))


def test_the_last_line_is_a_command_to_copy(settings, capsys):
    run(settings, "my 'first' run", "train.max_steps=2")
    command = shlex.split((Path("my 'first' run") / "log.txt").read_text().splitlines()[-1].partition(": ")[2])
    assert command[:2] == ["python", "sample.py"]
    sample.main([*command[2:], "--max-new-tokens", "2"])


def test_the_first_log_lines_say_what_was_chosen_and_why(settings):
    log = (run(settings, "said", "train.max_steps=1") / "log.txt").read_text()
    for words in ("torch " + torch.__version__, "device: cpu (asked for)", "threads", "dtype: float32 (asked for)",
                  "compile: off", "kernels: cpu for ", "hash ", "parameters", "start: new weights"):
        assert words in log, words


def test_the_last_lines_compare_with_gzip_and_xz_and_show_a_sample(settings):
    log = (run(settings, "said") / "log.txt").read_text()
    assert "gzip" in log and "xz" in log and "sample at step 12" in log and "bits/byte" in log


def test_a_sample_ends_where_the_run_s_texts_end(settings):
    base = run(settings, "base", "train.max_steps=1")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(256))}))  # every byte
    log = (run(settings, "tuned", "train.init_from=base", "train.max_steps=1") / "log.txt").read_text()
    assert "--- sample at step 1\n\n---\n" in log


def test_the_val_row_equals_a_plain_evaluation(settings):
    run_dir = run(settings, "scored")
    saved = configuration.load_run_config(run_dir)
    model = GPT(saved.model)
    checkpoint.load_into(model, checkpoint.load_tensors(run_dir / "checkpoints" / "step_00000012", "model"), "it")
    text = Path("text.txt").read_bytes()
    val = np.frombuffer(text[-(len(text) // 10):], dtype=np.uint8).astype(np.int64)
    shard = np.fromfile(Path(saved.data.dir) / "val_00000.bin", dtype="<u2")[512:].astype(np.int64)
    assert bytes(shard[:len(val)].astype(np.uint8)) in text
    windows = (len(shard) - 1) // 16
    tokens = torch.from_numpy(shard[:windows * 16 + 1])
    logits = model(tokens[:-1].view(windows, 16)).double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:], reduction="none")
    row = rows(run_dir, "val")[-1]
    is_text = tokens[1:] != 256
    assert row["loss"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(nats[is_text].mean().item() / math.log(2), rel=1e-6)


def test_a_profiler_trace_of_chosen_steps_is_written(settings):
    run_dir = run(settings, "traced", "train.max_steps=3", "train.profile_steps=[2]")
    traces = list((run_dir / "profile").iterdir())
    assert [path.name for path in traces] == ["step_00000002.json"]
    assert json.loads(traces[0].read_text())["traceEvents"]


def test_a_trace_that_cannot_be_written_is_a_warning_and_the_run_goes_on(settings):
    Path("untraced").mkdir()
    Path("untraced/profile").write_text("in the way")
    run_dir = run(settings, "untraced", "train.max_steps=3", "train.profile_steps=[2]")
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3]
    assert "warning: the trace of step 2 was not written to untraced/profile" in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize("words, message", [
    (["train.tokens_per_step=100"], "train.tokens_per_step = 100 does not divide .* 16 x 1; near it: 96 or 112"),
    (["train.tokens_per_step=10"], "near it: 16$"),
    (["optim.decay_steps=2"], "optim.warmup_steps = 2 leaves no step before decay ends at 2"),
    (["train.device=cuda"], "no CUDA device"),
    (["data.val_fraction=0.0005"], "val"),
    (["train.max_steps=13"], "ends at step 12 at learning rate 0 .*train.max_steps = 13, .*raise optim.decay_steps"),
    (["model.vocab_size=100"], "model.vocab_size = 100 is below the tokenizer's 257"),
    (["train.init_from=nowhere"], "nowhere"),
    (["train.fork_from=nowhere"], "nowhere"),
])
def test_bad_settings_are_refused_before_the_run_folder_exists(settings, words, message):
    if "cuda" in words[0] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA: the refusal where it is missing is unchecked here")
    with pytest.raises(UserError, match=message):
        run(settings, "refused", *words)
    assert not Path("refused").exists()


@pytest.mark.parametrize("damage, problem", [
    (lambda text: "", r"lacks \[model\], \[data\], \[optim\], \[train\]"),
    (lambda text: text[:text.index("[train]")], r"lacks \[train\]"),
    (lambda text: text[:text.index('"') + 3], "not valid TOML"),
    (lambda text: "\0" * len(text), "not valid TOML"),
], ids=["empty", "cut", "torn", "zeroed"])
def test_a_damaged_config_in_a_run_with_checkpoints_is_named_and_kept(settings, damage, problem):
    run_dir = run(settings, "damaged", "train.max_steps=4")
    config = run_dir / "config.toml"
    whole = config.read_text()
    config.write_text(damage(whole))
    for use in (lambda: run(settings, "damaged"), lambda: run(settings, "tuned", "train.init_from=damaged"),
                lambda: run(settings, "forked", "train.fork_from=damaged"), lambda: read_run(run_dir, print)):
        with pytest.raises(ConfigError, match=f"config file '.*damaged/config.toml' .*{problem}"):
            use()
    assert config.read_text() == damage(whole)
    config.write_text(whole)  # the way out
    run(settings, "damaged")
    assert checkpoint.load_state(run_dir / "checkpoints" / "step_00000012")["step"] == 12


def test_a_resumed_run_may_end_before_its_warmup(settings):
    """What was saved at the first start decides, not this start's max_steps."""
    words = [word for word in settings if not word.endswith(".toml")]
    Path("no_decay.toml").write_text(CONFIG.replace("decay_steps = 12", "").replace("warmup_steps = 2",
                                                                                    "warmup_steps = 10"))
    run(["no_decay.toml", *words], "short", "train.max_steps=12", stop=StopAtStep("short", 4))
    run(["no_decay.toml", *words], "short", "train.max_steps=8")
    whole = run(["no_decay.toml", *words], "whole", "train.max_steps=12")
    assert losses(Path("short")) == losses(whole)[:8]
    with pytest.raises(ConfigError, match="optim.warmup_steps = 10 leaves no step before decay ends at 8"):
        run(["no_decay.toml", *words], "fresh", "train.max_steps=8")


def test_a_loss_scale_at_its_floor_is_resumed_and_a_fork_to_float16_begins_anew(settings, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(LossScale, "for_dtype", lambda dtype: LossScale(scale=1.0, dynamic=dtype == torch.float16))
        run_dir = run(settings, "half", "train.dtype=float16", stop=StopAtStep("half", 4))
    run(settings, "half", "train.dtype=float16", "train.max_steps=6")
    assert checkpoint.load_state(run_dir / "checkpoints" / "step_00000006")["loss_scale"] == [1.0, 6]
    run(settings, "single", "train.max_steps=4")
    forked = run(settings, "forked", "train.fork_from=single", "train.dtype=float16", "train.max_steps=6")
    assert checkpoint.load_state(forked / "checkpoints" / "step_00000006")["loss_scale"] == [65536.0, 2]


def test_the_log_shows_the_mean_loss_since_the_last_line_and_the_rows_each_steps_own(settings):
    every = losses(run(settings, "every"))
    run_dir = run(settings, "some", "train.log_every=4")
    lines = [line for line in (run_dir / "log.txt").read_text().splitlines() if " | lr " in line]
    printed = [float(re.search(r"loss (\S+)", line)[1]) for line in lines]
    means = [np.mean([loss for step, loss, _ in every if first < step <= last])
             for first, last in ((0, 1), (1, 4), (4, 8), (8, 12))]
    assert printed == pytest.approx(means, abs=6e-5)
    assert losses(run_dir) == [row for row in every if row[0] in (1, 4, 8, 12)]


def test_mfu_is_unknown_where_tiles_between_documents_are_skipped(settings, monkeypatch):
    monkeypatch.setattr(gpus, "peak_flops", lambda name, dtype: 1e12)
    known = rows(run(settings, "plain", "train.max_steps=2"))
    masked = rows(run(settings, "masked", "train.max_steps=2", "data.document_mask=true"))
    assert all(row["mfu"] > 0 for row in known) and all(row["mfu"] is None for row in masked)


def test_the_seconds_of_a_row_leave_evaluation_and_saves_out(settings, monkeypatch):
    """A clock that stands still but for a step (1 s), an evaluation (1,000 s) and a save (100,000 s)."""
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    for name, seconds in (("train_step", 1.0), ("evaluate", 1e3), ("save", 1e5)):
        real = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *args, real=real, seconds=seconds, **more: (
            now.__setitem__(0, now[0] + seconds), real(*args, **more))[1])
    run_dir = run(settings, "timed", "train.log_every=2")
    assert [(row["step"], row["seconds"], row["tokens_per_second"]) for row in rows(run_dir)] == [
        (1, 1.0, 128.0), (2, 1.0, 128.0), *((step, 2.0, 128.0) for step in (4, 6, 8, 10, 12))]
    assert now[0] > 3e5
