"""bench.py gpu on the CPU: each part with tiny models, most of their runs in this process; and that a part which fails,
hangs or comes too late takes nothing with it."""

import dataclasses
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import start
import train
from benchmarks import gpu, kernels, measure
from config import Config, MachineError, UserError, parse_arguments
from distributed import World
from tests.test_train import NoSignal

TINY = ("model.n_layer=1", "model.n_head=2", "model.n_kv_head=2", "model.n_embd=32", "model.mlp_hidden=64",
        "model.max_seq_len=32", "train.tokens_per_step=128", "train.dtype=float32")

# From outside a nanoGPT: what the part calls of it. More than two sequences at once are too much for its memory.
PEER = """
import torch
from types import SimpleNamespace as GPTConfig

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.vocab_size, config.block_size, config.n_layer, config.bias) == (50304, 32, 1, True)
        self.table = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)

    def forward(self, tokens, targets):
        if len(tokens) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 12 GiB")
        assert torch.equal(tokens.flatten()[1:], targets.flatten()[:-1])
        return None, torch.nn.functional.cross_entropy(self.table.expand(targets.numel(), -1), targets.flatten())
"""


@pytest.fixture
def plan(tmp_path, monkeypatch) -> gpu.Plan:
    monkeypatch.setattr(measure, "WATCHED_S", 0.0)
    (tmp_path / "parts").mkdir()
    (tmp_path / "text.txt").write_text("the cat sat on the mat and slept, " * 400)
    return gpu.Plan(device="cpu", devices=2, folder=str(tmp_path / "parts"), kernels=("auto", "torch"), micro_batch=4,
                    steps=2, text_bytes=1e5, rows=8, words={
        "all": TINY, "demo": (f"data.source={tmp_path}/text.txt", "data.tokenizer=bytes", "train.max_steps=30"),
        "text": ("data.tokenizer=bpe:270", "model.vocab_size=270", "optim.lr=0.03", "train.max_steps=30")})


@pytest.fixture
def runs_in_this_process(monkeypatch):
    """A process takes seconds to start; torchrun's are real."""
    run_to_end = measure.run_to_end

    def in_this_process(*arguments: str, cwd: Path) -> SimpleNamespace:
        if "torch.distributed.run" in arguments:
            return run_to_end(*arguments, cwd=cwd)
        words = list(arguments[arguments.index(str(gpu.CHECKOUT / "train.py")) + 1:])
        try:
            config, given = parse_arguments(words, default_file=train.DEMO)
            train.train(config, given, world=World(), stop=NoSignal())
        except (UserError, MachineError) as error:
            raise MachineError(f"python train.py failed: error: {error}") from None
        return SimpleNamespace(seconds=1.0)

    monkeypatch.setattr(measure, "run_to_end", in_this_process)
    yield
    torch.use_deterministic_algorithms(False)


def found_by(name: str, plan: gpu.Plan) -> dict[str | None, dict]:
    """What a part finds, through JSON as from its process."""
    return {subject: json.loads(json.dumps(found)) for subject, found in gpu.PARTS[name][0](plan)}


# ---- Each part -------------------------------------------------------------------------------------------------------

def test_the_card_is_described_and_multiplies(plan, monkeypatch):
    assert found_by("card", plan)["machine"]["torch"] == torch.__version__
    monkeypatch.setattr(torch, "ones", torch.zeros)
    assert list(gpu.card(plan))[-1] == ("machine", {"failed": "a product of ones is wrong"})


def test_kernels_are_checked_at_each_width_and_one_that_is_wrong_fails(plan, monkeypatch):
    found = found_by("parity", plan)
    assert "odd, float32" in found and len(found) >= 3
    assert all("attention" in case["right"] and "failed" not in case for case in found.values())
    monkeypatch.setattr(gpu.self_check, "ALLOWANCE", dict.fromkeys(gpu.self_check.ALLOWANCE, -1.0))
    assert "attention: relative error" in found_by("parity", plan)["odd, float32"]["failed"]
    assert found_by("parity", dataclasses.replace(plan, kernels=("triton",))) == {None: {"left out": "no CUDA device"}}


def test_a_cuda_card_is_described(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2 ** 30))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    found = found_by("card", dataclasses.replace(plan, device="cuda", devices=1))["machine"]
    assert (found["card"], found["compute capability"], found["memory GiB"]) == ("NVIDIA H100", "9.0", "80.0")


@pytest.mark.parametrize(("gib", "micro_batch"), [(80, 64), (40, 32), (24, 16)])
def test_micro_batches_fit_the_card_and_are_halved_once(gib, micro_batch, plan, monkeypatch):
    def run(*, micro_batch: int) -> dict:
        tried.append(micro_batch)
        raise MachineError("run x: out of memory: lower train.micro_batch")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        total_memory=gib * 2 ** 30))
    plan, tried = dataclasses.replace(plan, device="cuda", micro_batch=64), []
    assert gpu.fitting(plan, lambda micro_batch: {"loss": 1.0}) == {"micro-batch": micro_batch, "loss": 1.0}
    with pytest.raises(MachineError, match="out of memory"):
        gpu.fitting(plan, run)
    assert tried == [micro_batch, micro_batch // 2]


def test_tritons_kernels_are_what_is_checked_where_they_run(plan, kernel_device):
    plan = dataclasses.replace(plan, device=kernel_device.type, kernels=("triton",), parity=("gpt2_124m",))
    (case,) = found_by("parity", plan).values()
    assert sorted(case["right"]) == ["attention", "layer_norm", "linear_cross_entropy"] and "failed" not in case


@pytest.mark.parametrize(("script", "found"), [
    ('shift 4; "$@"; echo ERROR SUMMARY: 0 errors', {"memcheck": {"says": "ERROR SUMMARY: 0 errors"}}),
    ("echo ERROR SUMMARY: 3 errors; exit 9", {"memcheck": {"failed": "status 9: ERROR SUMMARY: 3 errors",
                                                           "output": "ERROR SUMMARY: 3 errors\n"}}),
    ("echo ERROR SUMMARY: 0 errors", {"memcheck": {"failed": "status 0: ERROR SUMMARY: 0 errors",
                                                   "output": "ERROR SUMMARY: 0 errors\n"}}),  # nothing ran under it
    ("echo Device not supported; exit 1",
     {None: {"left out": "compute-sanitizer cannot watch this GPU: Device not supported"}})])
def test_memcheck_runs_the_kernels_under_compute_sanitizer(script, found, plan, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert found_by("memcheck", plan) == found


@pytest.mark.parametrize("part", ["demo", "text"])
def test_runs_on_text_learn(part, plan, runs_in_this_process, monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("print('the cat sat on the mat')\n" * 2000)
    (tmp_path / "two.py").write_bytes(b"# \xff is no UTF-8\n")
    monkeypatch.setattr(gpu.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    found = found_by(part, plan)[part]
    losses = list(found["loss of step"].values())
    assert len(losses) == 30 and losses[-1] == found["loss"] < 0.8 * losses[0] and "failed" not in found
    assert found["tokens/s"] > 0 and found["kernels"].startswith("cpu for attention")
    if part == "demo":
        assert found["bits/byte"] > 0 and found["gzip's bits/byte"] > 0


@pytest.mark.parametrize("last", [2.5, None])  # None: a skipped step
def test_a_run_that_does_not_learn_fails(last):
    found = {"loss of step": {1: 3.0, 2: 2.0, 3: last}}
    assert gpu.learnt(found) == found | {"failed": f"loss 3.0 became {last}"}


def test_gpt2_is_compared_by_its_kernels_and_with_nanogpt(plan, runs_in_this_process, tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    found = found_by("gpt2", dataclasses.replace(plan, peer=str(tmp_path)))
    ours, torchs, peer = (found[who] for who in ("gpt2_124m, auto", "gpt2_124m, torch", "nanoGPT"))
    assert ours["micro-batch"] == torchs["micro-batch"] == 4 and peer["micro-batch"] == 2  # halved
    assert list(ours["loss of step"]) == list(peer["loss of step"]) == ["1", "2"]
    assert ours["loss"] == pytest.approx(torchs["loss"], rel=1e-5)
    assert peer["loss of step"]["1"] == pytest.approx(10.8258, abs=1e-4)  # ln 50,304
    ratio = found["gpt2_124m, auto / nanoGPT"]["ratio of tokens/s"]
    assert ratio == ours["tokens/s"] / peer["tokens/s"]
    assert "torch (asked for)" in torchs["kernels"] and found["gpt2_124m, auto / gpt2_124m, torch"]


def test_a_contender_of_gpt2_that_fails_does_not_end_the_part(plan, runs_in_this_process, tmp_path):
    found = found_by("gpt2", dataclasses.replace(plan, kernels=("triton", "wrong", "torch"), peer=str(tmp_path)))
    assert found["gpt2_124m, triton"] == {"left out": "no CUDA device"}
    assert found["gpt2_124m, wrong"] == {
        "failed": "run gpt2_124m_wrong: train.kernels = 'wrong' should be one of auto, triton, torch"}
    assert found["nanoGPT"] == {"left out": "a process that was measured ended early: ModuleNotFoundError: No module "
                                            "named 'model'"}
    assert found["gpt2_124m, torch"]["tokens/s"] > 0


def test_the_modern_model_is_compared_by_its_kernels(plan, runs_in_this_process):
    assert list(found_by("modern", plan)) == ["modern_124m, auto", "modern_124m, torch",
                                              "modern_124m, auto / modern_124m, torch"]


def test_operations_are_compared_and_what_failed_is_told(plan, monkeypatch):
    def choose(device: torch.device, dtype: torch.dtype) -> str:
        kernels.kernels.choose_backends(dict.fromkeys(("attention", "rms_norm", "linear_cross_entropy"), "cpu"))
        return "chosen"

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(kernels, "choose_backends", choose)
    monkeypatch.setattr(kernels, "seconds_per_call", lambda work: (work(), 0.5)[1])
    monkeypatch.setattr(kernels, "TABLE_ROWS", 384)
    monkeypatch.setattr(kernels, "VOCAB_SIZE", 300)
    monkeypatch.setattr(kernels.F, "rms_norm", fail)  # PyTorch's
    monkeypatch.setattr(kernels.kernels.cpu, "linear_cross_entropy", fail)  # ours
    found = found_by("kernels", plan)
    assert found["setting"]["kernels"] == "chosen" and found["setting"]["time"] == "of calls, by the clock"
    assert found["cpu: attention causal 1 x 8 x 12 x 64"]["forward ms"] == [500.0]
    assert found["cpu: attention causal 1 x 8 x 12 x 64 / PyTorch"]["ratio of forward ms"] == [1.0]
    assert found["PyTorch: rms_norm 8 x 768"] == {"left out": "RuntimeError: no luck"}
    assert found["cpu: rms_norm 8 x 768 / copy"] and "cpu: rms_norm 8 x 768 / PyTorch" not in found
    assert found["cpu: linear_cross_entropy 8 x 768 x 384"] == {"failed": "RuntimeError: no luck"}
    assert found["torch: linear_cross_entropy 8 x 768 x 384"]["TFLOP/s"]


def test_a_resumed_run_is_compared_bit_by_bit(plan, runs_in_this_process, monkeypatch):
    assert found_by("resume", plan) == {
        "resume": {"compared": "12 losses, model.safetensors, optimizer.safetensors"}}

    def train_again(plan: gpu.Plan, name: str, *words: str) -> dict:
        return {"loss of step": {step: 4.0 if (step, name) == (9, "resumed") else 3.0 for step in range(1, 13)}}

    monkeypatch.setattr(gpu, "train", train_again)
    file = next(Path(plan.folder, "resumed").glob("checkpoints/step_00000012/optimizer.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    failed = found_by("resume", plan)["resume"]["failed"]
    assert failed == "not the same bits: optimizer.safetensors, the loss of step 9"


def test_two_ranks_are_compared_with_one(plan, runs_in_this_process, monkeypatch):
    assert found_by("ranks", plan)["two ranks, one rank"]["largest difference of losses"] <= 1e-5
    assert "ranks 2" in Path(plan.folder, "two_ranks", "log.txt").read_text()
    assert found_by("ranks", dataclasses.replace(plan, devices=1)) == {None: {"left out": "1 device here"}}
    monkeypatch.setattr(gpu, "train", lambda plan, name, *words, launcher=(): {
        "loss of step": {1: 3.0, 2: 2.5 if launcher else 2.25}})
    assert found_by("ranks", plan)["two ranks, one rank"]["failed"] == "losses are 0.25 apart"


@pytest.mark.parametrize(("part", "runs"), [("demo", 1), ("gpt2", 2), ("modern", 2), ("resume", 3), ("ranks", 2),
                                            ("text", 1)])
def test_the_words_of_the_real_runs_fit_together(part, runs, tmp_path, monkeypatch):
    """Not those of the small plan above: what a GPU will get, up to the device."""
    def read_words(plan: gpu.Plan, name: str, *words: str, launcher: tuple[str, ...] = ()) -> dict:
        config, given = parse_arguments([*words, f"train.out_dir={tmp_path}/{name}"], default_file=train.DEMO)
        world = World(size=2, local_size=2) if launcher else World()
        configs.append(start.inherit(config, given, None, world))
        return {"tokens/s": 1.0, "loss of step": {1: 10.0, 2: 1.0}}

    configs: list[Config] = []
    monkeypatch.setattr(gpu, "train", read_words)
    assert not any("failed" in found for _, found in gpu.PARTS[part][0](gpu.Plan(
        device="cpu", devices=2, folder=str(tmp_path), kernels=("auto", "torch"), text_bytes=1e4)))
    assert len(configs) == runs
    if part in ("gpt2", "modern", "text"):
        for config in configs:
            assert (config.model.n_layer, config.model.n_embd, config.model.vocab_size) == (12, 768, 50_257)
            assert config.train.tokens_per_step == config.train.micro_batch * config.model.max_seq_len == 65_536
            assert config.train.max_steps == (100 if part == "text" else 30)


# ---- The command -----------------------------------------------------------------------------------------------------

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print('["machine", {"child": %d, "first s": 1.5}]' % child.pid, flush=True)
print('["half a li', end="", flush=True)
time.sleep(600)
"""


def test_parts_that_fail_or_hang_or_come_too_late_leave_the_others_and_the_json(plan, monkeypatch, tmp_path, capsys):
    json_file, command = tmp_path / "gpu.json", gpu.part_command

    def command_of(name: str, plan: gpu.Plan) -> list[str]:
        verdicts[name] = json.loads(json_file.read_text())["setting"]["parts"] if json_file.exists() else {}
        if name == "text":
            monkeypatch.setattr(gpu, "TOTAL_S", 0)
        scripts = {"parity": HANGS, "demo": "print('[\"demo\", {\"loss\": 3.5, \"failed\": \"no luck\"}]'); 1 / 0",
                   "memcheck": "print('[null, {\"left out\": \"none here\"}]')", "resume": "import os; os.abort()"}
        return [sys.executable, "-c", scripts[name]] if name in scripts else command(name, plan)

    verdicts = {}
    monkeypatch.setattr(gpu, "PLAN", plan)
    monkeypatch.setattr(gpu, "part_command", command_of)
    monkeypatch.setitem(gpu.PARTS, "parity", (gpu.parity, 1.0))
    with pytest.raises(MachineError, match="^parity, demo, resume failed: killed after 1 s$"):
        bench.main(["gpu", "--parts", "card", "parity", "memcheck", "demo", "resume", "--json", str(json_file)])
    content = json.loads(json_file.read_text())
    parts = content["setting"]["parts"]
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "card": "pass", "parity": "fail", "memcheck": "left out", "demo": "fail", "resume": "fail"}
    assert [list(done) for done in verdicts.values()] == [
        [], ["card"], ["card", "parity"], ["card", "parity", "memcheck"], ["card", "parity", "memcheck", "demo"]]
    assert parts["demo"]["why"] == "status 1: ZeroDivisionError: division by zero"
    assert parts["demo"]["log"].startswith("Traceback")
    assert parts["resume"]["why"].startswith("status -6") and parts["memcheck"]["why"] == "none here"
    figures = {(row["subject"], row["quantity"]): row["median"] for row in content["figures"]}
    assert figures["machine", "first s"] == 1.5 and figures["demo", "loss"] == 3.5  # found before the end
    time.sleep(0.1)  # until the system has ended it
    assert not Path(f"/proc/{int(figures['machine', 'child'])}/fd").exists() or \
        Path(f"/proc/{int(figures['machine', 'child'])}/stat").read_text().split()[2] == "Z"
    assert "\nmemcheck  left out     0 s  none here\n" in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_of_all_is_left_out(plan, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PLAN", plan)
    monkeypatch.setattr(gpu, "TOTAL_S", 0.5)
    monkeypatch.setattr(gpu, "part_command", lambda name, plan: ["sleep", "60"])
    bench.main(["gpu", "--parts", "card", "text", "--json", str(tmp_path / "gpu.json")])
    parts = json.loads((tmp_path / "gpu.json").read_text())["setting"]["parts"]
    assert [part["verdict"] for part in parts.values()] == ["left out", "left out"]
    assert parts["card"]["why"].endswith("the end of all 0.5 s") and parts["text"]["seconds"] == 0.0


def test_a_full_disk_does_not_end_the_parts_but_a_folder_that_cannot_be_written_is_known_before(
        plan, monkeypatch, tmp_path, capsys):
    failing = iter([True, False, True, False, True, False, False])

    def write_whole(path: Path, content: str) -> None:
        if next(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(content)

    monkeypatch.setattr(gpu, "PLAN", plan)
    monkeypatch.setattr(gpu, "part_command", lambda name, plan: ["true"])
    monkeypatch.setattr(measure.files, "write_whole", write_whole)
    words = ["gpu", "--parts", "card", "demo", "text", "--json", str(tmp_path / "gpu.json")]
    with pytest.raises(MachineError, match="gpu.json' failed: No space left on device"):
        bench.main(words)
    assert "card" not in capsys.readouterr().err
    bench.main(words)
    assert capsys.readouterr().err.count("failed: No space left on device") == 2
    assert list(json.loads((tmp_path / "gpu.json").read_text())["setting"]["parts"]) == ["card", "demo", "text"]


def test_a_signal_ends_the_part_and_leaves_what_was_measured(plan, monkeypatch, tmp_path):
    def command_of(name: str, plan: gpu.Plan) -> list[str]:
        scripts = {"card": """print('["machine", {"s": 1.5}]')""",
                   "demo": f"import os, signal, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
                           "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"}
        return [sys.executable, "-c", scripts[name]]

    monkeypatch.setattr(gpu, "PLAN", plan)
    monkeypatch.setattr(gpu, "part_command", command_of)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench.main(["gpu", "--parts", "card", "demo", "text", "--json", str(tmp_path / "gpu.json")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert list(content["setting"]["parts"]) == ["card"] and content["figures"][0]["median"] == 1.5
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the refusal where there is none is unchecked")
def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(measure, "WATCHED_S", 0.0)
    with pytest.raises(UserError) as error:  # exit status 2
        bench.main(["gpu"])
    assert str(error.value) == (f"bench.py gpu: this PyTorch ({torch.__version__}) sees no CUDA device; run it where "
                                "there is one, with a PyTorch built for it")
