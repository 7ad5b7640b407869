"""Ranks: which process this is among all, how they agree, and how a model is wrapped for them or sharded over them.

Without torchrun everything here is the trivial case of one rank. Collectives go over NCCL on CUDA, else gloo.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cli import note
from config import ConfigError, MachineError, UserError


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """The World of torchrun's RANK, LOCAL_RANK, WORLD_SIZE, ... Raises ConfigError if only some are there."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    way_out = "start with torchrun, or unset them for a single process"
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World()
    if missing := [name for name in names if name not in os.environ]:
        raise ConfigError(f"the environment sets {', '.join(name for name in names if name not in missing)} but not "
                          f"{', '.join(missing)}; {way_out}")
    found = {name: os.environ[name] for name in (*names, "LOCAL_WORLD_SIZE") if name in os.environ}
    numbers = {name: int(text) for name, text in found.items() if name != "MASTER_ADDR" and text.isdecimal()}
    size, local_size = (numbers.get(name, numbers.get("WORLD_SIZE", 0)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if len(numbers) < len(found) - 1 or not (numbers["RANK"] < size and numbers["LOCAL_RANK"] < local_size <= size and
                                             0 < numbers["MASTER_PORT"] < 2 ** 16):
        raise ConfigError(f"the environment's {' '.join(f'{name}={text}' for name, text in found.items())} do not fit "
                          f"together: ranks are whole numbers below the sizes, a port is one below 65536; {way_out}")
    return World(numbers["RANK"], numbers["LOCAL_RANK"], size, local_size)


# ---- The process group and agreement between ranks -------------------------------------------------------------------

@contextlib.contextmanager
def process_group(world: World, device: torch.device, timeout_s: float) -> Iterator[None]:
    """A process group for the time of the block; nothing for a single process. Raises ConfigError if rank 0 cannot
    listen or its host is unknown, MachineError if not all ranks come."""
    if world.size == 1:
        yield
        return
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        note("warning: torchrun's restarts mostly fail with the store that it shares with its workers (pytorch issue "
             "135712); start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    try:
        socket.getaddrinfo(host, port)  # torch tries an unknown name again until timeout_s
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size,
                                timeout=datetime.timedelta(seconds=timeout_s),
                                device_id=device if device.type == "cuda" else None)
    except socket.gaierror as error:
        raise ConfigError(f"MASTER_ADDR={host} is no host that this machine knows ({error.strerror}); give the name or "
                          "address of rank 0's machine") from None
    except RuntimeError as error:  # as in naming_lost_rank
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in reason:
            raise ConfigError(f"MASTER_PORT={port} of this machine is in use, perhaps by another run; choose another "
                              "(torchrun --standalone does it by itself)") from None
        raise MachineError(f"the {world.size} ranks did not meet at MASTER_ADDR={host} MASTER_PORT={port} in "
                           f"train.timeout_s = {timeout_s:g} s ({reason[:200]}); start them all with the same address "
                           "and WORLD_SIZE, then the same command goes on") from error
    yield
    # Not after an error: there NCCL would wait for ranks that do not come, and the error would never be printed.
    with naming_lost_rank():
        dist.barrier()
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    """model in DistributedDataParallel, which gives every rank the weights of rank 0 and averages gradients over ranks;
    model itself for a single process, or if it is sharded."""
    if world.size == 1 or is_sharded(model):
        return model
    from torch.nn.parallel import DistributedDataParallel
    if "torch._dynamo" in sys.modules:  # in DDP the graph is split, for gradients to travel while others are computed;
        torch._dynamo.reset()  # the one of an earlier trial is not
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of the name that both of our torches know
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                       gradient_as_bucket_view=True, broadcast_buffers=False)  # RoPE's never change


def gradient_sync(model: nn.Module, sync: bool):
    """Context of one forward and backward: gradients are averaged over ranks in it only if sync. Sharded ones always
    are, within a copy: held whole until the last micro-batch, they would need the memory that sharding saves."""
    if is_sharded(model):
        model.set_requires_all_reduce(sync)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if sync or not hasattr(model, "no_sync") else model.no_sync()


# ---- Sharded models: FSDP2 (arXiv:2304.11277, per parameter) ---------------------------------------------------------

def ranks_per_copy(shard: int | str, world: World) -> int:
    """train.shard as a number of ranks. Raises ConfigError if it does not divide their number."""
    ranks = world.size if shard == "all" else shard
    if world.size % ranks:
        raise ConfigError(f"train.shard = {shard} does not divide the {world.size} rank{'s' * (world.size > 1)}; use "
                          + ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0) + " or all")
    return ranks


def shard(model: nn.Module, ranks: int, device: torch.device, world: World) -> None:
    """Cut the weights of a GPT on the meta device into rows over so many ranks, world.size / ranks copies of them, and
    give these rows memory on the device, not yet filled; buffers come from the CPU.

    A block's weights are whole only while it computes, in the dtype of its matmuls: a copy made there would be kept for
    the backward. The tables' are from the forward to the backward. Names and shapes of parameters stay: they become
    DTensors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of views, which nothing here changes in place
    policy = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world.size // ranks, ranks), mesh_dim_names=("copies", "parts"))
    mesh = mesh["parts"] if ranks == world.size else mesh
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_all_reduce")  # FSDP2's; importing its class takes 0.5 s


@contextlib.contextmanager
def tables_whole(model: nn.Module) -> Iterator[None]:
    """In the block a sharded model's weights outside its blocks are whole, so that hidden() and logits() may be called
    without forward(). All ranks enter, after a first forward, and compute the same number of times.

    Not by register_fsdp_forward_method: of a method that forward() calls, PyTorch 2.13 then multiplies the next
    gradients of these weights.
    """
    if not is_sharded(model):
        yield
        return
    model.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # each layer with its cache would be a graph of its own
            yield
    finally:
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (a DTensor) that this rank holds, sharing memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Which rows of the whole local(tensor) is: the first, and the one behind the last. All of a tensor that is not
    sharded; a number counts as one row. Rows are dealt as by torch.chunk: the last ranks may hold fewer, or none."""
    first, end = 0, tensor.shape[0] if tensor.dim() else 1
    for dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard():
            assert placement.dim == 0, f"sharded on dimension {placement.dim}, not on rows"
            height = -(-(end - first) // tensor.device_mesh.size(dim))
            first = min(end, first + height * tensor.device_mesh.get_local_rank(dim))
            end = min(end, first + height)
    return first, end


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, on every rank: a collective. Any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """The elementwise sum over all ranks, on every rank."""
    if world.size > 1:
        with naming_lost_rank():
            dist.all_reduce(tensor)
    return tensor


def gather(value: object, world: World) -> list:
    """Every rank's value (of what JSON can hold), in order of rank, on every rank."""
    if world.size == 1:
        return [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    with naming_lost_rank():
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world.size)]
        dist.all_gather(sizes, torch.tensor([own.numel()], device=device))
        padded = F.pad(own, (0, max(map(int, sizes)) - own.numel()))
        texts = [torch.zeros_like(padded) for _ in range(world.size)]
        dist.all_gather(texts, padded)
    return [json.loads(bytes(text[:int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


@contextlib.contextmanager
def raise_on_all_ranks(world: World, machine_error: type[MachineError] = MachineError) -> Iterator[None]:
    """A UserError or MachineError inside the block on any rank is raised, with its text, on all; the latter as
    machine_error, a kind of it."""
    if world.size == 1:
        yield
        return
    mine = None
    try:
        yield
    except (UserError, MachineError) as error:
        mine = [isinstance(error, UserError), str(error)]
    for rank, outcome in enumerate(gather(mine, world)):
        if outcome is not None:
            is_user_error, text = outcome
            error = (UserError if is_user_error else machine_error)(text if rank == 0 else f"rank {rank}: {text}")
            error.is_everywhere = True  # rank 0 says it for all
            raise error


@contextlib.contextmanager
def naming_lost_rank() -> Iterator[None]:
    """Turn a collective's failure into one line: another rank died or is stuck."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError, DistStoreError and gloo's own
        if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("CUDA error"):
            raise  # of an earlier kernel of this rank, seen here first
        reason = str(error).strip().splitlines()[0][:200]
        raise MachineError(f"lost contact with another rank ({reason}); start again with the same command to go on "
                           "from the newest checkpoint") from error
