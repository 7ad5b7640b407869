"""Checkpoints: the only file that knows their layout. Save, choose the newest valid one, load, verify.

    RUN/checkpoints/step_00001000/   model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written to a temporary folder, every file and the folder are synced, then it is renamed; it counts only
if every file has the size and sha256 that manifest.json records, because no tensor format notices a flipped bit. So a
crash, a power cut or a full disk leaves the checkpoints before it as they were. There is no pickle: loading never
executes code. What the files mean is the business of those who save them (train.py, finetune/lora.py, convert.py).
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import distributed
import files
from config import MachineError, UserError

FORMAT = 1
STATE, MANIFEST, OPTIMIZER = "state.json", "manifest.json", "optimizer.safetensors"
STEP_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)+", re.ASCII)  # in the folder itself, whatever a manifest says
TEMPORARY = ".tmp-"  # prefix of folders that are being written or deleted
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
MARGIN_BYTES = 1 << 20  # free space asked for beyond the tensors: headers, JSON, folder blocks


class CheckpointError(UserError):
    """No checkpoint where one is needed, a damaged one, or one that does not fit the model."""


class SaveError(MachineError):
    """A checkpoint could not be written; the ones before it are untouched."""


# ---- Saving ----------------------------------------------------------------------------------------------------------

def save(run_dir: Path, step: int, *, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int,
         texts: dict[str, dict] | None = None) -> Path:
    """Write RUN/checkpoints/step_<step>, then delete all others but the newest `keep` and the one with the best
    val_loss. One saved while steps were skipped counts for none of them: its weights may be what makes them fail.

    tensors: {"model": {name: tensor}, "optimizer": ...}, on any device, become NAME.safetensors, the largest first;
    state and texts ({"adapter_config": ...}) hold JSON values and become NAME.json; state's "val_loss" may be None.
    Raises SaveError, with nothing changed, if the disk fails or is too full.
    """
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step_{step:08d}"
    temporary = folder / (TEMPORARY + final.name)
    by_size = sorted(tensors.items(), key=lambda item: _bytes_of(item[1]), reverse=True)
    needed = sum(_bytes_of(part) for part in tensors.values()) + MARGIN_BYTES
    try:
        if not folder.is_dir():
            if not folder.parent.is_dir():
                files.make_folder(folder.parent)
            files.make_folder(folder)
            files.sync(folder.parent)
            files.sync(folder.parent.parent)
        _check_space(folder, needed)
        if temporary.exists():
            files.delete_folder(temporary)
        _write_checkpoint(temporary, {f"{name}.safetensors": part for name, part in by_size},
                          {STATE: {"step": step, **state}} | {f"{name}.json": t for name, t in (texts or {}).items()})
        _publish(temporary, final)
    except OSError as error:
        files.delete_folder(temporary, ignore_errors=True)
        raise SaveError(f"checkpoint of step {step} was not saved to {str(folder)!r}: "
                        f"{_reason(error, folder, needed)}; older checkpoints are untouched") from error
    saved = _candidates(folder, replaced=False)
    good = [path for path in saved if not _recorded(path, "skips_in_a_row")]
    for path in set(saved) - {final, best_of(run_dir), *good[:keep]}:
        with suppress(OSError):  # one that cannot be deleted costs space, not safety; the next save tries again
            _discard(path)
    return final


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file in safetensors' format (length of the header, JSON header, raw bytes), written straight from the tensors'
    memory, each made contiguous when its turn comes: the library's writer would copy all of them first, which takes a
    third of a save's time. Not synced. Raises OSError."""
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    bodies = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in tensors.values())
    files.write(path, (part for parts in ([len(text).to_bytes(8, "little") + text], bodies) for part in parts))


def write_tensor_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file outside any checkpoint, as Hugging Face's programs read it, whole and durable. Raises
    SaveError, with nothing changed."""
    temporary = path.with_name(TEMPORARY + path.name)
    needed = _bytes_of(tensors) + MARGIN_BYTES
    try:
        _check_space(path.parent, needed)
        _write_tensors(temporary, tensors, {"format": "pt"})
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


def _write_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, dict]) -> None:
    """Write and sync every file of a checkpoint and the folder itself.

    Each file is hashed by a thread while the next is written and synced (hashlib lets go of the GIL); the larger file
    comes first, so that its hashing hides behind the rest.
    """
    files.make_folder(folder)
    hashes: dict[str, Future] = {}
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint-hash") as pool:
        for name, part in tensors.items():
            _write_tensors(folder / name, part)
            hashes[name] = pool.submit(files.sha256, folder / name)
        for name, text in texts.items():
            files.write(folder / name, [_to_json(text)])
            hashes[name] = pool.submit(files.sha256, folder / name)
        for name in hashes:
            files.sync(folder / name)
    manifest = {name: {"size": (folder / name).stat().st_size, "sha256": future.result()}
                for name, future in hashes.items()}
    files.write(folder / MANIFEST, [_to_json({"format": FORMAT, "files": manifest})])
    files.sync(folder / MANIFEST)
    files.sync(folder)


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
                 if int(path.name.removeprefix("step_")) < step and _problem(path) is None), None)


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


def _problem(checkpoint: Path, unread: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if everything is as its manifest says. The bytes of
    unread files are left unread, only their size is looked at."""
    try:
        manifest = files.parse_json((checkpoint / MANIFEST).read_bytes())
        entries = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']!r}, expected {FORMAT}"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    if odd := [name for name in entries if not FILE_NAME.fullmatch(name)]:
        return f"{MANIFEST} names {odd[0]!r}, which is no file of a checkpoint"
    if STATE not in entries or not any(name.endswith("model.safetensors") for name in entries):
        return f"{MANIFEST} does not name {STATE} and a file of weights"
    for name, (size, sha256) in entries.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} holds {found} bytes, its manifest says {size}"
            if name not in unread and files.sha256(checkpoint / name) != sha256:
                return f"{name} does not have the sha256 of its manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest(run_dir: Path, note: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint of a run that this process owns (holds the lock of); None if it has none.

    Damaged ones are renamed step_N.damaged, each with a note; leftovers of a crash are deleted.
    """
    folder = Path(run_dir) / "checkpoints"
    for leftover in folder.glob(TEMPORARY + "*"):
        files.delete_folder(leftover, ignore_errors=True)
    for checkpoint in _candidates(folder):
        problem = _problem(checkpoint)
        if problem is None:
            return _settle_replaced(folder, checkpoint)
        number = 1
        while (damaged := checkpoint.with_suffix(f".damaged{number if number > 1 else ''}")).exists():
            number += 1
        files.rename(checkpoint, damaged)
        note(f"checkpoint {checkpoint.name} is damaged: {problem}; renamed {damaged.name}")
    return None


def _settle_replaced(folder: Path, chosen: Path) -> Path:
    """End a replacement that a crash interrupted: `chosen` is valid, so other .replaced folders have no use."""
    for path in set(folder.glob("step_*.replaced")) - {chosen}:
        _discard(path)
    if chosen.suffix == ".replaced":
        files.rename(chosen, chosen.with_suffix(""))
        files.sync(folder)
    return chosen.with_suffix("")


def resolve(run: str | Path, note: Callable[[str], None], *, weights_only: bool = False) -> Path:
    """The checkpoint that RUN means: a run folder (its newest valid one) or one checkpoint. Verified; weights_only: but
    for the optimizer's moments, which are most of it and will not be read.

    Changes nothing, since another process may be training there; damaged ones are passed over with a note. Raises
    CheckpointError.
    """
    path, unread = Path(run), (OPTIMIZER,) if weights_only else ()
    if not path.is_dir():
        raise CheckpointError(f"run {str(run)!r} does not exist; name a run folder or one checkpoint inside it")
    if is_checkpoint(path):
        problem = _problem(path, unread)
        if problem:
            raise CheckpointError(f"checkpoint {str(run)!r} is damaged: {problem}; use another one, or the run folder "
                                  "for its newest valid one")
        return path
    candidates = _candidates(path / "checkpoints")
    for checkpoint in candidates:
        problem = _problem(checkpoint, unread)
        if problem is None:
            return checkpoint
        note(f"checkpoint {str(checkpoint)!r} is damaged: {problem}; trying the one before it")
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
    return (Path(checkpoint) / f"{name}.safetensors").exists()


def load_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors saved as "model", "optimizer" or another name, on the CPU; they may be views of the file's memory
    map: copy them (load_into does) before the file can go. Raises CheckpointError."""
    path = Path(checkpoint) / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; use another checkpoint") from None


def load_into(model: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a model's parameters and buffers, converting dtype and device; strict about names and shapes.

    where: the source, for the message. A tied tensor goes by its first name. Raises one CheckpointError that names all
    that does not fit, before anything is changed.
    """
    first_names: dict[int, str] = {}
    for name, tensor in (state := model.state_dict(keep_vars=True)).items():
        first_names.setdefault(id(tensor), name)
    targets = {name: state[name] for name in first_names.values()}
    problems = misfits(*({name: list(tensor.shape) for name, tensor in part.items()} for part in (targets, tensors)))
    if problems:
        raise CheckpointError(f"{where} does not fit the model: {problems}; use the [model] section it was trained "
                              "with")
    for name, target in targets.items():
        distributed.fill(target, tensors[name])


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
