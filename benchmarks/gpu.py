"""bench.py gpu: the first ten minutes on a new GPU, in one command: what runs, what is right, how fast it is.

Each part is a process of its own with a time limit, so that one that fails, hangs or breaks its CUDA context takes
nothing with it; the JSON is written again after each. A part is a generator of (subject, found): numbers, or lists of
them, are figures; "failed" says what did not work, "left out" why nothing was measured, the rest is kept as it is. What
it has found so far survives its end. docs/GPU.md says how to read the result.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cli
import curves
import devices
import gpus
import kernels
import metrics
from benchmarks import kernels as kernels_benchmark
from benchmarks import measure
from benchmarks.measure import CHECKOUT, NANOGPT
from benchmarks.train import speed
from config import Config, MachineError, ModelConfig, UserError, exit_cleanly, load_run_config, parse_arguments
from data.shards import HEADER_BYTES
from data.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from data.tokenizer_file import BYTE_RANKS
from data.write_shards import ShardWriter
from kernels import fastest, self_check
from model import flops_per_token, padded_vocab_size

TOTAL_S = 480  # what does not fit is cut from the end: text first, then ranks and resume
TOKENS_PER_STEP = 65_536  # one micro-batch of 64 x 1024
GPT2_IDS = 50_257
RANDOM_TOKENS = 4_000_000  # 61 steps of TOKENS_PER_STEP
LEARNT = 0.8  # of its first loss at most is what a run on text ends with, else it has learnt nothing
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
Found = Iterator[tuple[str | None, dict]]

NANOGPT_STEPS = """
import time, numpy, torch
told = json.loads(sys.argv[1])
from model import GPT, GPTConfig
torch.manual_seed(1337)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
tokens = numpy.memmap(told["file"], dtype="<u2", mode="r", offset=told["offset"])
model = GPT(GPTConfig(**told["shape"])).to(told["device"])
optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), told["device"])
if told["device"] == "cuda":
    model = torch.compile(model)
B, T = told["micro_batch"], told["shape"]["block_size"]

def work(step):
    started = time.perf_counter()
    for i in range(told["accumulation"]):
        first = (step * told["accumulation"] + i) * B * T % (len(tokens) - B * T)
        piece = torch.from_numpy(tokens[first:first + B * T + 1].astype("int64")).to(told["device"])
        with torch.autocast(told["device"], dtype=getattr(torch, told["dtype"])):
            _, loss = model(piece[:-1].view(B, T), piece[1:].view(B, T))
        (loss / told["accumulation"]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss = loss.item()  # waits for the device
    peak = torch.cuda.max_memory_allocated() if told["device"] == "cuda" else 0
    return {"seconds": time.perf_counter() - started, "loss": loss, "peak": peak}

serve(work)
"""


@dataclass(frozen=True)
class Plan:
    """What the parts run. Tests have one for the CPU, with smaller models."""

    device: str = "cuda"
    devices: int = 0
    folder: str = ""  # of all parts, deleted at the end
    peer: str | None = None
    kernels: tuple[str, ...] = ("triton", "torch")  # train.kernels of the runs that are compared; the first is checked
    parity: tuple[str, ...] = ("gpt2_124m", "modern_124m", "odd")
    rivals: bool = True  # whether parity looks at the other backends too
    micro_batch: int = 64
    steps: int = 30
    text_bytes: float = 20e6
    rows: int = 65_536  # of bench.py kernels
    repeats: int = 1
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)  # overrides of all runs, and of one by its name


PLAN = Plan()


# ---- The parts, in processes of their own ----------------------------------------------------------------------------

def card(plan: Plan) -> Found:
    """Versions, and a first product on the device."""
    found = {package: measure.version(package) for package in ("triton", "numpy", "tiktoken", "flash_attn")}
    found |= {"torch": torch.__version__, "CUDA": torch.version.cuda, "C compiler": shutil.which("gcc"),
              "commit": cli.commit(CHECKOUT), "devices": plan.devices}
    if plan.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "compute capability": f"{card.major}.{card.minor}",
                  "multiprocessors": card.multi_processor_count, "memory GiB": round(card.total_memory / 2 ** 30, 1),
                  "cuDNN": torch.backends.cudnn.version()}
        with suppress(OSError):
            found["nvidia-smi"] = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks_throttle_reasons.active",
                 "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    yield "machine", {name: str(value) for name, value in found.items()}
    ones = torch.ones(64, 64, device=plan.device)
    if (ones @ ones).sum().item() != 64 ** 3:
        yield "machine", {"failed": "a product of ones is wrong"}


def parity(plan: Plan) -> Found:
    """The self-check's cases, against float64, at the widths of our configs and at odd ones."""
    device = torch.device(plan.device)
    if plan.kernels[0] == "triton" and (why := kernels.why_no_triton(device)):
        yield None, {"left out": why}
        return
    odd = ModelConfig(n_head=4, n_kv_head=2, n_embd=240, vocab_size=1100, norm="rmsnorm", position="rope",
                      mlp="swiglu", bias=False, qk_norm=True, logit_softcap=15.0, window=20)
    for name in plan.parity:
        model = odd if name == "odd" else config_of(plan, name).model
        dtypes = [devices.choose_dtype("auto", device)[0], *[torch.float32] * (name == "odd")]
        for dtype in dict.fromkeys(dtypes):
            rivals = fastest.rivals("auto", model, device=device, documents=name == "odd", compiles=True) \
                if plan.rivals else {}
            verdicts = self_check.verdicts(plan.kernels[0], model, dtype=dtype, device=device, rivals=rivals,
                                           table_rows=padded_vocab_size(model.vocab_size))
            own = {op: reason for op, backends in verdicts.items()
                   if (reason := next(iter(backends.values()))) != self_check.AS_FAST}
            wrong = [f"{op}: {reason}" for op, reason in own.items() if reason]
            others = {f"{op} by {backend}": reason or "right" for op, backends in verdicts.items()
                      for backend, reason in list(backends.items())[1:] if backend != "torch"}
            yield f"{name}, {str(dtype).removeprefix('torch.')}", {
                "right": [op for op, reason in own.items() if not reason], **({"rivals": others} if others else {}),
                **({"failed": "; ".join(wrong)} if wrong else {})}


def memcheck(plan: Plan) -> Found:
    """The odd cases of parity under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        yield None, {"left out": "no compute-sanitizer here"}
        return
    command = part_command("parity", dataclasses.replace(plan, parity=("odd",), rivals=False))
    done = subprocess.run([tool, "--tool", "memcheck", "--error-exitcode", "9", *command], cwd=CHECKOUT,
                          capture_output=True, text=True, errors="replace",
                          env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # each tensor an allocation
    said = done.stderr + done.stdout
    if done.returncode and "not supported" in said:
        yield None, {"left out": f"compute-sanitizer cannot watch this GPU: {measure.last_line(said)}"}
    elif done.returncode or '"right"' not in said or '"failed"' in said:
        yield "memcheck", {"failed": f"status {done.returncode}: {measure.last_line(said)}", "output": said[-2000:]}
    else:
        yield "memcheck", {"says": measure.last_line(said)}


def demo(plan: Plan) -> Found:
    """python train.py, as README begins."""
    yield "demo", learnt(train(plan, "demo", str(CHECKOUT / "configs" / "demo.toml"), f"data.dir={plan.folder}/stdlib"))


def compare(config: str, plan: Plan) -> Found:
    """A config of 124M on random tokens by each of plan.kernels, GPT-2 also beside nanoGPT's model, compiled and over
    SDPA. The ratio of the first to each other at once, since time may run out."""
    data, rate = random_tokens(plan), None
    runs = {f"{config}, {backend}": partial(train_config, plan, f"{config}_{backend}", config, f"data.dir={data}",
                                            f"data.tokenizer={data}/tokenizer.json", f"train.kernels={backend}")
            for backend in plan.kernels}
    ours, *others = runs
    if plan.peer and config == "gpt2_124m":
        runs[NANOGPT], others = partial(train_nanogpt, plan, data), [NANOGPT, *others]
    for who in (ours, *others):
        no_triton = kernels.why_no_triton(torch.device(plan.device)) if who.endswith("triton") else None
        try:
            found = fitting(plan, runs[who])
        except (MachineError, UserError) as error:
            yield who, {"left out" if no_triton or who == NANOGPT else "failed": no_triton or str(error)}
            continue
        yield who, found
        if who == ours:
            rate = found["tokens/s"]
        elif rate is not None:
            yield f"{ours} / {who}", {"ratio of tokens/s": rate / found["tokens/s"]}


def operations(plan: Plan) -> Found:
    """bench.py kernels at GPT-2 124M's width."""
    figures, told = measure.Figures(), set()
    args = argparse.Namespace(ops=kernels.TRITON, device=plan.device, dtype=None, rows=plan.rows, repeats=plan.repeats,
                              widths=kernels_benchmark.GPT2_WIDTHS[:1], contexts=(1024,), head_dims=(64,))
    for setting in kernels_benchmark.measured(args, figures):
        lost = {who: {"failed" if who in figures.failed else "left out": why} for who, why in figures.left_out.items()}
        for subject, found in ({"setting": setting} | figures.samples | lost).items():
            if subject not in told:
                yield subject, found
        told |= {"setting", *figures.samples, *lost}


def resume(plan: Plan) -> Found:
    """12 steps at once, and 5 and 7 more: the same losses, weights and moments, bit for bit."""
    words = small_words(plan, "train.deterministic=true")
    unbroken = train(plan, "unbroken", *words)["loss of step"]
    train(plan, "resumed", *words, "train.max_steps=5")
    resumed = train(plan, "resumed", *words)["loss of step"]
    files, others = (sorted(Path(plan.folder, name).glob("checkpoints/step_00000012/*.safetensors"))
                     for name in ("unbroken", "resumed"))
    different = [a.name for a, b in zip(files, others, strict=True) if a.read_bytes() != b.read_bytes()]
    different += [f"the loss of step {step}" for step in unbroken if unbroken[step] != resumed[step]]
    yield "resume", {"compared": ", ".join([f"{len(unbroken)} losses", *(file.name for file in files)])} | (
        {"failed": f"not the same bits: {', '.join(different)}"} if different else {})


def ranks(plan: Plan) -> Found:
    """Two ranks and one, in float32: the same losses, to 1e-5."""
    if plan.devices < 2:
        yield None, {"left out": f"{plan.devices} device here"}
        return
    words = small_words(plan, "train.dtype=float32", "train.timeout_s=30")
    one = train(plan, "one_rank", *words)["loss of step"]
    two = train(plan, "two_ranks", *words, launcher=TORCHRUN)["loss of step"]
    apart = max(abs(one[step] - two[step]) for step in one)
    yield "two ranks, one rank", {"largest difference of losses": apart} | (
        {} if apart <= 1e-5 else {"failed": f"losses are {apart:.2g} apart"})


def text(plan: Plan) -> Found:
    """100 steps of GPT-2 124M on the Python sources that are installed here."""
    source = Path(plan.folder, "text.jsonl")
    with open(source, "w", encoding="utf-8") as file:
        for document in measure.take(python_sources(), size=plan.text_bytes):
            file.write(json.dumps({"text": document}) + "\n")
    yield "text", learnt(fitting(plan, partial(
        train_config, plan, "text", "gpt2_124m", f"data.dir={plan.folder}/text_shards", f"data.source={source}",
        "data.tokenizer=bpe:8192", "train.max_steps=100", "optim.lr=1e-3")))


PARTS: dict[str, tuple[Callable[[Plan], Found], float]] = {  # in order, with their time limits in s
    "card": (card, 20), "parity": (parity, 50), "memcheck": (memcheck, 90), "demo": (demo, 100),
    "gpt2": (partial(compare, "gpt2_124m"), 150), "modern": (partial(compare, "modern_124m"), 100),
    "kernels": (operations, 80), "resume": (resume, 45), "ranks": (ranks, 45), "text": (text, 60)}


# ---- What they share -------------------------------------------------------------------------------------------------

def train(plan: Plan, name: str, *words: str, launcher: Sequence[str] = ()) -> dict:
    """A run of train.py as its users start it: its speed, last loss, memory, losses, and what its log says of its
    kernels. Raises MachineError."""
    run_dir = Path(plan.folder, name)
    try:
        done = measure.run_to_end(sys.executable, *launcher, str(CHECKOUT / "train.py"), *words, "train.log_every=1",
                                  f"train.device={plan.device}", f"train.out_dir={run_dir}", *plan.words.get("all", ()),
                                  *plan.words.get(name, ()), cwd=Path(plan.folder))
    except MachineError as error:
        raise MachineError(f"run {name}: {str(error).partition(' failed: ')[2].removeprefix('error: ')}") from None
    run, log = curves.read_run(str(run_dir)), (run_dir / "log.txt").read_text()
    found = speed(run.train, load_run_config(run_dir).train.tokens_per_step)
    found |= {"wall s": done.seconds, "loss": run.train[-1]["loss"]}
    for quantity, pattern in (("peak MiB", r"peak memory (\d+) MiB"), ("bits/byte", r"\| ([\d.]+) bits/byte"),
                              ("gzip's bits/byte", r"gzip ([\d.]+) bits/byte"), ("kernels", r"^kernels: (.*)")):
        if said := re.findall(pattern, log, re.MULTILINE):
            found[quantity] = said[-1] if quantity == "kernels" else float(said[-1])
    return found | {"loss of step": {row["step"]: row["loss"] for row in run.train}}


def train_config(plan: Plan, name: str, config: str, *words: str, micro_batch: int) -> dict:
    return train(plan, name, *config_words(plan, config), f"train.micro_batch={micro_batch}", *words)


def config_words(plan: Plan, config: str) -> list[str]:
    """One of our 124M configs, in short steps, without validation."""
    return [str(CHECKOUT / "configs" / f"{config}.toml"), f"model.vocab_size={GPT2_IDS}", "data.val_fraction=0",
            "optim.schedule=constant", "optim.warmup_steps=10", f"train.tokens_per_step={TOKENS_PER_STEP}",
            f"train.max_steps={plan.steps}"]


def config_of(plan: Plan, config: str) -> Config:
    return parse_arguments([*config_words(plan, config), *plan.words.get("all", ())])[0]


def small_words(plan: Plan, *more: str) -> list[str]:
    """A run of 12 short steps on random tokens."""
    data = random_tokens(plan)
    return ["model.n_layer=2", "model.n_head=4", "model.n_embd=256", "model.max_seq_len=256", "data.source=[]",
            f"data.dir={data}", f"data.tokenizer={data}/tokenizer.json", "data.val_fraction=0",
            "train.tokens_per_step=4096", "train.micro_batch=8", "train.max_steps=12", "optim.decay_steps=12",
            "train.compile=false", *more]


def fitting(plan: Plan, run: Callable[..., dict]) -> dict:
    """run(micro_batch=) with as many sequences as the activations of 124M and nanoGPT's logits leave room for: 64 above
    60 GiB, 16 below 30; if it is out of memory all the same, with half of them."""
    gib = torch.cuda.get_device_properties(0).total_memory / 2 ** 30 if plan.device == "cuda" else 80
    micro_batch = plan.micro_batch // (1 if gib > 60 else 2 if gib > 30 else 4)
    try:
        return {"micro-batch": micro_batch} | run(micro_batch=micro_batch)
    except MachineError as error:
        if "out of memory" not in str(error):
            raise
    return {"micro-batch": micro_batch // 2} | run(micro_batch=micro_batch // 2)


def learnt(found: dict) -> dict:
    """The figures of a run on text, failed if its loss did not fall."""
    first, *_, last = found["loss of step"].values()
    return found if last is not None and last <= LEARNT * first else found | {"failed": f"loss {first} became {last}"}


def train_nanogpt(plan: Plan, data: Path, *, micro_batch: int) -> dict:
    """nanoGPT's model, optimizer and precision, its table of 50,304 rows; biases as GPT-2 has."""
    config, device = config_of(plan, "gpt2_124m"), torch.device(plan.device)
    model, dtype = config.model, str(devices.choose_dtype("auto", device)[0]).removeprefix("torch.")
    accumulation = config.train.tokens_per_step // (model.max_seq_len * micro_batch)
    told = {"file": str(data / "train_00000.bin"), "offset": HEADER_BYTES, "device": plan.device, "dtype": dtype,
            "micro_batch": micro_batch, "accumulation": accumulation,
            "shape": {"block_size": model.max_seq_len, "vocab_size": padded_vocab_size(model.vocab_size),
                      "n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd, "bias": True}}
    with measure.Worker(NANOGPT_STEPS, json.dumps(told), cwd=Path(plan.peer)) as worker:
        worker.receive()  # it is ready
        steps = [measure.ask(worker, step=step)[0] for step in range(plan.steps)]
    found = speed(steps, config.train.tokens_per_step)
    peak = gpus.peak_flops(torch.cuda.get_device_name(), dtype) if plan.device == "cuda" else None
    mfu = metrics.mfu(found["tokens/s"], flops_per_token(model), peak, world_size=1)
    return found | ({} if mfu is None else {"mfu %": 100 * mfu}) | {
        "peak MiB": steps[-1]["peak"] / 2 ** 20, "loss": steps[-1]["loss"],
        "loss of step": {i: step["loss"] for i, step in enumerate(steps, 1)}}


def random_tokens(plan: Plan) -> Path:
    """A folder with a shard of random ids of GPT-2's vocabulary, and a tokenizer of as many: no download."""
    folder = Path(plan.folder, "random")
    if not (folder / "train_00000.bin").exists():
        folder.mkdir(exist_ok=True)
        pairs = itertools.islice(itertools.product(BYTE_RANKS, repeat=2), GPT2_IDS - 1 - len(BYTE_RANKS))
        ranks = BYTE_RANKS | {a + b: i for i, (a, b) in enumerate(pairs, start=len(BYTE_RANKS))}
        Tokenizer("random", {END_OF_TEXT: GPT2_IDS - 1}, ranks=ranks, pattern=GPT2_PATTERN).save(
            folder / "tokenizer.json")
        writer = ShardWriter(folder / "train_00000.bin", np.dtype("<u2"), GPT2_IDS)
        writer.write(np.random.default_rng(0).integers(GPT2_IDS, size=RANDOM_TOKENS, dtype=np.uint16))
        writer.close()
    return folder


def python_sources() -> Iterator[str]:
    """The .py files beside torch's, in the order of their names, those that are UTF-8."""
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        with suppress(OSError, UnicodeDecodeError):
            if "\0" not in (text := path.read_text(encoding="utf-8")):
                yield text


# ---- The command -----------------------------------------------------------------------------------------------------

def add_to(commands) -> None:
    parser = measure.command(commands, run, "The first ten minutes on a CUDA machine: what runs, what is right, how "
                             "fast it is. Goes on after what fails.", repeats=1, peer=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME",
                        help=f"default: {', '.join(PARTS)}")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    """The parts one after the other, each in its time; a table of what became of them."""
    if PLAN.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"bench.py gpu: this PyTorch ({torch.__version__}) sees no CUDA device; run it where there is "
                        "one, with a PyTorch built for it")
    if args.json is None:
        name = torch.cuda.get_device_name() if PLAN.device == "cuda" else PLAN.device
        args.json = str(CHECKOUT / "docs" / "benchmarks" / f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}.json")
        cli.check_output("--json", Path(args.json))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a part must not outlive us
    parts = args.setting["parts"] = {}
    measure.write_json(args, figures)  # a folder that cannot be written is known now
    deadline = time.monotonic() + TOTAL_S
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as folder:
        plan = dataclasses.replace(PLAN, folder=folder, peer=args.peer and str(args.peer), repeats=args.repeats,
                                   devices=PLAN.devices or torch.cuda.device_count())
        for name in args.parts:
            limit_s = min(PARTS[name][1], deadline - time.monotonic())
            cli.note(f"--- {name}, at most {max(0.0, limit_s):.0f} s")
            parts[name] = run_part(name, plan, limit_s, figures) if limit_s > 0 else {
                "verdict": "left out", "seconds": 0.0, "why": f"the {TOTAL_S} s of all parts are over"}
            cli.note(line_of(name, parts[name]))
            try:
                measure.write_json(args, figures)
            except MachineError as error:  # report() tries once more
                cli.note(f"warning: {error}")
    print("\n".join(line_of(name, part) for name, part in parts.items()))
    figures.failed = [name for name, part in parts.items() if part["verdict"] == "fail"]
    figures.left_out |= {name: parts[name]["why"] for name in figures.failed}
    return {"written to": args.json}


def line_of(name: str, part: dict) -> str:
    return f"{name:8}  {part['verdict']:8}  {part['seconds']:4.0f} s  {part['why']}".rstrip()


def part_command(name: str, plan: Plan) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", name, json.dumps(dataclasses.asdict(plan))]


def run_part(name: str, plan: Plan, limit_s: float, figures: measure.Figures) -> dict:
    """One part to its end or its limit: its verdict, why, and what else it found; its figures go to `figures`."""
    out, log = (Path(plan.folder, f"part_{name}.{suffix}") for suffix in ("jsonl", "log"))
    started, verdict, why = time.monotonic(), "pass", ""
    with open(out, "w") as stdout, open(log, "w") as stderr:
        process = subprocess.Popen(part_command(name, plan), cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=stdout,
                                   stderr=stderr)
        try:
            if status := process.wait(timeout=limit_s):
                last = measure.last_line(log.read_text(errors="replace")).removeprefix("error: ")
                verdict, why = "fail", f"status {status}: {last}"
        except subprocess.TimeoutExpired:
            verdict = "fail" if limit_s == PARTS[name][1] else "left out"
            why = f"killed after {limit_s:.0f} s" + (f", the end of all {TOTAL_S} s" if verdict == "left out" else "")
        finally:
            if process.poll() is None:
                kill_tree(process)
    part = {"verdict": verdict, "seconds": round(time.monotonic() - started, 1), "why": why, "found": {}}
    for line in out.read_text().splitlines():
        with suppress(ValueError):  # the last line of a part that was killed
            take_in(*json.loads(line), part, figures)
    return part | ({"log": log.read_text(errors="replace")[-4000:]} if part["verdict"] == "fail" else {})


def take_in(subject: str | None, found: dict, part: dict, figures: measure.Figures) -> None:
    """What a part said of a subject, or (None) of itself."""
    if "failed" in found:
        part |= {"verdict": "fail", "why": part["why"] or f"{subject}: {found['failed']}"}
    elif subject is None:
        part |= {"verdict": "left out", "why": found["left out"]}
    elif "left out" in found:
        figures.left_out[subject] = found["left out"]
    for quantity, value in found.items() if subject is not None else ():
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(x, int | float) for x in values):
            figures.samples[subject][quantity] += values
        else:
            part["found"].setdefault(subject, {})[quantity] = value


def kill_tree(process: subprocess.Popen) -> None:
    """End a process and all that descend from it; torchrun's workers have sessions of their own."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
    tree = [process.pid]
    for pid in tree:  # it grows meanwhile
        tree += children[pid]
    for pid in tree:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def main(argv: list[str]) -> None:
    """A part's process: what it finds, a line of JSON each, to stdout; all else to stderr."""
    name, plan = argv
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for subject, found in PARTS[name][0](Plan(**json.loads(plan))):
        print(json.dumps([subject, found]), file=answers, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
