"""What a run will take before it is started, memory, time, disk, and what fits: `python plan.py --help`. Needs no GPU.

Memory is counted (memory.py), the rest is arithmetic on what the makers say of their GPUs (gpus.py). Also here, because
it starts from the same count: the micro-batch of train.micro_batch = "auto", which a trial on the device decides.

Dims: B sequences of a micro-batch, T tokens of a sequence.
"""

import argparse
import contextlib
import gc
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import cli
import config as configuration
import distributed
import gpus
import kernels
import start
from config import Config, ConfigError, MachineError
from curves import human_count, human_seconds
from data.loader import TrainLoader
from data.tokenizer import TOKENIZER_FILE, bpe_ids, load_tokenizer
from devices import Machine
from distributed import World
from finetune.runs import files_to_save
from gpus import Gpu
from kernels import fastest, self_check
from memory import Memory, loss_chunk_bytes
from model import GPT, flops_per_token, padded_vocab_size

DEMO = Path(__file__).parent / "configs" / "demo.toml"
GIB = 2 ** 30

TRIED_TOKENS = 65_536  # B x T at most: from there on no GPU computes a token faster
UNTRIED_TOKENS = 4096  # outside CUDA, where a process that runs out of memory is ended instead of told
SPARE = 0.05  # of the device's memory: for NCCL, samples, fragments

# Assumed, not measured: what a process takes beside torch's tensors, and how much of the peak a run reaches.
CONTEXT_BYTES = 1 * GIB  # CUDA's context, cuBLAS's workspace, loaded kernels
NCCL_BYTES = 1 * GIB  # its buffers, with more than one GPU
MFU = 0.40
RECOMPUTED = 4 / 3  # FLOPs of a step with activation checkpointing over those without, which MFU counts

ADAMW_BYTES = 28  # for a parameter: weight, gradient and two moments are read, all but the gradient written
CHINCHILLA = 20  # tokens per parameter at which compute is spent best (arXiv:2203.15556)
VOCABULARIES = {"bytes": 257, "gpt2": 50_257, "r50k_base": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}


# ---- train.micro_batch = "auto" --------------------------------------------------------------------------------------

def choose_micro_batch(config: Config, saved: int | None, model: GPT, compiled: nn.Module, loader: TrainLoader,
                       world: World, *, most: int | None = None) -> tuple[int, str]:
    """B, the same on every rank, and why: what the config asks for, what the run began with (dropout and last bits
    depend on it), or what fits on every rank, at most `most`. compiled is the model itself if nothing compiles it.
    Raises MachineError on all ranks if not even B = 1 fits.
    """
    if config.train.micro_batch != "auto":
        return config.train.micro_batch, "asked for"
    if saved is not None:
        return saved, "auto: as the run began"
    share, on_cuda = loader.windows_per_step // world.size, loader.device.type == "cuda"
    most = most or (TRIED_TOKENS if on_cuda else UNTRIED_TOKENS) // config.model.max_seq_len
    parts = math.ceil(share / max(1, most))  # micro-batches of a step, equal but for the last
    why = "all of a step" if parts == 1 else f"more than {TRIED_TOKENS:,} tokens are no faster" if on_cuda \
        else f"up to {UNTRIED_TOKENS:,} tokens, untried"
    with distributed.raise_on_all_ranks(world):
        found = _fitting_parts(parts, share, config, model, compiled, loader, world) if on_cuda else parts
    most_parts, rank = max((found, -rank) for rank, found in enumerate(distributed.gather(found, world)))
    if most_parts > parts:
        why = f"{math.ceil(2 * share / most_parts)} would not fit" + (f" on rank {-rank}" if world.size > 1 else "")
    return math.ceil(share / most_parts), f"auto: {why}"


def _fitting_parts(fewest: int, share: int, config: Config, model: GPT, compiled: nn.Module, loader: TrainLoader,
                   world: World) -> int:
    """fewest, or twice, four times ... as many, until a micro-batch of the rank's share of sequences fits.

    What the count of the uncompiled model proposes is tried, from twice its size on, because compiled it takes less.
    If it cannot be counted, what fits uncompiled is found by trial, which takes a moment a size. No rank waits for
    another; sharded ranks cannot compute alone, so for them the count decides, with twice as much to spare.
    """
    spare = int(SPARE * torch.cuda.get_device_properties(loader.device).total_memory)
    if distributed.is_sharded(model):
        return halved(share, fewest, _counted_micro_batch(
            config, model, loader.device, math.ceil(share / fewest), 2 * spare,
            ranks=distributed.ranks_per_copy(config.train.shard, world)))
    if world.size > 1:  # DDP lays its buckets anew after the first step
        spare += sum(p.nbytes for p in model.parameters() if p.requires_grad)

    def tried(module: nn.Module, parts: int) -> int:
        while not _fits(module, math.ceil(share / parts), loader, spare):
            if parts >= share:
                raise MachineError("out of memory: not one sequence fits beside weights and moments; set "
                                   "train.activation_checkpointing=true, or lower model.max_seq_len")
            parts *= 2
        return parts
    try:
        largest = _counted_micro_batch(config, model, loader.device, math.ceil(share / fewest), spare)
        proposed = halved(share, fewest, largest)
    except Exception as error:  # it only saves trials: whatever is wrong with it must not end a run
        cli.note(f"train.micro_batch=auto could not be counted and is found by trial ({type(error).__name__}: {error})")
        if compiled is model:
            return tried(model, fewest)
        proposed = tried(model, fewest)
    return tried(compiled, max(fewest, proposed // 2))


def _counted_micro_batch(config: Config, model: GPT, device: torch.device, most: int, spare: int, *,
                         ranks: int = 1) -> int:
    """The largest B that leaves spare bytes of what the device has free and this process holds, up to most. ranks: that
    hold one copy of the model."""
    kind = "triton" if kernels.backend("attention") == "triton" else "torch"
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return Memory(config, dtype=model.compute_dtype, kind=kind).largest(free - spare, most, ranks)


def halved(share: int, parts: int, largest: int) -> int:
    """parts, or twice, four times ... as many, until none of a share of sequences holds more than largest; at least
    one each."""
    while math.ceil(share / parts) > max(1, largest):
        parts *= 2
    return parts


def _fits(model: nn.Module, B: int, loader: TrainLoader, spare: int) -> bool:
    """Whether two micro-batches of B leave spare bytes: in the second the first one's gradients are there. Afterwards
    there are none."""
    loader.micro_batch = B
    try:
        batch = loader.batch(0)[0]
        held = torch.empty(spare, dtype=torch.uint8, device=batch.tokens.device)
        for _ in range(2):  # in train_step's words: its graph is this one
            model(batch.tokens, batch.targets, document_ids=batch.document_ids, reduction="sum").backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch._dynamo.reset()  # graphs of a size that is not used
        return False
    finally:
        held = batch = None  # noqa: F841
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the run reports its own


def is_out_of_memory(error: BaseException) -> bool:
    """Of torch's allocator, the C library, cuBLAS or cuDNN; also inside the compiler's own error."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))


# ---- train.kernels = "auto" ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Checked:
    """What was found of the kernels before the model is built: of every rank the verdicts, and what they were asked."""

    verdicts: list[self_check.Verdicts]
    shapes: dict  # dtype, device, table_rows
    documents: bool  # whether they are kept apart
    compiles: bool


def check_kernels(config: Config, machine: Machine, loader: TrainLoader, world: World) -> Checked:
    """Check each operation's kernels on every rank, and take the first choice of those that are right on all. Raises
    ConfigError on all ranks if those that the config asks for are not."""
    documents = config.data.document_mask or loader.stream.row_tokens is not None
    rows = padded_vocab_size(config.model.vocab_size)
    shapes = {"dtype": machine.dtype, "device": machine.device, "table_rows": rows}
    rivals = fastest.rivals(config.train.kernels, config.model, device=machine.device, documents=documents,
                            compiles=machine.compiles)
    own = self_check.verdicts(config.train.kernels, config.model, rivals=rivals, **shapes)
    checked = Checked(distributed.gather(own, world), shapes, documents, machine.compiles)
    with distributed.raise_on_all_ranks(world):
        self_check.agree(config.train.kernels, checked.verdicts)
    return checked


def settle(config: Config, progress: start.Progress, checked: Checked, model: GPT, compiled: nn.Module,
           loader: TrainLoader, world: World) -> tuple[str, str]:
    """Choose progress.micro_batch and progress.kernels, where the run has not begun with some, the same on every rank;
    why, in words, and the log line of the kernels. The fastest kernels depend on B, and B on what they hold: if others
    than those that were tried win, B is tried again. Raises as choose_micro_batch."""
    saved, setting, verdicts = progress.micro_batch, config.train.kernels, checked.verdicts
    tried, _ = self_check.agree(setting, verdicts, previous=progress.kernels)
    B, why = choose_micro_batch(config, saved, model, compiled, loader, world)
    contenders, measured = self_check.contenders(verdicts, progress.kernels), None
    if any(len(backends) > 1 for backends in contenders.values()):
        with distributed.raise_on_all_ranks(world):
            if world.is_main:
                measured = fastest.measure(contenders, config.model, B=B, T=config.model.max_seq_len, **checked.shapes,
                                           documents=checked.documents, compiles=checked.compiles)
        measured = distributed.gather(measured, world)[0]
    progress.kernels, line = self_check.agree(setting, verdicts, previous=progress.kernels, measured=measured)
    if progress.kernels != tried and (smaller := choose_micro_batch(
            config, saved, model, compiled, loader, world, most=B))[0] < B:
        B, why = smaller
    progress.micro_batch = B
    return why, line


# ---- What a run takes ------------------------------------------------------------------------------------------------

def dtype_of(config: Config, gpu: Gpu) -> torch.dtype:
    """As devices.choose_dtype on that GPU."""
    auto = "bfloat16" if gpu.bfloat16 is not None else "float16"
    return getattr(torch, auto if config.train.dtype == "auto" else config.train.dtype)


def vocab_size(config: Config) -> int:
    """Of the tokenizer that data.tokenizer names or data.dir holds. Raises UserError if neither tells."""
    data = config.data
    name = data.tokenizer or data.dir or "gpt2"
    if (data.tokenizer or data.dir is None) and (ids := VOCABULARIES.get(name) or bpe_ids(name)):
        return ids
    if (Path(name) / TOKENIZER_FILE).is_file() or Path(name).is_file():
        return load_tokenizer(name).vocab_size
    knob = "data.dir" if data.tokenizer is None else "data.tokenizer"
    raise ConfigError(f"{knob} = {name!r} does not tell the size of the vocabulary; give it: model.vocab_size=N")


def plan(config: Config, gpu: Gpu, *, count: int, mfu: float | None) -> dict:
    """All that is printed, with units in the names; None where it is not known. config must be resolved but for
    micro_batch; count: GPUs; mfu: the share of their peak, None = MFU."""
    train, T = config.train, config.model.max_seq_len
    dtype = dtype_of(config, gpu)
    kind = "torch" if train.kernels == "torch" or gpu.bfloat16 is None else "triton"  # as kernels.why_no_triton
    memory, share = Memory(config, dtype=dtype, kind=kind), train.tokens_per_step // T // count
    model, fixed = memory.model, CONTEXT_BYTES + NCCL_BYTES * (count > 1)
    limit = None if gpu.memory_gb is None else int(gpu.memory_gb * 1e9) - fixed

    # 1. What fits, for each number of ranks that hold one copy of the model, and the least that does.
    asked = None if train.micro_batch == "auto" else min(train.micro_batch, share)
    shards = []
    for ranks in (ranks for ranks in range(count, 0, -1) if count % ranks == 0):
        largest = None if limit is None else memory.largest(limit, share, ranks)
        shards.insert(0, {"shard": ranks, "largest_micro_batch": largest,
                          "peak_bytes_at_1": memory.at(1, ranks).peak + fixed})
    fitting = [row for row in shards if limit is None or row["largest_micro_batch"] >= (asked or 1)]
    if train.shard != 1:  # 1 is the default: no word on what to do where it does not fit
        fitting = [row for row in fitting if row["shard"] == distributed.ranks_per_copy(train.shard, World(size=count))]
    row = fitting[0] if fitting else shards[-1]
    fewest = math.ceil(share / max(1, TRIED_TOKENS // T))
    B = asked or math.ceil(share / halved(share, fewest, share if limit is None else row["largest_micro_batch"]))
    step = memory.at(B, row["shard"])
    phase = step.phase
    kept = 0 if phase == "update" else step.activations
    gathered = memory.gathered[phase] if row["shard"] > 1 else 0
    chunk = loss_chunk_bytes(config, B, model, dtype=dtype, kind=kind) if phase == "loss" else 0

    # 2. Time.
    if mfu_is_assumed := mfu is None:
        mfu = MFU / (RECOMPUTED if train.activation_checkpointing else 1.0)
    peak_tflops = getattr(gpu, str(dtype).removeprefix("torch."))
    tokens, flops = train.max_steps * train.tokens_per_step, flops_per_token(config.model)
    rate = None if peak_tflops is None else peak_tflops * 1e12 * mfu * count / flops
    hours = None if rate is None else tokens / rate / 3600
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_adamw = config.optim.name == "adamw" and gpu.bandwidth_gb_s is not None  # Muon's is matmuls
    update_ms = learned / row["shard"] * ADAMW_BYTES / (gpu.bandwidth_gb_s * 1e9) * 1e3 if is_adamw else None

    # 3. Disk.
    saved = memory.counted[1].moments + sum(tensor.nbytes for tensors in files_to_save(model, config.lora)[0].values()
                                            for tensor in tensors.values())
    return {
        "parameters": model.parameter_count(), "learned_parameters": learned, "flops_per_token": flops,
        "steps": train.max_steps, "tokens_per_step": train.tokens_per_step, "tokens": tokens,
        "tokens_per_parameter": tokens / model.parameter_count(), "chinchilla_tokens_per_parameter": CHINCHILLA,
        "gpu": gpu.short or gpu.pattern, "gpus": count, "gpu_bytes": None if limit is None else limit + fixed,
        "gpu_tflops": peak_tflops, "gpu_gb_per_second": gpu.bandwidth_gb_s,
        "dtype": str(dtype).removeprefix("torch."), "kernels": kind,
        "mfu": mfu, "mfu_is_assumed": mfu_is_assumed, "tokens_per_second": rate, "hours": hours,
        "gpu_hours": None if hours is None else hours * count, "adamw_ms_per_step": update_ms,
        "checkpoint_bytes": saved, "keep": train.keep, "checkpoints_bytes": saved * (train.keep + 1),
        "fits": bool(fitting), "shard": row["shard"], "micro_batch": B, "micro_batch_tokens": B * T,
        "micro_batches_per_step": math.ceil(share / B), "peak_phase": phase,
        "weights_bytes": step.weights, "gradients_bytes": step.gradients, "moments_bytes": step.moments,
        "gathered_bytes": gathered, "activations_bytes": kept, "loss_chunk_bytes": chunk,
        "temporaries_bytes": step.peaks[phase] - kept - gathered - chunk,
        "context_bytes": CONTEXT_BYTES, "nccl_bytes": fixed - CONTEXT_BYTES, "peak_bytes": step.peak + fixed,
        "shards": shards}


# ---- The command -----------------------------------------------------------------------------------------------------

def table(f: dict) -> str:
    """The figures of plan() as text."""
    def gib(size: int | None) -> str:
        return "?" if size is None else f"{size / GIB:.2f}"

    def known(value: float | None, text: str) -> str:
        return "unknown" if value is None else text.format(value)
    speed = "unknown: no peak in " + f["dtype"] if f["hours"] is None else (
        f"{human_count(f['tokens_per_second'])} tokens/s at {f['mfu']:.0%} of the peak"
        f"{' (assumed: --mfu)' if f['mfu_is_assumed'] else ''}: {human_seconds(f['hours'] * 3600)}, "
        f"{f['gpu_hours']:,.1f} GPU-hours")
    learned = "" if f["learned_parameters"] >= f["parameters"] else f", {f['learned_parameters']:,} of them learn"
    assumed = " (assumed: --gpu)" if f["gpu_is_assumed"] else ""
    lines = [
        f"model   {f['parameters']:,} parameters{learned}, {f['flops_per_token'] / 1e6:,.1f} MFLOPs per token",
        f"run     {f['steps']:,} steps x {f['tokens_per_step']:,} = {human_count(f['tokens'])} tokens, "
        f"{f['tokens_per_parameter']:.1f} a parameter (compute-optimal: {f['chinchilla_tokens_per_parameter']}, "
        "arXiv:2203.15556)",
        f"gpus    {f['gpus']} x {f['gpu']}{assumed}: {gib(f['gpu_bytes'])} GiB, "
        f"{known(f['gpu_gb_per_second'], '{:,.0f}')} GB/s, {known(f['gpu_tflops'], '{:,.1f}')} TFLOP/s in {f['dtype']}",
        f"time    {speed}",
        f"update  {known(f['adamw_ms_per_step'], '{:.2f} ms of a step or more')}",
        f"disk    {f['checkpoint_bytes'] / 1e9:.2f} GB a checkpoint, {f['checkpoints_bytes'] / 1e9:.2f} GB with "
        f"train.keep = {f['keep']} and the best", ""]

    rows = [("weights", "weights_bytes"), ("gradients", "gradients_bytes"), ("moments", "moments_bytes"),
            ("weights and gradients gathered from other ranks", "gathered_bytes"),
            (f"activations of {f['micro_batch_tokens']:,} tokens", "activations_bytes"),
            ("loss: chunk of logits, table (inner buffers, by formula)", "loss_chunk_bytes"),
            (f"other temporaries, at the peak (in the {f['peak_phase']})", "temporaries_bytes"),
            ("CUDA context (assumed)", "context_bytes"), ("NCCL (assumed)", "nccl_bytes"),
            ("in all, not compiled", "peak_bytes")]
    layout = "ddp" if f["shard"] == 1 < f["gpus"] else f"shard {f['shard']}"
    title = f"memory of a GPU{f', {layout}' if f['gpus'] > 1 else ''}, micro-batches of {f['micro_batch']}"
    lines += [cli.format_table((title, "GiB"), [(words, gib(f[name])) for words, name in rows if f[name]]), ""]

    lines += [cli.format_table(
        ("train.shard", "GiB at a micro-batch of 1", "largest micro-batch"),
        [(str(row["shard"]) + " (ddp)" * (row["shard"] == 1), gib(row["peak_bytes_at_1"]),
          "unknown" if row["largest_micro_batch"] is None else str(row["largest_micro_batch"] or "does not fit"))
         for row in f["shards"]]), "", advice(f)]
    return "\n".join(lines)


def advice(f: dict) -> str:
    """What to set, as knobs."""
    if f["gpu_bytes"] is None:
        return f"the memory of {f['gpu']} is not known here: nothing is said to fit"
    if not f["fits"]:
        return ("does not fit: try train.activation_checkpointing=true, a smaller train.micro_batch or "
                "model.max_seq_len, or more GPUs (--gpus)")
    shard = f"train.shard={f['shard']} " if f["shard"] > 1 else ""
    return (f"fits: {shard}train.micro_batch={f['micro_batch']}, {f['micro_batches_per_step']} "
            f"micro-batch{'es' * (f['micro_batches_per_step'] > 1)} a step on each GPU")


def resolved(config: Config, given: set[str], count: int) -> Config:
    """config as start.py completes it for so many ranks, with a vocabulary. Raises UserError."""
    config = start.inherit(config, given, start.read_parent(config), World(size=count))
    if config.model.vocab_size is None:
        config = replace(config, model=replace(config.model, vocab_size=vocab_size(config)))
    return config


def _share(word: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(word) <= 1.0:
            return float(word)
    raise argparse.ArgumentTypeError(f"{word!r} should be a number above 0, at most 1")


def main(argv: list[str]) -> None:
    parser = cli.Parser(
        prog="python plan.py", allow_abbrev=False,
        description="What a run of train.py will take, counted on meta tensors: memory, time, disk, and what fits.",
        epilog="python config.py --help lists every knob; docs/PRETRAINING.md says what is counted and what assumed.")
    parser.add_argument("words", nargs="*", metavar="FILE.toml | section.key=value",
                        help="as train.py takes them; without a FILE.toml configs/demo.toml")
    parser.add_argument("--gpu", type=str.lower, choices=gpus.SHORT_NAMES, metavar="NAME",
                        help=f"this machine's, else h100; one of {', '.join(gpus.SHORT_NAMES)}")
    parser.add_argument("--gpus", type=cli.count, default=1, metavar="N", help="GPUs, a rank each (1)")
    parser.add_argument("--mfu", type=_share, metavar="X", help=f"share of the peak that a run reaches; {MFU} is "
                        "assumed, with activation checkpointing three quarters of it")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, units in their names")
    # --model.n_layer=2 is an override too
    args = parser.parse_intermixed_args([re.sub(r"^-+(?=\w+\.)", "", word) for word in argv])
    config = resolved(*configuration.parse_arguments(args.words, default_file=DEMO), args.gpus)
    own = gpus.find(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    gpu = gpus.SHORT_NAMES[args.gpu] if args.gpu else own or gpus.SHORT_NAMES["h100"]
    found = plan(config, gpu, count=args.gpus, mfu=args.mfu) | {"gpu_is_assumed": args.gpu is None and own is None}
    print(json.dumps(found, indent=2) if args.json else table(found))

if __name__ == "__main__":
    configuration.exit_cleanly(main)
