"""The promises of a run that need processes of their own: torchrun's two gloo ranks, signals, kill -9."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.test_train import CONFIG, assert_same_bits, losses, rows, run, tensors

CHECKOUT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], size=1500)
    Path("text.txt").write_text(" ".join(words))
    Path("small.toml").write_text(CONFIG)
    return ["small.toml", "data.source=text.txt"]


def start(command: list[str], arguments: list[str], out_dir: str, *more: str) -> subprocess.Popen:
    words = [*command, str(CHECKOUT / "train.py"), *arguments, f"train.out_dir={out_dir}", *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, timeout_s: float = 120) -> str:
    try:
        return process.communicate(timeout=timeout_s)[0]
    finally:
        process.kill()


def two_ranks(arguments: list[str], out_dir: str, *more: str) -> Path:
    process = start(TORCHRUN, arguments, out_dir, *more)
    output = finish(process)
    assert process.returncode == 0 and "Warning" not in output, output
    return Path(out_dir)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {finish(process, 5)}")


def test_two_ranks_give_the_losses_of_one_and_resume_to_the_same_bits(settings):
    settings = [*settings, "optim.name=muon", "train.micro_batch=3"]  # 8 windows: 4 a rank, in 3 + 1
    alone = run(settings, "alone")
    unbroken = two_ranks(settings, "unbroken")
    np.testing.assert_allclose([row[1] for row in losses(unbroken)], [row[1] for row in losses(alone)],
                               rtol=0, atol=1e-5)  # float32, sums in another order
    assert rows(unbroken, "val")[0]["loss"] == pytest.approx(rows(alone, "val")[0]["loss"], abs=1e-5)
    two_ranks(settings, "resumed", "train.max_steps=5", "train.async_save=true")
    newest = Path("resumed/checkpoints/step_00000005/optimizer.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")  # its half of the files is read by rank 1, or by rank 0
    resumed = two_ranks(settings, "resumed", "train.async_save=true")
    assert (resumed / "log.txt").read_text().count("step_00000005 is damaged: optimizer.safetensors does not have") == 1
    assert losses(resumed) == losses(unbroken)
    assert_same_bits(tensors(resumed, 12), tensors(unbroken, 12))
    run(settings, "alone_then_two", "train.max_steps=5")
    mixed = two_ranks(settings, "alone_then_two")
    np.testing.assert_allclose([row[1] for row in losses(mixed)], [row[1] for row in losses(alone)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("words", [[], ["lora.rank=2"]], ids=["all-weights", "adapters"])
def test_two_ranks_start_from_the_weights_that_rank_0_alone_reads(settings, words):
    run(settings, "parent", "train.max_steps=3")
    words = ["train.init_from=parent", "train.max_steps=6", *words]
    alone, ranks = run(settings, "alone", *words), two_ranks(settings, "ranks", *words)
    assert losses(alone)[0][1] < 5.4  # not that of new weights, 5.55
    np.testing.assert_allclose([row[1] for row in losses(ranks)], [row[1] for row in losses(alone)], rtol=0, atol=1e-5)


NAN_ON_RANK_1 = """
import math, sys, torch
sys.path.insert(0, {checkout!r})
import checkpoint, distributed, train
from config import ModelConfig, OptimConfig
from data.loader import MicroBatch
from model import GPT
from optim import LossScale, Optimizer

world = distributed.read_world()
with distributed.process_group(world, torch.device("cpu"), 60.0):
    with torch.device("meta" if {sharded} else "cpu"):
        torch.manual_seed(0)
        model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=16, vocab_size=50))
    if {sharded}:
        distributed.shard(model, 2, torch.device("cpu"), world)
        for name, value in model.initial_weights():
            checkpoint.fill({{name: model.get_parameter(name)}}, {{name: value}})
    optimizer = Optimizer(model, OptimConfig(decay_steps=10), world=world)
    wrapped = distributed.wrap(model, torch.device("cpu"), world)
    tokens = torch.randint(50, (4, 17))[2 * world.rank:2 * world.rank + 2]
    batches = [MicroBatch(tokens[i:i + 1, :-1], tokens[i:i + 1, 1:], None, i) for i in range(2)]
    def step():
        return train.train_step(wrapped, optimizer, batches, lr=1e-3, tokens_per_step=64, grad_clip=1.0,
                                scale=LossScale(), step=0, world=world)
    assert not step().skipped
    before = {{k: distributed.local(v).clone() for k, v in (model.state_dict() | optimizer.state_tensors()).items()}}
    poison = None
    if world.rank == 1:
        poison = model.final_norm.register_forward_hook(lambda module, args, output: (output[0] * math.nan, output[1]))
    assert step().skipped and optimizer.updates == 1
    for name, tensor in (model.state_dict() | optimizer.state_tensors()).items():
        assert torch.equal(distributed.local(tensor), before[name]), name
    if poison is not None:
        poison.remove()
    halfway = []
    def places():
        return [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    model.final_norm.register_forward_hook(lambda *_: halfway.append(places()))
    assert not step().skipped
    # gradients gather in DDP's buckets from the first micro-batch on: no second copy of them
    assert {sharded} or halfway == 2 * [places()]
    weights = model.state_dict().values()
    sums = distributed.gather([distributed.whole(p).double().sum().item() for p in weights], world)
    assert sums[0] == sums[1]
    print(f"rank {{world.rank}} unharmed")  # one write: the other rank's may come at the same time
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_a_nan_on_one_rank_changes_nothing_on_any(tmp_path, sharded):
    script = tmp_path / "script.py"
    script.write_text(NAN_ON_RANK_1.format(checkout=str(CHECKOUT), sharded=sharded))
    process = subprocess.Popen([*TORCHRUN, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = finish(process)
    assert process.returncode == 0, output
    assert "rank 0 unharmed" in output and "rank 1 unharmed" in output


def test_a_mistake_under_torchrun_is_one_line_from_rank_0(settings):
    output = finish(process := start(TORCHRUN, settings, "refused", "train.tokens_per_step=48"))
    assert process.returncode == 1  # torchrun's own, whatever its workers return
    assert output.count("error: train.tokens_per_step = 48 does not divide") == 1
    assert "near it: 32 or 64" in output
    assert "exitcode  : 2" in output or "exitcode: 2" in output
    assert not Path("refused").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_at_the_step_boundary_and_exits_0(settings, name):
    long = [*settings, "train.max_steps=100000", "train.eval_every=0", "optim.decay_steps=100000"]
    process = start([sys.executable], long, "stopped", "train.save_every=100000")
    wait_for_step(Path("stopped"), 3, process)
    process.send_signal(getattr(signal, name))
    output = finish(process)
    assert process.returncode == 0, output
    stopped = json.loads(Path("stopped/STOPPED").read_text())
    assert stopped["signal"] == name and f"stopped at step {stopped['step']} ({name})" in output
    if name == "SIGTERM":  # the same command goes on, to the same bits as a run that was never stopped
        step = stopped["step"]
        last = [f"train.max_steps={step + 3}"]
        assert_same_bits(tensors(run([*long, *last], "stopped"), step + 3),
                         tensors(run([*long, *last], "whole"), step + 3))


def test_sigterm_to_torchrun_stops_both_ranks_together(settings):
    long = [*settings, "train.max_steps=100000", "optim.decay_steps=100000", "train.eval_every=0",
            "train.save_every=100000", "train.async_save=true"]  # which waits for what it writes
    process = start([*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGHUP"], long, "stopped")
    wait_for_step(Path("stopped"), 3, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    step = json.loads(Path("stopped/STOPPED").read_text())["step"]
    assert (Path("stopped/checkpoints") / f"step_{step:08d}").exists(), output
    assert f"stopped at step {step}" in output


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_in_a_save_heavy_loop_never_costs_more_than_a_save_interval(settings, kills):
    settings = [*settings, "train.save_every=2", "train.max_steps=100000", "optim.decay_steps=100000",
                "train.eval_every=0", "train.keep=2", "train.log_every=1"]
    rng, run_dir, reached = random.Random(0), Path("killed"), 0
    for _ in range(kills):
        process = start([sys.executable], settings, "killed")
        try:
            wait_for_step(run_dir, reached + 1, process)  # new ones: those behind the checkpoint stand there already
            time.sleep(rng.uniform(0.05, 0.4))  # a step with its save takes a few hundredths of a second
        finally:
            process.kill()
            process.wait()
        logged = [row["step"] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().split("\n")[:-1])]
        newest = max(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_????????"))
        assert newest >= max(logged) - 2
        reached = max(logged)
    assert reached > kills
    killed = run(settings, "killed", f"train.max_steps={reached + 10}")
    whole = run(settings, "whole", f"train.max_steps={reached + 10}")
    assert [row["step"] for row in rows(killed)] == list(range(1, reached + 11))
    assert losses(killed) == losses(whole)
    assert_same_bits(tensors(killed, reached + 10), tensors(whole, reached + 10))
    assert not list((run_dir / "checkpoints").glob(".tmp*")), "leftovers of an interrupted save"


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true"])
def test_a_run_that_nobody_listens_to_prepares_trains_and_saves(settings, streams):
    Path("text.txt").write_text(Path("text.txt").read_text() * 2000)  # large enough for a progress bar
    words = [sys.executable, str(CHECKOUT / "train.py"), *settings, "train.out_dir=alone", "train.max_steps=4",
             "train.eval_tokens=256"]
    script = f'("$@"; echo $? > status) {streams}'
    subprocess.run(["sh", "-c", script, "sh", *words], timeout=120)
    while not Path("status").exists():  # of a pipe sh waits for the last command only
        time.sleep(0.1)
    time.sleep(0.1)
    assert Path("status").read_text() == "0\n"
    assert [row["step"] for row in rows(Path("alone"))] == [1, 2, 3, 4]
    assert Path("alone/checkpoints/step_00000004/manifest.json").exists()


def test_a_second_run_in_the_same_folder_is_refused(settings):
    process = start([sys.executable], [*settings, "train.max_steps=100000", "optim.decay_steps=100000",
                                       "train.eval_every=0"], "shared")
    try:
        wait_for_step(Path("shared"), 1, process)
        second = start([sys.executable], settings, "shared")
        output = finish(second)
    finally:
        process.kill()
        process.wait()
    assert second.returncode == 2
    assert str(process.pid) in output and output.count("error:") == 1


def test_a_full_disk_at_every_save_keeps_training_and_exits_1(settings):
    if not hasattr(os, "fork"):
        pytest.skip("no fork to limit the file size of the child alone: a full disk during a run is unchecked")
    limited = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); " \
              "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:]; " \
              "sys.path.insert(0, str(__import__('pathlib').Path(sys.argv[0]).parent)); " \
              "runpy.run_path(sys.argv[0], run_name='__main__')"
    process = start([sys.executable, "-c", limited], settings, "full")
    output = finish(process)
    assert process.returncode == 1, output
    assert "warning: checkpoint of step 4 was not saved" in output
    assert "error: the last checkpoint could not be saved" in output
    assert [row["step"] for row in rows(Path("full"))] == list(range(1, 13))
    assert not any(Path("full/checkpoints").iterdir())


# ---- A rank that is lost or hangs ------------------------------------------------------------------------------------

def with_trouble(code: str) -> str:
    """A train.py of which rank 1, in its first life, does something before the batch of step 6 is read."""
    path = Path("trouble.py")
    path.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(CHECKOUT)!r})
import data.loader, train
from config import exit_cleanly
ids = data.loader.TrainLoader.window_ids
def window_ids(self, step):
    if step == 5 and os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        {code}
    return ids(self, step)
data.loader.TrainLoader.window_ids = window_ids
exit_cleanly(train.main)
""")
    return str(path)


def test_a_killed_rank_is_started_again_and_the_run_has_an_unbroken_ones_weights(settings, monkeypatch):
    """With the words of docs/PRETRAINING.md; without them torchrun's restarts fail two times in three."""
    words = "--max-restarts=1 --nnodes=1 --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", *words]
    unbroken = two_ranks(settings, "unbroken")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    command = [*torchrun, with_trouble("os.kill(os.getpid(), signal.SIGKILL)"), *settings, "train.out_dir=killed"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = finish(process, 200)
    assert process.returncode == 0 and "going on from step 4" in output, output
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in output
    assert losses(Path("killed")) == losses(unbroken)  # no step twice either
    assert_same_bits(tensors(Path("killed"), 12), tensors(unbroken, 12))


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc: a lost node is unchecked")
def test_of_two_nodes_one_is_lost_and_the_other_goes_on_alone(settings, monkeypatch):
    """torchrun's elastic mode: 1 to 2 nodes, here of one rank each. The batch and the losses stay what they are."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    keep_alive = "join_timeout=60,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3"
    words = [*TORCHRUN[:3], "--nnodes=1:2", "--nproc_per_node=1", "--rdzv-id=1", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf", keep_alive, "--max-restarts=3",
             str(CHECKOUT / "train.py"), *settings, "train.out_dir=elastic", "train.max_steps=60",
             "optim.decay_steps=60", "train.timeout_s=30"]
    nodes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)]
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("localhost", port)) and time.monotonic() < deadline:
            time.sleep(0.2)  # the first holds the rendezvous, the second will be lost
        nodes.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_for_step(Path("elastic"), 6, nodes[0])
        worker = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
        nodes[1].kill()
        output = finish(nodes[0], 150)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert nodes[0].returncode == 0, output
    log = Path("elastic/log.txt").read_text()
    assert "ranks 2" in log and "ranks 1" in log and "going on from step" in log
    whole = run(settings, "whole", "train.max_steps=60", "optim.decay_steps=60")
    assert [row["step"] for row in rows(Path("elastic"))] == list(range(1, 61))
    np.testing.assert_allclose([row["loss"] for row in rows(Path("elastic"))], [row["loss"] for row in rows(whole)],
                               rtol=0, atol=1e-4)  # float32 over 60 steps, sums in another order


def test_restarts_that_mostly_fail_are_warned_of(settings):
    command = [*TORCHRUN, "--max-restarts=1", str(CHECKOUT / "train.py"), *settings, "train.out_dir=warned",
               "train.max_steps=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finish(process).count("warning: torchrun's restarts mostly fail") == 1


def test_a_hung_rank_is_named_with_its_phase_and_every_stack_is_written(settings):
    command = [*TORCHRUN, with_trouble("time.sleep(600)"), *settings, "train.out_dir=hung", "train.timeout_s=6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 90
    stacks = [Path(f"hung/stacks/rank_{rank}.txt") for rank in (0, 1)]
    while time.monotonic() < deadline and process.poll() is None and not all(path.exists() for path in stacks):
        time.sleep(0.1)
    time.sleep(3)  # rank 0 gives up after timeout_s; torchrun would wait half a minute more for the one that hangs
    process.terminate()
    output = finish(process)
    for path in stacks:
        assert "has been in step 6" in path.read_text() or "the batch of step 6 for" in path.read_text(), output
    assert "in train_step" in stacks[0].read_text() and "in window_ids" in stacks[1].read_text()
    assert "warning: rank 1 has been in" in output and "warning: rank 0 has been in" in output


def test_an_error_of_one_rank_ends_all_at_once_with_one_message(settings):
    command = [*TORCHRUN, with_trouble("raise ValueError('no such luck')"), *settings, "train.out_dir=broken"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = finish(process)
    assert process.returncode == 1 and time.monotonic() - started < 100  # not after timeout_s, ten minutes
    assert output.count("ValueError: no such luck") == 1
    assert [row["step"] for row in rows(Path("broken"))] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(two_ranks(settings, "broken"))] == list(range(1, 13))
