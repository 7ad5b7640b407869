"""Ranks and devices in one process; test_train_processes.py has the real ranks."""

import itertools
import math
import re
import socket

import pytest
import torch

import distributed
from config import ConfigError, MachineError
from distributed import World

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_torchrun_there_is_one_rank(environment):
    assert distributed.read_world() == World()


def test_the_place_among_ranks_is_torchruns(environment):
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    assert distributed.read_world() == World(rank=3, local_rank=1, size=4, local_size=2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR"])
def test_half_an_environment_is_named(environment, missing):
    for name, value in TORCHRUN.items():
        if name != missing:
            environment.setenv(name, value)
    with pytest.raises(ConfigError, match=missing):
        distributed.read_world()


def test_a_rank_that_is_no_number_is_refused(environment):
    for name, value in (TORCHRUN | {"RANK": "first"}).items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="first"):
        distributed.read_world()


@pytest.mark.parametrize("name, value", [("MASTER_PORT", "http"), ("MASTER_PORT", "99999"), ("RANK", "4"),
                                         ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "8"), ("RANK", "-1")])
def test_numbers_that_do_not_fit_together_are_named(environment, name, value):
    for key, text in (TORCHRUN | {name: value}).items():
        environment.setenv(key, text)
    with pytest.raises(ConfigError, match=f"{name}={value} .*do not fit together.*torchrun"):
        distributed.read_world()


def meet(environment, rank: int = 0, **variables: object) -> None:
    for key, value in (TORCHRUN | variables).items():
        environment.setenv(key, str(value))
    with distributed.process_group(World(rank=rank, local_rank=rank, size=2, local_size=2), torch.device("cpu"), 1.0):
        pytest.fail("there are no two ranks")


def test_a_port_in_use_is_named_with_the_way_out(environment):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} of this machine is in use.*--standalone"):
            meet(environment, MASTER_PORT=port)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_host_is_named_at_once(environment, rank):
    with pytest.raises(ConfigError, match="MASTER_ADDR=no.such.host.invalid is no host.*rank 0's machine"):
        meet(environment, rank, MASTER_ADDR="no.such.host.invalid")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_one_line(environment, rank):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(MachineError, match=f"2 ranks did not meet at .*MASTER_PORT={port} in train.timeout_s = 1 s"):
        meet(environment, rank, MASTER_PORT=port)
    assert not torch.distributed.is_initialized()


def test_one_rank_agrees_with_itself():
    assert distributed.gather({"a": [1, None]}, World()) == [{"a": [1, None]}]
    with pytest.raises(ConfigError, match="mine"), distributed.raise_on_all_ranks(World()):
        raise ConfigError("mine")


def test_a_copy_is_on_ranks_that_divide_all(capsys):
    assert [distributed.ranks_per_copy(shard, World(size=4)) for shard in (1, 2, 4, "all")] == [1, 2, 4, 4]
    for shard, size in ((3, 4), (8, 4), (2, 1)):
        with pytest.raises(ConfigError, match=f"train.shard = {shard} does not divide the {size} ranks?; use") as error:
            distributed.ranks_per_copy(shard, World(size=size))
        for word in re.findall(r"\d+|all", str(error.value).partition("use ")[2]):
            distributed.ranks_per_copy(int(word) if word.isdecimal() else word, World(size=size))
# ---- Rows of sharded tensors -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("copies", "shards"), [(1, 1), (1, 3), (1, 8), (2, 2), (3, 4)])
def test_the_rows_of_a_rank_are_those_that_pytorch_deals_it(copies, shards):
    """PyTorch's own offsets, on every rank of a group that only pretends: uneven rows, fewer rows than ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.testing._internal.distributed.fake_pg import FakeStore
    size, dealt = copies * shards, {}
    for rank in range(size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            meshes = [(init_device_mesh("cpu", (copies, shards)), [Replicate(), Shard(0)])]
            meshes += [(init_device_mesh("cpu", (size,)), [Shard(0)])] if copies == 1 else []
            for (mesh, placements), shape in itertools.product(meshes, [(1, 3), (7, 5), (8,), (13, 2, 2), (0, 4)]):
                local_shape, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
                strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
                rows = torch.zeros(local_shape)
                tensor = DTensor.from_local(rows, mesh, placements, run_check=False, shape=torch.Size(shape),
                                            stride=tuple(strides))
                first, end = distributed.local_rows(tensor)
                assert end - first == local_shape[0] and (first == offset[0] or first == end)
                assert distributed.local(tensor).shape == tuple(local_shape)
                assert distributed.local(tensor).data_ptr() == rows.data_ptr()
                dealt.setdefault((mesh.ndim, shape), []).extend(range(first, end))
        finally:
            torch.distributed.destroy_process_group()
    assert all(sorted(rows) == sorted(copies * list(range(shape[0]))) for (_, shape), rows in dealt.items())


def test_of_a_tensor_that_is_not_sharded_a_rank_has_all_rows():
    tensor = torch.zeros(4, 2)
    assert distributed.local(tensor) is tensor and distributed.local_rows(tensor) == (0, 4)
    assert distributed.local_rows(torch.tensor(1.0)) == (0, 1) and distributed.local_rows(torch.empty(0, 3)) == (0, 0)
