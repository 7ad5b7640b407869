"""Checkpoints: crashes at every change to the disk, power cuts, full disks, flipped bits, and strict loading."""

import itertools
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

import checkpoint
import distributed
import files
import tensor_files
from checkpoint import CheckpointError, SaveError, load_into, load_state, load_tensors, newest, resolve, save
from distributed import World
from tests import checkpoint_ranks
from tests.crashing_disk import CRASHED, CrashingDisk, in_child

CHECKPOINT_FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def tensors_of(value: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A small model and its moments, recognisable by their value."""
    model = {"wte.weight": torch.full((5, 4), value), "h.0.bias": torch.full((3,), value + 0.5)}
    return model, {f"exp_avg.{name}": -tensor for name, tensor in model.items()}


def save_step(run: Path, step: int, value: float | None = None, keep: int = 10, **state) -> Path:
    model, optimizer = tensors_of(float(step) if value is None else value)
    return save(run, step, tensors={"model": model, "optimizer": optimizer}, keep=keep,
                state={"val_loss": None, **state})


def content(path: Path) -> float:
    """The value that the checkpoint was saved with; every tensor must agree on it."""
    value = float(load_tensors(path, "model")["wte.weight"][0, 0])
    for name, expected in zip(("model", "optimizer"), tensors_of(value), strict=True):
        loaded = load_tensors(path, name)
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in expected)
    return value


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def ignore(line: str) -> None:
    """A note that the test does not look at."""


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


# ---- Saving and loading ----------------------------------------------------------------------------------------------

def test_what_was_saved_comes_back(tmp_path):
    random = torch.Generator().manual_seed(0)
    model = {"a": torch.randn(7, 3, generator=random), "b": torch.randn(4, 6, generator=random).t(),
             "half": torch.randn(5, generator=random).bfloat16(), "count": torch.tensor(3), "none": torch.empty(0, 4)}
    optimizer = {"exp_avg.a": torch.randn(7, 3, generator=random)[:, ::2]}
    path = save(tmp_path, 12, tensors={"model": model, "optimizer": optimizer}, keep=2,
                state={"step": 12, "rows": [1, "x"]})
    assert path == tmp_path / "checkpoints" / "step_00000012"
    for name, expected in (("model", model), ("optimizer", optimizer)):
        loaded = load_tensors(path, name)
        assert loaded.keys() == expected.keys()
        for key, tensor in expected.items():
            assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor)
    assert load_state(path) == {"step": 12, "rows": [1, "x"]}


def test_a_checkpoint_has_the_files_of_the_contract_and_their_sizes_and_sha256(tmp_path):
    path = save_step(tmp_path, 1000)
    assert sorted(file.name for file in path.iterdir()) == CHECKPOINT_FILES
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(files) == [name for name in CHECKPOINT_FILES if name != "manifest.json"]
    for name, entry in files.items():
        said = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout
        assert entry == {"size": (path / name).stat().st_size, "sha256": said.split()[0]}


def test_all_files_of_a_checkpoint_can_be_read_by_the_same_people(tmp_path):
    path = save_step(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_the_optimizer_may_be_empty(tmp_path):
    path = save(tmp_path, 0, tensors={"model": tensors_of(1.0)[0], "optimizer": {}}, state={}, keep=1)
    assert newest(tmp_path, ignore) == path and load_tensors(path, "optimizer") == {}


def test_a_loss_that_is_not_finite_is_saved_as_null(tmp_path):
    path = save_step(tmp_path, 1, val_loss=float("nan"), history=[1.0, float("inf"), {"x": float("-inf")}])
    assert load_state(path) == {"step": 1, "val_loss": None, "history": [1.0, None, {"x": None}]}


def test_saving_a_step_again_replaces_it(tmp_path):
    save_step(tmp_path, 5, value=1.0)
    save_step(tmp_path, 5, value=2.0)
    assert names(tmp_path) == ["step_00000005"]
    assert content(newest(tmp_path, ignore)) == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: saving from and loading to a GPU are unchecked")
def test_tensors_on_a_gpu_come_back(tmp_path):
    model = {"a": torch.randn(7, 3, device="cuda").t()}
    path = save(tmp_path, 1, tensors={"model": model, "optimizer": {}}, state={}, keep=1)
    assert torch.equal(load_tensors(path, "model")["a"], model["a"].cpu())


# ---- Retention -------------------------------------------------------------------------------------------------------

def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5), (5, float("nan")), (6, 2.7)):
        save_step(tmp_path, step, keep=2, val_loss=loss)
    assert names(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]


def test_of_equally_good_checkpoints_the_newest_is_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, keep=1, val_loss=2.0 if step < 4 else 3.0)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_the_checkpoint_just_saved_is_kept_whatever_else_is_there(tmp_path):
    save_step(tmp_path, 9, keep=1)
    save_step(tmp_path, 5, keep=1)
    assert "step_00000005" in names(tmp_path)


def test_retention_leaves_other_names_alone(tmp_path):
    others = ["step_00000001_backup", "step_00000001.damaged", "notes.txt", "step_1"]
    save_step(tmp_path, 1)
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir()
    for step in (2, 3):
        save_step(tmp_path, step, keep=1)
    assert names(tmp_path) == sorted([*others, "step_00000003"])


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, monkeypatch):
    def refused(path, ignore_errors=False):
        raise PermissionError(13, "Permission denied")

    save_step(tmp_path, 1)
    monkeypatch.setattr(files, "delete_folder", refused)
    save_step(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert newest(tmp_path, ignore).name == "step_00000002"
    assert names(tmp_path) == ["step_00000002"]


# ---- Crashes and power cuts ------------------------------------------------------------------------------------------

SAVES = ((1, 1.0), (2, 2.0), (3, 3.0), (3, 30.0), (4, 4.0))  # (step, value): retention from step 2, one replacement


def run_saves(run: Path, crash_at: int, loss: str, *, forgets: str | None = None) -> int:
    """SAVES in a child that crashes at the n-th change; how many returned. crash_at = 0: no crash; all changes.

    forgets: what a broken writer would not sync, "files" or "names" (the folder that a checkpoint is renamed in).
    """
    progress = run.with_name(run.name + ".progress")

    def forgotten(path: Path) -> bool:
        return path.is_file() if forgets == "files" else path.name == "checkpoints"

    def saves() -> None:
        disk = CrashingDisk(crash_at, loss)
        disk.install()
        if forgets is not None:
            files.sync = lambda path: None if forgotten(path) else disk.sync(path)
        for finished, (step, value) in enumerate(SAVES):
            progress.write_text(str(finished))
            save_step(run, step, value, keep=1, val_loss=float(step))
        progress.write_text(str(disk.changes))

    status = in_child(saves)
    assert status == (CRASHED if crash_at else 0)
    return int(progress.read_text())


def survivors(run: Path) -> float:
    """What the next start finds: the value of the newest valid checkpoint, 0.0 for none."""
    path = newest(run, ignore)
    return 0.0 if path is None else content(path)


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the children run this file's code only


@pytest.mark.parametrize("loss", ["none", "torn", "zeroed", "undone"])
def test_after_a_crash_at_any_change_the_last_finished_save_or_a_later_one_is_there(tmp_path, loss):
    changes = run_saves(tmp_path / "whole", 0, loss)
    assert changes > 60
    for crash_at in range(1, changes + 1):
        run = tmp_path / f"crash_{crash_at}"
        finished = run_saves(run, crash_at, loss)
        values = [0.0] + [value for _, value in SAVES]
        assert survivors(run) in values[finished:finished + 2], f"crash at change {crash_at} of {changes}"
        assert not list(run.glob("checkpoints/.tmp*")) + list(run.glob("checkpoints/*.replaced"))
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.parametrize(("forgets", "loss"), [("files", "zeroed"), ("files", "torn"), ("names", "undone")])
def test_the_crash_test_catches_a_writer_that_forgets_to_sync(tmp_path, forgets, loss):
    """The harness must be able to fail."""
    lost = 0
    for crash_at in range(8, 30):
        run = tmp_path / f"crash_{crash_at}"
        finished = run_saves(run, crash_at, loss, forgets=forgets)
        lost += survivors(run) < SAVES[finished - 1][1] if finished else 0
    assert lost > 0


def test_a_reader_finds_a_valid_checkpoint_at_every_moment_of_a_replacement(tmp_path):
    for crash_at in range(1, 40):
        run = tmp_path / f"crash_{crash_at}"
        save_step(run, 7, value=1.0)

        def replace(run=run, crash_at=crash_at) -> None:
            CrashingDisk(crash_at, "none").install()
            save_step(run, 7, value=2.0)

        status, before = in_child(replace), names(run)
        found = content(resolve(run, ignore))
        assert names(run) == before  # a reader changes nothing
        assert survivors(run) == found and names(run) == ["step_00000007"]
        assert found == 2.0 if status == 0 else found in (1.0, 2.0)
        if status == 0:
            break
    assert status == 0 and crash_at > 10


def test_leftovers_and_unknown_names_are_never_picked_and_leftovers_go(tmp_path):
    kept = save_step(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    shutil.copytree(kept, folder / ".tmp-step_00000009")
    shutil.copytree(kept, folder / ".tmp-old-step_00000001")
    shutil.copytree(kept, folder / "step_00000010_backup")
    shutil.copytree(kept, folder / "step_00000011.damaged")
    (folder / "step_00000012").write_text("a file")
    assert newest(tmp_path, pytest.fail) == resolve(tmp_path, pytest.fail) == kept
    assert names(tmp_path) == ["step_00000003", "step_00000010_backup", "step_00000011.damaged", "step_00000012"]


def test_a_manifest_nested_too_deeply_is_damage(tmp_path):
    save_step(tmp_path, 1)
    bad = save_step(tmp_path, 2)
    (bad / "manifest.json").write_text("[" * 100_000)
    notes = []
    assert content(newest(tmp_path, notes.append)) == 1.0 and "manifest.json is not a manifest" in notes[0]
    (tmp_path / "checkpoints" / "step_00000001" / "state.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="state.json' cannot be read: it is nested too deeply; use another"):
        checkpoint.load_state(tmp_path / "checkpoints" / "step_00000001")


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest(tmp_path / "nowhere", pytest.fail) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path, pytest.fail) is None


# ---- Full and failing disks ------------------------------------------------------------------------------------------

def assert_only_step_1(run: Path) -> None:
    assert names(run) == ["step_00000001"]
    assert content(newest(run, pytest.fail)) == 1.0


@pytest.mark.parametrize("limit", [500, 100_000, 3_000_000])  # in the header, in the first file, in the second file
def test_a_file_that_cannot_grow_is_one_error_and_leaves_older_checkpoints(tmp_path, limit):
    save_step(tmp_path, 1)
    model, optimizer = {"a": torch.zeros(1_000_000)}, {"b": torch.zeros(500_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SaveError, match="step 2 was not saved.*File too large.*older checkpoints") as caught:
            save(tmp_path, 2, tensors={"model": model, "optimizer": optimizer}, state={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert_only_step_1(tmp_path)


def test_too_little_free_space_is_found_before_writing(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 3_000_000, 3_000_000))
    monkeypatch.setattr(tensor_files, "write", pytest.fail)
    with pytest.raises(SaveError, match=r"disk full, 0.005 GB are needed and 0.003 GB is free"):
        save(tmp_path, 2, tensors={"model": {"a": torch.zeros(1_000_000)}, "optimizer": {}}, state={}, keep=1)
    monkeypatch.undo()
    assert_only_step_1(tmp_path)


def test_a_disk_that_fills_up_while_writing_is_an_error_and_not_a_bus_error(tmp_path, monkeypatch):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a small tmpfs (not root): ENOSPC from a real file system is unchecked")
    try:
        save_step(tmp_path, 1)
        monkeypatch.setattr(checkpoint, "_check_space", lambda folder, needed: None)  # someone else fills it meanwhile
        with pytest.raises(SaveError, match="disk full, 0.009 GB are needed and 0.00[34] GB is free"):
            save(tmp_path, 2, state={}, keep=1, tensors={"model": {"a": torch.zeros(500_000)},
                                                         "optimizer": {"b": torch.zeros(1_500_000)}})
        assert_only_step_1(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_sync_that_fails_fails_the_save(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    save_step(tmp_path, 1)
    monkeypatch.setattr(files, "sync", broken)
    with pytest.raises(SaveError, match="Input/output error"):
        save_step(tmp_path, 2, keep=1)
    assert_only_step_1(tmp_path)


def test_the_next_save_after_a_failed_one_succeeds(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_check_space", lambda folder, needed: os.listdir(folder / "nowhere"))
    with pytest.raises(SaveError):
        save_step(tmp_path, 1)
    monkeypatch.undo()
    assert newest(tmp_path, pytest.fail) is None
    save_step(tmp_path, 2)
    assert survivors(tmp_path) == 2.0


# ---- Damage ----------------------------------------------------------------------------------------------------------

def test_sixty_random_bit_flips_are_all_found(tmp_path):
    path = save_step(tmp_path, 2)
    good = {name: (path / name).read_bytes() for name in CHECKPOINT_FILES}
    random = np.random.default_rng(0)
    for trial in range(60):
        name = CHECKPOINT_FILES[trial % 4]
        flip(path / name, int(random.integers(8 * len(good[name]))))
        with pytest.raises(CheckpointError, match="is damaged"):
            resolve(path, ignore)
        (path / name).write_bytes(good[name])
    assert resolve(path, pytest.fail) == path


def test_bit_flips_all_over_the_manifest_are_found(tmp_path):
    path = save_step(tmp_path, 2)
    good = (path / "manifest.json").read_bytes()
    for bit in range(0, 8 * len(good), 5):
        (path / "manifest.json").write_bytes(good)
        flip(path / "manifest.json", bit)
        assert checkpoint.problem(path) is not None, f"bit {bit}"


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("size", [None, 0, 1, 100])
def test_a_damaged_newest_is_set_aside_with_a_note_and_the_one_before_is_used(tmp_path, name, size):
    save_step(tmp_path, 1)
    damaged = save_step(tmp_path, 2, padding="x" * 100)
    if size is None:
        (damaged / name).unlink()
    else:
        os.truncate(damaged / name, size)
    notes = []
    assert newest(tmp_path, notes.append) == tmp_path / "checkpoints" / "step_00000001"
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged"]
    [note] = notes
    assert note.startswith("checkpoint step_00000002 is damaged: " + name)
    assert note.endswith("renamed step_00000002.damaged")


def test_damaged_twice_at_the_same_step_keeps_both(tmp_path):
    for _ in range(2):
        flip(save_step(tmp_path, 2) / "state.json", 50)
        assert newest(tmp_path, ignore) is None
    assert names(tmp_path) == ["step_00000002.damaged", "step_00000002.damaged2"]


def test_resolve_passes_over_a_damaged_newest_and_changes_nothing(tmp_path):
    good = save_step(tmp_path, 1)
    flip(save_step(tmp_path, 2) / "model.safetensors", 1000)
    notes, before = [], names(tmp_path)
    assert resolve(tmp_path, notes.append) == good
    assert names(tmp_path) == before
    assert len(notes) == 1 and "step_00000002" in notes[0] and "model.safetensors" in notes[0]


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(tmp_path):
    assert checkpoint.best_of(tmp_path) is None
    paths = [save_step(tmp_path, step, keep=9, val_loss=loss) for step, loss in enumerate((3.0, 1.5, None, 2.0), 1)]
    assert checkpoint.best_of(tmp_path) == paths[1]


def test_resolve_takes_a_run_or_one_checkpoint(tmp_path):
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    assert resolve(str(tmp_path), pytest.fail) == second
    assert resolve(first, pytest.fail) == first


def test_resolve_says_what_is_wrong_and_the_way_out(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").touch()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    flip(save_step(tmp_path / "bad", 1) / "state.json", 9)
    for run, message in (("gone", "does not exist"), ("empty", "no checkpoint; train"),
                         (".", "not a run folder .*; name one, such as .*/empty"), ("hf", "convert.py from-hf"),
                         ("bad", "no valid checkpoint: 1 damaged"),
                         ("bad/checkpoints/step_00000001", "damaged: state.json does not have the sha256")):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve(tmp_path / run, ignore)
        assert str(tmp_path / run) in str(caught.value)


def test_a_pickle_in_place_of_tensors_is_refused_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = save_step(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in CHECKPOINT_FILES[1:]:
        (path / name).write_bytes(pickle.dumps(Bomb()))
        size = (path / name).stat().st_size
        manifest["files"][name] = {"size": size, "sha256": files.sha256(path / name)}  # an attacker can do that
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert resolve(tmp_path, pytest.fail) == path
    for load in (lambda: load_tensors(path, "model"), lambda: load_tensors(path, "optimizer"),
                 lambda: load_state(path)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load()
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "executed").exists()  # the bomb was live


# ---- Loading into a model --------------------------------------------------------------------------------------------

class Tied(nn.Module):
    """Two linear layers, the second sharing the first one's weight, and a buffer."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.zeros(2))


def good_tensors() -> dict[str, Tensor]:
    return {"first.weight": torch.ones(4, 4), "first.bias": torch.full((4,), 2.0), "scale": torch.full((2,), 3.0)}


def test_loading_fills_parameters_and_buffers_and_keeps_the_tie(tmp_path):
    model = Tied()
    load_into(model, good_tensors(), "run 'x'")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in good_tensors().items())
    assert model.second.weight is model.first.weight and torch.equal(model.second.weight, torch.ones(4, 4))


def test_loading_converts_to_the_models_dtype():
    model = Tied().bfloat16()
    load_into(model, good_tensors(), "run 'x'")
    assert model.first.weight.dtype == torch.bfloat16 and float(model.first.weight[0, 0].detach()) == 1.0


def test_all_misfits_are_named_in_one_error_and_nothing_is_changed():
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {**good_tensors(), "third.weight": torch.ones(1), "first.bias": torch.ones(7)}
    del tensors["scale"]
    with pytest.raises(CheckpointError) as caught:
        load_into(model, tensors, "run 'x'")
    for part in ("run 'x'", "missing scale", "unknown third.weight", "first.bias [7] for [4]", "[model]"):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("prefix", "source"), [("_orig_mod.", "torch.compile"),
                                                ("module.", "DistributedDataParallel")])
def test_the_prefix_of_a_wrapper_is_named_and_not_guessed_away(prefix, source):
    with pytest.raises(CheckpointError, match=f"begin with '{prefix}', which {source} adds"):
        load_into(Tied(), {prefix + name: tensor for name, tensor in good_tensors().items()}, "run 'x'")


def test_a_long_list_of_misfits_is_cut():
    with pytest.raises(CheckpointError, match="unknown x0, x1, x2, x3, x4 and 95 more"):
        load_into(Tied(), {**good_tensors(), **{f"x{i}": torch.ones(1) for i in range(100)}}, "run 'x'")


# ---- Files of rows ---------------------------------------------------------------------------------------------------

class RowsOf:
    """What checkpoint.py looks at of a DTensor, without processes: rows dealt to ranks, in so many copies."""

    def __init__(self, whole: Tensor, world: World, copies: int = 1):
        self.shape, self.placements, self.device_mesh = whole.shape, (Replicate(), Shard(0)), self
        self.sizes = (copies, world.size // copies)
        self.places = divmod(world.rank, self.sizes[1])
        height = -(-len(whole) // self.sizes[1])
        self.part = whole[self.places[1] * height:(self.places[1] + 1) * height].clone()

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_local_rank(self, dim: int) -> int:
        return self.places[dim]

    def dim(self) -> int:
        return len(self.shape)

    def detach(self) -> "RowsOf":
        return self

    def to_local(self) -> Tensor:
        return self.part


def in_threads(ranks: int, work, monkeypatch: pytest.MonkeyPatch) -> list:
    """work(world) on so many ranks, each a thread; what each returned, or the first error."""
    barrier, values = threading.Barrier(ranks, timeout=60), [None] * ranks

    def gather(value: object, world: World) -> list:
        values[world.rank] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    with monkeypatch.context() as patch, ThreadPoolExecutor(ranks) as pool:
        patch.setattr(distributed, "gather", gather)
        futures = [pool.submit(work, World(rank=rank, size=ranks)) for rank in range(ranks)]
        return [future.result() for future in futures]


def save_rows(run: Path, step: int, value: float, world: World, *, copies: int = 1, keep: int = 10, **state) -> Path:
    tensors = {name: {key: RowsOf(tensor, world, copies) for key, tensor in part.items()}
               for name, part in zip(("model", "optimizer"), tensors_of(value), strict=True)}
    return save(run, step, tensors=tensors, state={"val_loss": None, **state}, keep=keep, world=world)


def file_names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_one_process_writes_the_bytes_that_it_always_wrote(tmp_path):
    """Hashes of what the version before the files of rows wrote."""
    model = {"wte.weight": torch.arange(20.).reshape(5, 4), "half": torch.arange(6.).bfloat16(),
             "number": torch.tensor(2.5), "turned": torch.arange(6).reshape(2, 3).t()}
    tensors = {"model": model, "optimizer": {f"exp_avg.{name}": -tensor for name, tensor in model.items()}}
    path = save(tmp_path, 7, tensors=tensors, state={"val_loss": 2.0, "b": [1, None]}, keep=1,
                texts={"adapter_config": {"r": 2}})
    assert {name: files.sha256(path / name)[:16] for name in file_names(path)} == {
        "adapter_config.json": "c3f42c6f4b426808", "manifest.json": "750f992952543985",
        "model.safetensors": "f7f201eee98c015a", "optimizer.safetensors": "5e072cd08586868b",
        "state.json": "a31e116f1947f82f"}


def test_a_file_of_the_librarys_writer_is_read_tensor_by_tensor(tmp_path):
    tensors = {"a": torch.randn(6, 3), "number": torch.tensor(2.0), "none": torch.empty(0, 4),
               "half": torch.ones(2).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    saved = checkpoint.open_tensors(tmp_path, "model")
    assert {name: (like.shape, like.dtype) for name, like in saved.like.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    assert len(saved) == 4 and all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(saved.rows("a", 2, 5), tensors["a"][2:5]) and saved.rows("a", 3, 3).shape == (0, 3)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_write_their_rows_and_any_number_of_ranks_reads_them(tmp_path, monkeypatch, ranks):
    whole = {"a": torch.arange(35.).reshape(7, 5), "b": torch.arange(3.), "c": torch.arange(10).reshape(5, 2, 1)}

    def write(world: World) -> Path:
        return save(tmp_path, 1, tensors={"model": {name: RowsOf(tensor, world) for name, tensor in whole.items()}},
                    state={}, keep=1, world=world)

    [path, *_] = in_threads(ranks, write, monkeypatch)
    writers = {2: 2, 3: 3, 6: 5}[ranks]  # by twos 7 rows go to 4 ranks, by ones 5 rows to 5: the sixth has none
    assert file_names(path) == ["manifest.json", *(f"model-{i + 1:05d}-of-{writers:05d}.safetensors"
                                                   for i in range(writers)), "state.json"]
    saved = checkpoint.open_tensors(path, "model")
    assert resolve(path, pytest.fail) == path and all(torch.equal(saved[name], whole[name]) for name in whole)
    for first, end in itertools.combinations(range(8), 2):  # across the files' borders
        assert torch.equal(saved.rows("a", first, end), whole["a"][first:end])
    for others in (1, 2, 4, 8):
        def read(world: World) -> None:
            targets = {name: RowsOf(torch.zeros_like(tensor), world) for name, tensor in whole.items()}
            checkpoint.fill(targets, saved)
            assert all(torch.equal(targets[name].part, RowsOf(tensor, world).part) for name, tensor in whole.items())
            checkpoint.fill(targets, {name: -tensor for name, tensor in whole.items()})  # of a plain dict too
            assert all(torch.equal(targets[name].part, RowsOf(-tensor, world).part) for name, tensor in whole.items())

        in_threads(others, read, monkeypatch)


def test_of_several_copies_of_the_rows_one_writes(tmp_path, monkeypatch):
    [path, *_] = in_threads(4, lambda world: save_rows(tmp_path, 1, 5.0, world, copies=2), monkeypatch)
    assert [name for name in file_names(path) if name.startswith("model")] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert content(path) == 5.0


@pytest.mark.parametrize(("change", "message"), [
    (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), "rows . to . of .* are missing in"),
    (lambda path: (path / "model-00003-of-00003.safetensors").unlink(), "rows . to . of .* are missing in"),
    (lambda path: shutil.copy(path / "model-00001-of-00003.safetensors", path / "model-00001-of-00002.safetensors"),
     "rows [02] to . of .* are there twice in"),
    (lambda path: save_file(tensors_of(5.0)[0], path / "model.safetensors"), "rows [02] to . of .* are there twice in"),
    (lambda path: save_file({"wte.weight": torch.zeros(1, 4)}, path / "model-00003-of-00003.safetensors"),
     r"model-00003.*its wte.weight is torch.float32 \[1, 4\], in another file torch.float32 \[5, 4\]"),
    (lambda path: save_file({"h.0.bias": torch.zeros(1).half()}, path / "model-00003-of-00003.safetensors",
                            {"rows": '{"h.0.bias": [2, 3]}'}), "model-00003.*its h.0.bias is torch.float16"),
    (lambda path: (path / "model-00003-of-00003.safetensors").write_bytes(b"x" * 99), "model-00003.*cannot be read"),
    (lambda path: save_file({"h.0.bias": torch.zeros(1)}, path / "model-00003-of-00003.safetensors",
                            {"rows": '{"h.0.bias": 7}'}), "model-00003.*cannot be read")])
def test_files_that_are_not_all_rows_once_are_refused_by_name(tmp_path, monkeypatch, change, message):
    [path, *_] = in_threads(3, lambda world: save_rows(tmp_path, 1, 5.0, world), monkeypatch)
    change(path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open_tensors(path, "model")
    if "twice" not in message:  # more files than the manifest names are none of its business
        with pytest.raises(CheckpointError, match="is damaged: model-0000[23]-of-00003.safetensors"):
            resolve(path, ignore)


def test_a_damaged_file_of_rows_is_found_and_the_moments_may_stay_unread(tmp_path, monkeypatch):
    [path, *_] = in_threads(2, lambda world: save_rows(tmp_path, 1, 5.0, world), monkeypatch)
    flip(path / "optimizer-00002-of-00002.safetensors", 900)
    assert resolve(path, pytest.fail, unread=checkpoint.WEIGHTS_ONLY) == path
    with pytest.raises(CheckpointError, match="optimizer-00002-of-00002.safetensors does not have the sha256"):
        resolve(path, pytest.fail)
    found = in_threads(3, lambda world: checkpoint.problem(path, world), monkeypatch)
    assert [text for text in found if text] == ["optimizer-00002-of-00002.safetensors does not have the sha256 of its "
                                                "manifest"]


def run_saves_of_rows(run: Path, crash_at: int, loss: str, monkeypatch, *, forgets: bool = False) -> int:
    """As run_saves, by two ranks; forgets: rank 1 does not sync its files."""
    progress = run.with_name(run.name + ".progress")

    def saves() -> None:
        disk = CrashingDisk(crash_at, loss)
        disk.install()
        if forgets:
            sync = files.sync
            files.sync = lambda path: None if "00002-of" in path.name else sync(path)

        def work(world: World) -> None:
            for finished, (step, value) in enumerate(SAVES[1:4]):
                if world.is_main:
                    progress.write_text(str(finished))
                save_rows(run, step, value, world, keep=1)

        in_threads(2, work, monkeypatch)
        progress.write_text(str(disk.changes))

    status = in_child(saves)
    assert status == (CRASHED if crash_at else 0)
    return int(progress.read_text())


@pytest.mark.parametrize("loss", ["none", "torn", "zeroed", "undone"])
def test_after_a_crash_of_any_rank_at_any_change_a_finished_save_of_rows_is_there(tmp_path, monkeypatch, loss):
    changes = run_saves_of_rows(tmp_path / "whole", 0, loss, monkeypatch)
    assert changes > 50
    for crash_at in range(1, changes + 1):
        run = tmp_path / f"crash_{crash_at}"
        finished = run_saves_of_rows(run, crash_at, loss, monkeypatch)
        values = [0.0] + [value for _, value in SAVES[1:4]]
        assert survivors(run) in values[finished:finished + 2], f"crash at change {crash_at} of {changes}"
        assert not list(run.glob("checkpoints/.tmp*")) + list(run.glob("checkpoints/*.replaced"))
        shutil.rmtree(run, ignore_errors=True)


def test_the_crash_test_catches_a_rank_that_forgets_to_sync_its_rows(tmp_path, monkeypatch):
    lost = 0
    for crash_at in range(16, 40, 2):
        run = tmp_path / f"crash_{crash_at}"
        finished = run_saves_of_rows(run, crash_at, "zeroed", monkeypatch, forgets=True)
        lost += survivors(run) < SAVES[finished][1] if finished else 0
    assert lost > 0


def test_more_room_than_one_rank_needs_is_asked_for_all(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 3_000_000, 3_000_000))

    def work(world: World) -> str:
        tensors = {"model": {"a": RowsOf(torch.zeros(1_000_000), world)}}
        with pytest.raises(SaveError) as caught:
            save(tmp_path, 2, tensors=tensors, state={}, keep=1, world=world)
        return str(caught.value)

    [text, *others] = in_threads(4, work, monkeypatch)
    assert "disk full, 0.005 GB are needed and 0.003 GB is free" in text and others == 3 * [text]
    assert names(tmp_path) == []


def test_processes_save_and_load_each_others_checkpoints_and_share_every_failure(tmp_path):
    """1 -> 2 -> 3 -> 1 ranks with DTensors; tests/checkpoint_ranks.py says what each launch checks."""
    save(tmp_path / "run_1", 1, tensors=checkpoint_ranks.tensors_of(1), state={"val_loss": None}, keep=9)
    root = Path(checkpoint.__file__).parent
    for ranks in (2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                   str(root / "tests" / "checkpoint_ranks.py"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
        assert done.returncode == 0 and done.stdout.count("is content") == ranks, done.stdout + done.stderr
        path = resolve(tmp_path / f"run_{ranks}" / "checkpoints" / f"step_{ranks:08d}", pytest.fail)
        for name, expected in checkpoint_ranks.tensors_of(ranks).items():
            loaded = load_tensors(path, name)
            assert loaded.keys() == expected.keys()
            for key, tensor in expected.items():
                assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor), key
