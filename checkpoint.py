"""Checkpoints: the only file that knows their layout. Save, choose the newest valid one, load, verify.

    RUN/checkpoints/step_00001000/   model.safetensors  optimizer.safetensors  state.json  manifest.json

Of a sharded run each rank writes the rows it holds, model-00001-of-00008.safetensors, and any number of ranks reads
them. A checkpoint is written to a temporary folder, every file and the folder are synced, then it is renamed; it counts
only if every file has the size and sha256 that manifest.json records, because no tensor format notices a flipped bit.
So a crash, a power cut or a full disk leaves the checkpoints before it as they were. There is no pickle: loading never
executes code. What the files mean is the business of those who save them (train.py, finetune/lora.py, convert.py).
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

import distributed
import files
import tensor_files
from config import MachineError, UserError
from distributed import World
from tensor_files import SavedTensors, bytes_of, row_count

FORMAT = 1
STATE, MANIFEST = "state.json", "manifest.json"
STEP_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
FILE_NAME = re.compile(r"(\w+?)(-\d{5,}-of-\d{5,})?\.safetensors")  # all rows of these tensors, or one rank's
PLAIN_NAME = re.compile(r"[\w-]+(\.[\w-]+)+", re.ASCII)  # in the folder itself, whatever a manifest says
WEIGHTS_ONLY, SIZES_ONLY = ("optimizer",), ("optimizer", "model", "adapter_model")  # what verifying leaves unread
TEMPORARY = ".tmp-"  # prefix of folders that are being written or deleted
MARGIN_BYTES = 1 << 20  # free space asked for beyond the tensors: headers, JSON, folder blocks


class CheckpointError(UserError):
    """No checkpoint where one is needed, a damaged one, or one that does not fit the model."""


class SaveError(MachineError):
    """A checkpoint could not be written; the ones before it are untouched."""


# ---- Saving ----------------------------------------------------------------------------------------------------------

def save(run_dir: Path, step: int, *, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int,
         texts: dict[str, dict] | None = None, world: World = World()) -> Path:  # noqa: B008
    """Write RUN/checkpoints/step_<step>, then delete all others but the newest `keep` and the one with the best
    val_loss. One saved while steps were skipped counts for none of them: its weights may be what makes them fail.
    Every rank calls this.

    tensors: {"model": {name: tensor}, "optimizer": ...}, on any device, become NAME.safetensors, the largest first; of
    sharded ones (DTensors) each rank writes the rows it holds, into a file of its own. state and texts
    ({"adapter_config": ...}) hold JSON values and become NAME.json; state's "val_loss" may be None.
    Raises SaveError on all ranks, with nothing changed, if the disk fails on any or is too full.
    """
    one = _Save(run_dir, step, tensors=tensors, state=state, keep=keep, texts=texts, world=world)
    return one.publish(one.write)


class _Save:
    """One save: all ranks make it together, each writes its files alone (a thread may), and all publish it together."""

    def __init__(self, run_dir: Path, step: int, *, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int,
                 texts: dict[str, dict] | None, world: World):
        self.run_dir, self.step, self.keep, self.world = run_dir, step, keep, world
        self.folder = Path(run_dir) / "checkpoints"
        self.final = self.folder / f"step_{step:08d}"
        self.temporary = self.folder / (TEMPORARY + self.final.name)
        pieces = {name: _pieces(part, world) for name, part in tensors.items()}
        sizes = distributed.gather({name: bytes_of(held) for name, (held, _) in pieces.items() if held}, world)
        self.needed = sum(sum(of_rank.values()) for of_rank in sizes) + MARGIN_BYTES  # on a disk that all ranks share
        self.tensors: dict[str, tuple[dict[str, Tensor], dict[str, str] | None]] = {}  # by file, the largest first
        for name, (held, rows) in sorted(pieces.items(), key=lambda item: bytes_of(item[1][0]), reverse=True):
            writers = [rank for rank, of_rank in enumerate(sizes) if name in of_rank] or [0]
            if len(writers) > 1 and world.rank in writers:
                number = f"{writers.index(world.rank) + 1:05d}-of-{len(writers):05d}"
                self.tensors[f"{name}-{number}.safetensors"] = held, rows
            elif world.rank in writers:
                self.tensors[f"{name}.safetensors"] = held, None
        self.texts = {f"{name}.json": _to_json(text) for name, text in
                      {"state": {"step": step, **state}, **(texts or {})}.items()} if world.is_main else {}
        with self.on_all_ranks():
            if world.is_main:
                self._make_folders()

    def _make_folders(self) -> None:
        if not self.folder.is_dir():
            if not self.folder.parent.is_dir():
                files.make_folder(self.folder.parent)
            files.make_folder(self.folder)
            files.sync(self.folder.parent)
            files.sync(self.folder.parent.parent)
        _check_space(self.folder, self.needed)
        if self.temporary.exists():
            files.delete_folder(self.temporary)
        files.make_folder(self.temporary)

    @contextmanager
    def on_all_ranks(self) -> Iterator[None]:
        """What the disk refuses a rank in the block ends the save on all, as SaveError, and leaves nothing of it."""
        try:
            with distributed.raise_on_all_ranks(self.world, SaveError):
                try:
                    yield
                except OSError as error:
                    with suppress(OSError):
                        for name in (*self.tensors, *self.texts):
                            (self.temporary / name).unlink(missing_ok=True)  # that is room again
                    reason = _reason(error, self.folder, self.needed)
                    raise SaveError(f"checkpoint of step {self.step} was not saved to {str(self.folder)!r}: {reason}; "
                                    "older checkpoints are untouched") from error
        except SaveError:
            if self.world.is_main:
                files.delete_folder(self.temporary, ignore_errors=True)
            raise

    def write(self) -> dict[str, dict]:
        """Write and sync the files of this rank; their sizes and hashes. Meets no other rank. Raises OSError.

        Each file is hashed by a thread while the next is written and synced (hashlib lets go of the GIL); the larger
        file comes first, so that its hashing hides behind the rest.
        """
        hashes: dict[str, Future] = {}
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint-hash") as pool:
            for name, (part, metadata) in self.tensors.items():
                tensor_files.write(self.temporary / name, part, metadata)
                hashes[name] = pool.submit(files.sha256, self.temporary / name)
            for name, text in self.texts.items():
                files.write(self.temporary / name, [text])
                hashes[name] = pool.submit(files.sha256, self.temporary / name)
            for name in hashes:
                files.sync(self.temporary / name)
        return {name: {"size": (self.temporary / name).stat().st_size, "sha256": future.result()}
                for name, future in hashes.items()}

    def publish(self, entries: Callable[[], dict[str, dict]]) -> Path:
        """entries: what write() returned on this rank, or raises. Raises SaveError."""
        with self.on_all_ranks():
            own = entries()
        of_all_ranks = distributed.gather(own, self.world)
        with self.on_all_ranks():
            if self.world.is_main:
                manifest = {name: entry for of_rank in of_all_ranks for name, entry in of_rank.items()}
                files.write(self.temporary / MANIFEST, [_to_json({"format": FORMAT, "files": manifest})])
                files.sync(self.temporary / MANIFEST)
                files.sync(self.temporary)
                _publish(self.temporary, self.final)
                saved = _candidates(self.final.parent, replaced=False)
                good = [path for path in saved if not _recorded(path, "skips_in_a_row")]
                for path in set(saved) - {self.final, best_of(self.run_dir), *good[:self.keep]}:
                    with suppress(OSError):  # one that stays costs space, not safety; the next save tries again
                        _discard(path)
        return self.final


class BackgroundSaver:
    """save() beside the training, one at a time: start() copies, a thread writes, finish() waits and publishes. After
    start() what the tensors hold changes nothing. The copies' memory is kept from save to save."""

    def __init__(self, world: World):
        self._world, self._buffers, self._pool = world, {}, ThreadPoolExecutor(1, "checkpoint-writer")
        self.pending: _Save | None = None  # until finish(), the same on all ranks
        self._written: Future | None = None

    def start(self, run_dir: Path, step: int, **what) -> None:
        """As save() takes it. Raises SaveError."""
        save = _Save(run_dir, step, world=self._world, **what)
        with save.on_all_ranks():
            try:
                for file, (part, _) in save.tensors.items():
                    for name, tensor in part.items():
                        place, pinned = (file, name), tensor.is_cuda
                        if place not in self._buffers:
                            self._buffers[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                        part[name] = self._buffers[place].copy_(tensor, non_blocking=pinned)
            except (RuntimeError, MemoryError) as error:
                raise OSError(f"no memory for a copy of it ({str(error).splitlines()[0][:200]})") from error
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        self.pending, self._written = save, self._pool.submit(save.write)

    def is_writing(self) -> bool:
        """Whether this rank's thread has more to do."""
        return self.pending is not None and not self._written.done()

    def finish(self) -> None:
        """Once all ranks have written, publish it, if one is pending. Raises SaveError, also for what else may have
        ended a thread."""
        def entries() -> dict[str, dict]:
            error = self._written.exception()
            if error is not None and not isinstance(error, OSError):
                raise OSError(f"its thread ended with {type(error).__name__}: {error}") from error
            return self._written.result()

        save, self.pending = self.pending, None
        if save is not None:
            save.publish(entries)


def _pieces(tensors: dict[str, Tensor], world: World) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What this rank writes of tensors, and what a file of rows says of it: its rows of sharded ones, unless another
    copy of them is the first; of others all, on rank 0."""
    held, firsts = {}, {}
    for name, tensor in tensors.items():
        first, end = distributed.local_rows(tensor)
        copy = [tensor.device_mesh.get_local_rank(dim) for dim, placement in enumerate(tensor.placements)
                if not placement.is_shard()] if hasattr(tensor, "placements") else [world.rank]
        if not any(copy) and (first < end or (row_count(tensor) == 0 and world.is_main)):
            held[name], firsts[name] = distributed.local(tensor.detach()), first
    return held, tensor_files.rows_metadata(firsts, tensors)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], bodies: Iterable[Tensor] | None = None) -> None:
    """A safetensors file outside any checkpoint, as Hugging Face's programs read it, whole and durable; bodies as for
    tensor_files.write. Raises SaveError, with nothing changed."""
    temporary = path.with_name(TEMPORARY + path.name)
    like = getattr(tensors, "like", tensors)
    needed = bytes_of(like) + MARGIN_BYTES
    try:
        _check_space(path.parent, needed)
        tensor_files.write(temporary, like, {"format": "pt"}, bodies or tensors.values())
        files.publish(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(f"{str(path)!r} was not written: {_reason(error, path.parent, needed)}") from error


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _reason(error: OSError, folder: Path, needed: int) -> str:
    """What went wrong, in one line."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error.strerror or error)
    try:
        free = f"{shutil.disk_usage(folder).free / 1e9:.3f} GB"
    except OSError:
        free = "an unknown amount"
    return f"disk full, {needed / 1e9:.3f} GB are needed and {free} is free"


def _to_json(value: dict) -> bytes:
    return json.dumps(_null_for_nan(value), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _null_for_nan(value: object) -> object:
    """JSON has no NaN and no infinity; a diverged loss must not stop a save."""
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint into place. An older one of the same step counts as .replaced until then."""
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        _discard(replaced)
        files.rename(final, replaced)
    files.rename(temporary, final)
    files.sync(final.parent)
    with suppress(OSError):  # the new one is in place and safe; newest() deletes what is left
        _discard(replaced)


def _discard(path: Path) -> None:
    """Delete a checkpoint if it exists. It loses its name first, so that half of one is never met."""
    if path.exists():
        temporary = path.with_name(f"{TEMPORARY}old-{path.name}")
        if temporary.exists():
            files.delete_folder(temporary)
        files.rename(path, temporary)
        files.delete_folder(temporary)


# ---- Choosing --------------------------------------------------------------------------------------------------------

def best_of(run_dir: Path) -> Path | None:
    """The checkpoint with the lowest validation loss among those saved at an evaluated step; of equals the newest."""
    losses = {path: loss for path in _candidates(Path(run_dir) / "checkpoints", replaced=False)
              if isinstance(loss := _recorded(path, "val_loss"), int | float) and math.isfinite(loss)}
    return min(losses, key=losses.get, default=None)


def newest_before(run_dir: Path, step: int) -> Path | None:
    """The newest valid checkpoint of fewer steps."""
    return next((path for path in _candidates(Path(run_dir) / "checkpoints", replaced=False)
                 if int(path.name.removeprefix("step_")) < step and problem(path) is None), None)


def _recorded(path: Path, name: str) -> object:
    """A value of a checkpoint's state, or None: newest() will say what cannot be read."""
    try:
        return json.loads((path / STATE).read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def _candidates(folder: Path, *, replaced: bool = True) -> list[Path]:
    """Folders named as checkpoints, newest first, with or without .replaced ones; other names are nobody's business."""
    if folder.is_symlink() and not folder.exists():  # a disk that is not mounted must not start the run anew
        raise CheckpointError(f"{str(folder)!r} is a link to {os.readlink(folder)!r}, which is not there; mount that "
                              "disk, or remove the link to start from step 0")
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match and path.is_dir() and (replaced or match[2] is None):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def problem(checkpoint: Path, world: World = World(), *, unread: Container[str] = ()) -> str | None:  # noqa: B008
    """What is wrong with a checkpoint, naming the file; None if everything is as its manifest says. The bytes of unread
    kinds of tensors are left unread, only their size is looked at. Of several ranks each reads its share of the files.
    """
    try:
        manifest = files.parse_json((checkpoint / MANIFEST).read_bytes())
        entries = {str(name): (entry["size"], entry["sha256"]) for name, entry in
                   sorted(manifest["files"].items(), key=lambda item: -item[1]["size"])}
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']!r}, expected {FORMAT}"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    if odd := [name for name in entries if not PLAIN_NAME.fullmatch(name)]:
        return f"{MANIFEST} names {odd[0]!r}, which is no file of a checkpoint"
    kinds = {name: match[1] for name in entries if (match := FILE_NAME.fullmatch(name))}
    if STATE not in entries or not {"model", "adapter_model"} & set(kinds.values()):
        return f"{MANIFEST} does not name {STATE} and a file of weights"
    bytes_of_rank = [0] * world.size
    for name, (size, sha256) in entries.items():  # the largest first
        rank = bytes_of_rank.index(min(bytes_of_rank))
        bytes_of_rank[rank] += size
        if rank != world.rank:
            continue
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} holds {found} bytes, its manifest says {size}"
            if kinds.get(name) not in unread and files.sha256(checkpoint / name) != sha256:
                return f"{name} does not have the sha256 of its manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest(run_dir: Path, note: Callable[[str], None], unread: Container[str] = ()) -> Path | None:
    """The newest valid checkpoint of a run that this process owns (holds the lock of); None if it has none. unread: as
    for problem.

    Damaged ones are renamed step_N.damaged, each with a note; leftovers of a crash are deleted.
    """
    folder = Path(run_dir) / "checkpoints"
    for leftover in folder.glob(TEMPORARY + "*"):
        files.delete_folder(leftover, ignore_errors=True)
    for checkpoint in _candidates(folder):
        wrong = problem(checkpoint, unread=unread)
        if wrong is None:
            return _settle_replaced(folder, checkpoint)
        number = 1
        while (damaged := checkpoint.with_suffix(f".damaged{number if number > 1 else ''}")).exists():
            number += 1
        files.rename(checkpoint, damaged)
        note(f"checkpoint {checkpoint.name} is damaged: {wrong}; renamed {damaged.name}")
    return None


def _settle_replaced(folder: Path, chosen: Path) -> Path:
    """End a replacement that a crash interrupted: `chosen` is valid, so other .replaced folders have no use."""
    for path in set(folder.glob("step_*.replaced")) - {chosen}:
        _discard(path)
    if chosen.suffix == ".replaced":
        files.rename(chosen, chosen.with_suffix(""))
        files.sync(folder)
    return chosen.with_suffix("")


def resolve(run: str | Path, note: Callable[[str], None], *, unread: Container[str] = ()) -> Path:
    """The checkpoint that RUN means: a run folder (its newest valid one) or one checkpoint. Verified; unread: but for
    these, WEIGHTS_ONLY for the moments, which are most of it.

    Changes nothing, since another process may be training there; damaged ones are passed over with a note. Raises
    CheckpointError.
    """
    path = Path(run)
    if not path.is_dir():
        raise CheckpointError(f"run {str(run)!r} does not exist; name a run folder or one checkpoint inside it")
    if is_checkpoint(path):
        if wrong := problem(path, unread=unread):
            raise CheckpointError(f"checkpoint {str(run)!r} is damaged: {wrong}; use another one, or the run folder "
                                  "for its newest valid one")
        return path
    candidates = _candidates(path / "checkpoints")
    for checkpoint in candidates:
        wrong = problem(checkpoint, unread=unread)
        if wrong is None:
            return checkpoint
        note(f"checkpoint {str(checkpoint)!r} is damaged: {wrong}; trying the one before it")
    if candidates:
        raise CheckpointError(f"run {str(run)!r} has no valid checkpoint: {len(candidates)} damaged; put a copy back "
                              "or train again")
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        raise CheckpointError(f"{str(run)!r} is a Hugging Face folder, not a run; convert it first: python convert.py "
                              f"from-hf {quote(str(run))} RUN")
    if not (path / "config.toml").exists():
        inside = sorted(folder.parent.name for folder in path.glob("*/config.toml"))[:3]
        raise CheckpointError(f"{str(run)!r} is not a run folder (it has no config.toml); name one"
                              + (f", such as {', '.join(str(path / name) for name in inside)}" if inside else ""))
    raise CheckpointError(f"run {str(run)!r} has no checkpoint; train it until its first save: python train.py "
                          f"{quote(str(path / 'config.toml'))} train.out_dir={quote(str(run))}")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant as one checkpoint, not as a run; it may be a link to one."""
    return path.is_dir() and (STEP_NAME.fullmatch(path.resolve().name) is not None or (path / MANIFEST).exists())


# ---- Loading ---------------------------------------------------------------------------------------------------------

def load_state(checkpoint: Path, name: str = "state") -> dict:
    """state.json of a checkpoint, or another of its JSON files. Raises CheckpointError."""
    path = Path(checkpoint) / f"{name}.json"
    try:
        state = files.parse_json(path.read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a table")
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; use another checkpoint") from None


def holds(checkpoint: Path, name: str) -> bool:
    """Whether a checkpoint has the tensors "model", "optimizer" (not what convert.py wrote) or others."""
    return bool(_files_of(Path(checkpoint), name))


def _files_of(folder: Path, name: str) -> list[Path]:
    """NAME.safetensors or, of a sharded run, its files of rows."""
    return [path for path in sorted(folder.glob(f"{name}*"))
            if (match := FILE_NAME.fullmatch(path.name)) and match[1] == name]


def open_tensors(checkpoint: Path, name: str) -> SavedTensors:
    """The tensors saved as "model", "optimizer" or another name, to be read when they are asked for. Raises
    CheckpointError."""
    try:
        if paths := _files_of(Path(checkpoint), name):
            return SavedTensors(paths)
        raise ValueError(f"{str(Path(checkpoint) / name)!r} cannot be read: there is no {name}.safetensors")
    except ValueError as error:
        raise CheckpointError(f"{error}; use another checkpoint") from None


def load_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """All that open_tensors gives; what lies in several files is put together in memory."""
    return dict(open_tensors(checkpoint, name))


def load_into(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a model's parameters and buffers as fill does. where: the source, for the message. A tied
    tensor goes by its first name. Raises CheckpointError."""
    first_names: dict[int, str] = {}
    for name, tensor in (state := model.state_dict(keep_vars=True)).items():
        first_names.setdefault(id(tensor), name)
    try:
        fill({name: state[name] for name in first_names.values()}, tensors)
    except ValueError as error:
        raise CheckpointError(f"{where} does not fit the model: {error}; use the [model] section it was trained "
                              "with") from None


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, of SavedTensors only the rows that this rank holds, converting dtype and device; strict about names
    and shapes. Raises one ValueError that names all that does not fit, before anything is changed."""
    if problems := misfits(shapes_of(targets), shapes_of(tensors)):
        raise ValueError(problems)
    for name, target in targets.items():
        first, end = distributed.local_rows(target)
        if isinstance(tensors, SavedTensors):
            rows = tensors.rows(name, first, end)
        else:
            rows = tensors[name][first:end] if target.dim() else tensors[name]
        distributed.local(target).copy_(rows)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Nothing is read for it."""
    return {name: list(tensor.shape) for name, tensor in getattr(tensors, "like", tensors).items()}


def misfits(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """What is wrong with the names and shapes of tensors, as text; empty if nothing is."""
    lists = {"missing": [name for name in expected if name not in found],
             "unknown": [name for name in found if name not in expected],
             "of another shape": [f"{name} {found[name]} for {shape}" for name, shape in expected.items()
                                  if name in found and found[name] != shape]}
    problems = [f"{what} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                for what, names in lists.items() if names]
    for prefix, source in (("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")):
        if any(name.startswith(prefix) for name in lists["unknown"]):
            problems.append(f"names begin with {prefix!r}, which {source} adds: save the model it wraps")
    return "; ".join(problems)
