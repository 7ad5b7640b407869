"""What a run finds out on its devices: the micro-batch of train.micro_batch = "auto", by trying, the fastest kernels.

Dims: B sequences of a micro-batch, T tokens of a sequence.
"""

import gc
import math

import torch
from torch import nn

import distributed
from config import Config, ConfigError, MachineError
from data.loader import TrainLoader
from distributed import World
from kernels import fastest, self_check
from model import GPT

TRIED_TOKENS = 65_536  # B x T at most: from there on no GPU computes a token faster
UNTRIED_TOKENS = 4096  # outside CUDA, where a process that runs out of memory is ended instead of told
SPARE = 0.05  # of the device's memory: for NCCL, samples, fragments


def choose_micro_batch(config: Config, saved: int | None, model: GPT, compiled: nn.Module, loader: TrainLoader,
                       world: World) -> tuple[int, str]:
    """B, the same on every rank, and why: what the config asks for, what the run began with (dropout and last bits
    depend on it), or what fits on every rank. compiled is the model itself if nothing compiles it. Raises MachineError
    on all ranks if not even B = 1 fits.
    """
    if config.train.micro_batch != "auto":
        return config.train.micro_batch, "asked for"
    if saved is not None:
        return saved, "auto: as the run began"
    if distributed.is_sharded(model) and loader.device.type == "cuda":
        raise ConfigError("train.micro_batch = 'auto' is found by trial, which sharded ranks cannot do each by itself; "
                          "give a number (16, say), or take train.shard=1")
    share, on_cuda = loader.windows_per_step // world.size, loader.device.type == "cuda"
    most = (TRIED_TOKENS if on_cuda else UNTRIED_TOKENS) // config.model.max_seq_len
    parts = math.ceil(share / max(1, most))  # micro-batches of a step, equal but for the last
    why = "all of a step" if parts == 1 else f"more than {TRIED_TOKENS:,} tokens are no faster" if on_cuda \
        else f"up to {UNTRIED_TOKENS:,} tokens, untried"
    with distributed.raise_on_all_ranks(world):
        found = _fitting_parts(parts, share, model, compiled, loader, world) if on_cuda else parts
    most_parts, rank = max((found, -rank) for rank, found in enumerate(distributed.gather(found, world)))
    if most_parts > parts:
        why = f"{math.ceil(2 * share / most_parts)} did not fit" + (f" on rank {-rank}" if world.size > 1 else "")
    return math.ceil(share / most_parts), f"auto: {why}"


def _fitting_parts(parts: int, share: int, model: GPT, compiled: nn.Module, loader: TrainLoader, world: World) -> int:
    """parts, or twice, four times ... as many, until a micro-batch of the rank's share of sequences fits.

    Each size is tried without compiling first, which takes a moment but up to twice the memory; then the compiled
    model, from twice the size on which that fits. No rank waits for another.
    """
    fewest = parts
    spare = int(SPARE * torch.cuda.get_device_properties(loader.device).total_memory)
    if world.size > 1:  # DDP lays its buckets anew after the first step
        spare += sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for tried in [model] if compiled is model else [model, compiled]:
        if tried is compiled:
            parts = max(fewest, parts // 2) if compiled is not model else parts
        while not _fits(tried, math.ceil(share / parts), loader, spare):
            if parts >= share:
                raise MachineError("out of memory: not one sequence fits beside weights and moments; set "
                                   "train.activation_checkpointing=true, or lower model.max_seq_len")
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
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Of torch's allocator, the C library, cuBLAS or cuDNN; also inside the compiler's own error."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))


def choose_kernels(config: Config, verdicts: list[self_check.Verdicts], saved: self_check.Choice | None, *, B: int,
                   checked: dict, documents: bool, compiles: bool, world: World) -> tuple[self_check.Choice, str]:
    """The backends that a run takes, the same on every rank, and the log line that says why: what it began with, or the
    fastest on rank 0 of those that are right on all, see self_check.agree. checked: what self_check.verdicts got."""
    contenders, measured = self_check.contenders(verdicts, saved), None
    if any(len(backends) > 1 for backends in contenders.values()):
        with distributed.raise_on_all_ranks(world):
            if world.is_main:
                measured = fastest.measure(contenders, config.model, B=B, T=config.model.max_seq_len, **checked,
                                           documents=documents, compiles=compiles)
        measured = distributed.gather(measured, world)[0]
    return self_check.agree(config.train.kernels, verdicts, previous=saved, measured=measured)
