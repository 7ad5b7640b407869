"""What test_checkpoint.py lets torchrun's ranks do, on gloo, with DTensors: python -m torch.distributed.run ... FOLDER.

Each loads what fewer or more ranks saved, saves it again, and lives through what a disk can do to one of them.
"""

import errno
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import checkpoint
import distributed
import files
from config import ModelConfig, OptimConfig
from model import GPT
from optim import Optimizer

WHOLE = ("number", "none")  # what no rank shares: FSDP shards no numbers


def tensors_of(seed: int) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors: rows that do not divide, fewer rows than ranks, vectors, other dtypes, a number, none."""
    random = torch.Generator().manual_seed(seed)
    model = {"wte.weight": torch.randn(7, 5, generator=random), "one_row": torch.randn(1, 3, generator=random),
             "two_rows": torch.randn(2, 3, generator=random), "vector": torch.randn(10, generator=random),
             "bias": torch.randn(4, generator=random), "half": torch.randn(6, 4, generator=random).bfloat16(),
             "ids": torch.arange(9).reshape(9, 1), "cube": torch.randn(5, 2, 2, generator=random),
             "number": torch.tensor(3.5), "none": torch.empty(0, 4)}
    return {"model": model, "optimizer": {f"exp_avg.{name}": torch.randn(tensor.shape, generator=random)
                                          for name, tensor in model.items()}}


def sharded(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return {name: tensor.clone() if name.endswith(WHOLE) else distribute_tensor(tensor, mesh, placements)
            for name, tensor in tensors.items()}


def assert_rows(targets: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The bits of this rank's rows."""
    for name, whole in expected.items():
        first, end = distributed.local_rows(targets[name])
        part = whole[first:end] if whole.dim() else whole
        found = distributed.local(targets[name])
        assert found.dtype == part.dtype and torch.equal(found, part), name


def loads(path: Path, mesh: DeviceMesh, seed: int) -> None:
    for name, expected in tensors_of(seed).items():
        targets = sharded({key: torch.zeros_like(tensor) for key, tensor in expected.items()}, mesh)
        checkpoint.fill(targets, checkpoint.open_tensors(path, name))
        assert_rows(targets, expected)


def save(run: Path, step: int, mesh: DeviceMesh, world: distributed.World) -> Path:
    tensors = {name: sharded(part, mesh) for name, part in tensors_of(step).items()}
    return checkpoint.save(run, step, tensors=tensors, state={"val_loss": None}, keep=9, world=world)


def fails(action, world: distributed.World) -> str:
    """The SaveError that every rank raises."""
    try:
        action()
    except checkpoint.SaveError as error:
        assert len(set(distributed.gather(str(error), world))) == 1
        return str(error)
    raise AssertionError("nothing was raised")


def names(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def check_dcp(path: Path, mesh: DeviceMesh, seed: int) -> None:
    """PyTorch's own reader finds the same rows."""
    expected = {name: t for part in tensors_of(seed).values() for name, t in part.items() if not name.endswith(WHOLE)}
    targets = sharded({name: torch.zeros_like(tensor) for name, tensor in expected.items()}, mesh)
    dcp.load(targets, storage_reader=HuggingFaceStorageReader(path=str(path)))
    assert_rows(targets, expected)


def check_disk_of_one_rank(run: Path, mesh: DeviceMesh, world: distributed.World) -> None:
    """A disk that is full for the last rank alone, a thread that dies there: an error on all, nothing is changed."""
    before, write = names(run), files.write
    for error, words in ((OSError(errno.ENOSPC, "full"), "disk full"), (SystemExit(3), "ended with SystemExit")):
        def refused(path, parts, at=None, error=error):
            write(path, [b"half"])
            raise error

        if world.rank == world.size - 1:
            files.write = refused
        saver = checkpoint.BackgroundSaver(world)
        if isinstance(error, OSError):
            text = fails(lambda: save(run, 50, mesh, world), world)
            assert text.startswith(f"rank {world.size - 1}: checkpoint of step 50 was not saved"), text
            assert words in text, text
        saver.start(run, 50, tensors={name: sharded(part, mesh) for name, part in tensors_of(50).items()}, keep=9,
                    state={}, texts=None)
        text = fails(saver.finish, world)
        assert words in text, text
        files.write = write
        dist.barrier()
        assert names(run) == before
        saver.start(run, 51, tensors={name: sharded(part, mesh) for name, part in tensors_of(51).items()}, keep=9,
                    state={}, texts=None)
        saver.finish()  # the next one succeeds
        loads(run / "checkpoints" / "step_00000051", mesh, 51)
        dist.barrier()
        if world.is_main:
            files.delete_folder(run / "checkpoints" / "step_00000051")
        dist.barrier()


def check_background(run: Path, mesh: DeviceMesh, world: distributed.World) -> None:
    """What the tensors become while the thread writes is not saved; only a rank that is done says so."""
    tensors, write = {name: sharded(part, mesh) for name, part in tensors_of(60).items()}, files.write

    def slow(path, parts, at=None):
        time.sleep(1.0)
        write(path, parts, at)

    if world.rank == world.size - 1:
        files.write = slow
    saver = checkpoint.BackgroundSaver(world)
    saver.start(run, 60, tensors=tensors, state={"val_loss": None}, keep=9, texts=None)
    for part in tensors.values():
        for tensor in part.values():
            distributed.local(tensor).zero_()
    flags = distributed.gather(saver.is_writing(), world)
    assert flags[-1], "the slow rank is still at it"
    assert not (run / "checkpoints" / "step_00000060").exists()
    saver.finish()
    files.write = write
    assert not saver.is_writing() and saver.pending is None
    loads(run / "checkpoints" / "step_00000060", mesh, 60)
    places = {key: buffer.data_ptr() for key, buffer in saver._buffers.items()}
    saver.start(run, 61, tensors={name: sharded(part, mesh) for name, part in tensors_of(61).items()}, keep=9,
                state={"val_loss": None}, texts=None)
    saver.finish()
    loads(run / "checkpoints" / "step_00000061", mesh, 61)
    assert places == {key: buffer.data_ptr() for key, buffer in saver._buffers.items()}, "the buffers are used again"


def check_verifying(path: Path, world: distributed.World) -> None:
    """Every file is hashed by one rank, and a flipped bit is found by it."""
    hashed, sha256 = [], files.sha256
    files.sha256 = lambda file, *rest: (hashed.append(file.name), sha256(file, *rest))[1]
    assert checkpoint.problem(path, world) is None
    of_all = distributed.gather(hashed, world)
    assert sorted(sum(of_all, [])) == sorted(file.name for file in path.iterdir() if file.name != "manifest.json")
    assert all(of_all), "a rank without work"
    victim = path / f"optimizer-00002-of-{world.size:05d}.safetensors"
    if world.is_main:
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    dist.barrier()
    found = distributed.gather(checkpoint.problem(path, world), world)
    assert [text for text in found if text] == [f"{victim.name} does not have the sha256 of its manifest"]
    files.sha256 = sha256


def peak_growth(action) -> int:
    """How many bytes more this process held at once during the action than before it."""
    def kilobytes(key: str) -> int:
        return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    action()
    return 1024 * (kilobytes("VmHWM") - before)


def check_memory(run: Path, mesh: DeviceMesh, world: distributed.World) -> None:
    """No rank holds more than its share and one tensor: 24 tensors of 4 MB."""
    rows, share = 1024, 24 * 4 * 2 ** 20 // world.size
    most = share + 16 * 2 ** 20  # a tensor, two chunks of files that are hashed, and some
    tensors = {f"w{i}": distribute_tensor(torch.full((rows, 1024), float(i)), mesh, [Shard(0)]) for i in range(24)}
    what = {"tensors": {"model": tensors}, "state": {"val_loss": None}, "keep": 9}
    grown = peak_growth(lambda: checkpoint.save(run, 70, world=world, **what))
    assert grown < most - share, f"saving took {grown:,}"
    saved = checkpoint.open_tensors(run / "checkpoints" / "step_00000070", "model")
    for tensor in tensors.values():
        distributed.local(tensor).zero_()
    grown = peak_growth(lambda: checkpoint.fill(tensors, saved))
    assert grown < most, f"loading took {grown:,} of {most:,}"
    assert all((distributed.local(tensor) == float(name[1:])).all() for name, tensor in tensors.items())
    grown = peak_growth(lambda: [saved[name].sum() for name in saved])  # whole: the same number must be larger
    assert grown > most - share, f"the measure sees nothing: {grown:,}"


def check_fsdp(run: Path, mesh: DeviceMesh, world: distributed.World) -> None:
    """A model that FSDP2 shards, with tied embeddings, and its moments: saved, loaded into another, and into a whole
    one."""
    def built(seed: int) -> GPT:
        torch.manual_seed(seed)
        return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=20, max_seq_len=9, vocab_size=50))

    def shard(model: GPT) -> GPT:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        return model

    config, expected = OptimConfig(name="muon", decay_steps=10), built(1)
    model = shard(built(1))
    optimizer = Optimizer(model, config)
    for i, tensor in enumerate(optimizer.state_tensors().values()):
        distributed.local(tensor).fill_(float(i))
    path = checkpoint.save(run, 80, tensors={"model": model.state_dict(), "optimizer": optimizer.state_tensors()},
                           state={"val_loss": None}, keep=9, world=world)
    other, whole = shard(built(2)), built(2)
    moments = Optimizer(other, config).state_tensors()
    for target in (other, whole):
        checkpoint.load_into(target, checkpoint.open_tensors(path, "model"), "it")
    assert_rows(other.state_dict(), expected.state_dict())
    assert_rows(whole.state_dict(), expected.state_dict())
    checkpoint.fill(moments, checkpoint.open_tensors(path, "optimizer"))
    assert all((distributed.local(tensor) == i).all() for i, tensor in enumerate(moments.values())) and len(moments) > 8


def main(folder: Path) -> None:
    world = distributed.read_world()
    with distributed.process_group(world, torch.device("cpu"), 120.0):
        mesh = init_device_mesh("cpu", (world.size,))
        for size in range(1, world.size):  # what fewer ranks saved
            loads(folder / f"run_{size}" / "checkpoints" / f"step_{size:08d}", mesh, size)
        run = folder / f"run_{world.size}"
        path = save(run, world.size, mesh, world)
        files_of_rows = sorted(file.name for file in path.glob("model*"))
        assert files_of_rows == [f"model-{i + 1:05d}-of-{world.size:05d}.safetensors" for i in range(world.size)]
        loads(path, mesh, world.size)
        check_dcp(path, mesh, world.size)
        copies = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("copies", "rows"))
        loads(path, copies, world.size)
        path = save(folder / f"copies_{world.size}", 5, copies, world)
        assert {file.name for file in path.glob("*.safetensors")} == {"model.safetensors", "optimizer.safetensors"}
        loads(path, mesh, 5)
        dist.barrier()
        check_disk_of_one_rank(run, mesh, world)
        check_background(run, mesh, world)
        check_memory(run, mesh, world)
        check_fsdp(run, mesh, world)
        check_verifying(run / "checkpoints" / "step_00000060", world)
        print(f"rank {world.rank} of {world.size} is content", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
