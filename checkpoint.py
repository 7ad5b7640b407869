"""Checkpoints: the only file that knows their layout. Save, choose the newest valid one, load, verify, lock a run.

    RUN/checkpoints/step_00001000/   model.safetensors  optimizer.safetensors  state.json  manifest.json

Of a run with adapters (lora.py) it holds adapter_model.safetensors and adapter_config.json instead of the model; what
they adapt is kept once, in RUN/base/model.safetensors, and state.json has its sha256.

A checkpoint is written to a temporary folder, every file and the folder are synced, then it is renamed; it counts only
if every file has the size and sha256 that manifest.json records, because no tensor format notices a flipped bit. So a
crash, a power cut or a full disk leaves the checkpoints before it as they were. There is no pickle: loading never
executes code. What the tensors mean is the business of model.py, optim.py and train.py.

Every change to the disk goes through the functions of the section "The disk": tests crash at each of them.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import MachineError, UserError
from finetune import lora

FORMAT = 1
STATE, MANIFEST, OPTIMIZER = "state.json", "manifest.json", "optimizer.safetensors"
MODEL, ADAPTER, ADAPTER_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
STEP_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
TEMPORARY = ".tmp-"  # prefix of folders that are being written or deleted
DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
MARGIN_BYTES = 1 << 20  # free space asked for beyond the tensors: headers, JSON, folder blocks


class CheckpointError(UserError):
    """No checkpoint where one is needed, a damaged one, or one that does not fit the model."""


class SaveError(MachineError):
    """A checkpoint could not be written; the ones before it are untouched."""


# ----------------------------------------------------------------------------------------------------------------------
# The disk

def _make_folder(path: Path) -> None:
    path.mkdir(parents=True)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file in safetensors' format: length of the header, JSON header, raw bytes. Written straight from the tensors'
    memory, one after the other; the library's writer would copy all of them first (a third of a save's time)."""
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(path, "wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            _write_all(file, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_all(file: io.RawIOBase, data: bytes | np.ndarray) -> None:
    rest = memoryview(data).cast("B")
    while rest:  # one write() takes 2 GB at most, and a nearly full disk less
        rest = rest[file.write(rest):]


def sync(path: Path) -> None:
    """fsync a file, or a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _rename(path: Path, new_path: Path) -> None:
    os.rename(path, new_path)


def _delete_folder(path: Path, ignore_errors: bool = False) -> None:
    shutil.rmtree(path, ignore_errors=ignore_errors)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Saving

def save(run_dir: Path, step: int, *, model: dict[str, Tensor], optimizer: dict[str, Tensor] | None, state: dict,
         keep: int, adapter_config: dict | None = None) -> Path:
    """Write RUN/checkpoints/step_<step>, then delete all but the newest `keep` and the one with the best val_loss.

    model, optimizer: tensors by name on any device, optimizer None = weights alone; state: JSON values, "val_loss" in
    it may be None; adapter_config: model holds adapters only, to RUN/base. Raises SaveError, with nothing changed, if
    the disk fails or is too full.
    """
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step_{step:08d}"
    temporary = folder / (TEMPORARY + final.name)
    tensors = {MODEL if adapter_config is None else ADAPTER: model}
    if optimizer is not None:
        tensors = {OPTIMIZER: optimizer} | tensors  # the larger first: it is hashed while the other is written
    texts = {STATE: {"step": step, **state}} | ({} if adapter_config is None else {ADAPTER_CONFIG: adapter_config})
    needed = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values()) + MARGIN_BYTES
    try:
        _make_checkpoints_folder(folder)
        _check_space(folder, needed)
        if temporary.exists():
            _delete_folder(temporary)
        _write_checkpoint(temporary, tensors, texts)
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        _delete_folder(temporary, ignore_errors=True)
        raise SaveError(f"checkpoint of step {step} was not saved to {str(folder)!r}: "
                        f"{_reason(error, folder, needed)}; older checkpoints are untouched") from error
    _delete_old(folder, keep, final)
    return final


def save_base(run_dir: Path, tensors: dict[str, Tensor]) -> str:
    """Write RUN/base/model.safetensors, what adapters are added to, whole and durably; its sha256. Raises SaveError."""
    folder = Path(run_dir) / "base"
    temporary = folder / (TEMPORARY + MODEL)
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + MARGIN_BYTES
    try:
        if not folder.is_dir():
            _make_folder(folder)
            sync(folder.parent)
        _check_space(folder, needed)
        _write_tensors(temporary, tensors)
        sync(temporary)
        _rename(temporary, folder / MODEL)
        sync(folder)
        return _hash(folder / MODEL)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(f"the base of the adapters was not saved to {str(folder)!r}: "
                        f"{_reason(error, folder, needed)}") from error
def write_tensor_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file outside any checkpoint, as Hugging Face's programs read it, synced. Tensors may be views: each
    is made contiguous when its turn comes. Raises OSError."""
    _write_tensors(path, tensors, {"format": "pt"})
    sync(path)


def _make_checkpoints_folder(folder: Path) -> None:
    if not folder.is_dir():
        if not folder.parent.is_dir():
            _make_folder(folder.parent)
        _make_folder(folder)
        sync(folder.parent)
        sync(folder.parent.parent)


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _reason(error: Exception, folder: Path, needed: int) -> str:
    """What went wrong, in one line. safetensors passes the system's error on as text only."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if not full:
        return str(getattr(error, "strerror", None) or error)
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
    _make_folder(folder)
    hashes: dict[str, Future] = {}
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint-hash") as pool:
        for name, part in tensors.items():
            _write_tensors(folder / name, part)
            hashes[name] = pool.submit(_hash, folder / name)
        for name, text in texts.items():
            _write_bytes(folder / name, _to_json(_null_for_nan(text)))
            hashes[name] = pool.submit(_hash, folder / name)
        for name in hashes:
            sync(folder / name)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": future.result()}
             for name, future in hashes.items()}
    _write_bytes(folder / MANIFEST, _to_json({"format": FORMAT, "files": files}))
    sync(folder / MANIFEST)
    sync(folder)


def _to_json(value: dict) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


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
        _rename(final, replaced)
    _rename(temporary, final)
    sync(final.parent)
    with suppress(OSError):  # the new one is in place and safe; newest() deletes what is left
        _discard(replaced)


def _delete_old(folder: Path, keep: int, just_saved: Path) -> None:
    best = best_of(folder.parent)
    for path in _unreplaced(folder)[keep:]:
        if path not in (best, just_saved):
            with suppress(OSError):  # one that cannot be deleted costs space, not safety; the next save tries again
                _discard(path)


def best_of(run_dir: Path) -> Path | None:
    """The checkpoint with the lowest validation loss among those saved at an evaluated step; of equals the newest."""
    checkpoints = _unreplaced(Path(run_dir) / "checkpoints")
    losses = {path: loss for path in checkpoints if (loss := _val_loss(path)) is not None}
    return min(losses, key=losses.get, default=None)


def _unreplaced(folder: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    return [path for path in _candidates(folder) if not path.name.endswith(".replaced")]


def _val_loss(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / STATE).read_bytes())["val_loss"]
    except (OSError, ValueError, KeyError, TypeError):  # unreadable: newest() will say so
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None


def _discard(path: Path) -> None:
    """Delete a checkpoint if it exists. It loses its name first, so that half of one is never met."""
    if path.exists():
        temporary = path.with_name(f"{TEMPORARY}old-{path.name}")
        if temporary.exists():
            _delete_folder(temporary)
        _rename(path, temporary)
        _delete_folder(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# Choosing

def _candidates(folder: Path) -> list[Path]:
    """Folders named as checkpoints, newest first; other names are nobody's business."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir():
                found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if everything is as its manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        known = manifest["format"] == FORMAT
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    if not known:
        return f"{MANIFEST} has format {manifest['format']!r}, expected {FORMAT}"
    missing = [name for name in (ADAPTER_CONFIG if ADAPTER in files else MODEL, STATE) if name not in files]
    if missing:
        return f"{MANIFEST} does not name {missing[0]}"
    for name, (size, sha256) in files.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} holds {found} bytes, its manifest says {size}"
            if _hash(checkpoint / name) != sha256:
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
        _delete_folder(leftover, ignore_errors=True)
    for checkpoint in _candidates(folder):
        problem = _problem(checkpoint)
        if problem is None:
            return _settle_replaced(folder, checkpoint)
        damaged = _set_aside(checkpoint)
        note(f"checkpoint {checkpoint.name} is damaged: {problem}; renamed {damaged.name}")
    return None


def _settle_replaced(folder: Path, chosen: Path) -> Path:
    """End a replacement that a crash interrupted: `chosen` is valid, so other .replaced folders have no use."""
    for path in folder.glob("step_*.replaced"):
        if path != chosen:
            _discard(path)
    if chosen.suffix == ".replaced":
        _rename(chosen, chosen.with_suffix(""))
        sync(folder)
    return chosen.with_suffix("")


def _set_aside(checkpoint: Path) -> Path:
    """Rename step_N to step_N.damaged, or .damaged2 and so on if that name is taken."""
    number = 1
    while (path := checkpoint.with_suffix(f".damaged{number if number > 1 else ''}")).exists():
        number += 1
    _rename(checkpoint, path)
    return path


def resolve(run: str | Path, note: Callable[[str], None]) -> Path:
    """The checkpoint that RUN means: a run folder (its newest valid one) or one checkpoint. Verified.

    Changes nothing, since another process may be training there; damaged ones are passed over with a note. Raises
    CheckpointError.
    """
    path = Path(run)
    if not path.is_dir():
        raise CheckpointError(f"run {str(run)!r} does not exist; name a run folder or one checkpoint inside it")
    if STEP_NAME.fullmatch(path.resolve().name) or (path / MANIFEST).exists():
        problem = _problem(path)
        if problem:
            raise CheckpointError(f"checkpoint {str(run)!r} is damaged: {problem}; use another one, or the run folder "
                                  "for its newest valid one")
        return path
    candidates = _candidates(path / "checkpoints")
    for checkpoint in candidates:
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint
        note(f"checkpoint {str(checkpoint)!r} is damaged: {problem}; trying the one before it")
    if candidates:
        raise CheckpointError(f"run {str(run)!r} has no valid checkpoint: {len(candidates)} damaged; put a copy back "
                              "or train again")
    if (path / "config.json").exists():
        raise CheckpointError(f"{str(run)!r} is a Hugging Face folder, not a run; convert it first: python convert.py "
                              f"from-hf {run} RUN")
    if not (path / "config.toml").exists():
        inside = sorted(folder.parent.name for folder in path.glob("*/config.toml"))[:3]
        raise CheckpointError(f"{str(run)!r} is not a run folder (it has no config.toml); name one"
                              + (f", such as {', '.join(str(path / name) for name in inside)}" if inside else ""))
    raise CheckpointError(f"run {str(run)!r} has no checkpoint; train it until its first save "
                          f"(python train.py train.out_dir={run})")


def run_dir_of(checkpoint: Path) -> Path:
    """RUN of RUN/checkpoints/step_N."""
    return Path(checkpoint).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------------------------
# Loading

def load_state(checkpoint: Path) -> dict:
    """state.json of a checkpoint. Raises CheckpointError."""
    path = Path(checkpoint) / STATE
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; use another checkpoint") from None


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a run can go on from it; convert.py writes weights alone."""
    return (Path(checkpoint) / OPTIMIZER).exists()


def load_tensors(checkpoint: Path, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of "model" (with adapters merged in, in float32) or "optimizer". Raises CheckpointError.

    On the CPU they may be views of the file's memory map: copy them (load_into does) before the file can go.
    """
    if name == "model" and is_adapter(checkpoint):
        return _merged(Path(checkpoint), device)
    return _load_file(Path(checkpoint) / f"{name}.safetensors", device)


def is_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint holds adapters to RUN/base rather than a model."""
    return (Path(checkpoint) / ADAPTER).exists()


def load_adapter(checkpoint: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The adapters alone, by peft's names. Raises CheckpointError."""
    return _load_file(Path(checkpoint) / ADAPTER, device)


def load_base(checkpoint: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """What the adapters of a checkpoint are added to. Raises CheckpointError if it is not the one they were trained on.
    """
    path = run_dir_of(checkpoint) / "base" / MODEL
    try:
        found = _hash(path)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r}, which the adapters in {str(checkpoint)!r} belong to, cannot be read: "
                              f"{error.strerror}; copy the run folder as a whole") from None
    if found != load_state(checkpoint).get("base_sha256"):
        raise CheckpointError(f"{str(path)!r} is not what the adapters in {str(checkpoint)!r} were trained on (sha256 "
                              f"{found[:16]}...); put the run's own base back")
    return _load_file(path, device)


def _merged(checkpoint: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        config = json.loads((checkpoint / ADAPTER_CONFIG).read_bytes())
        return lora.merge(load_base(checkpoint, device), load_adapter(checkpoint, device), config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"adapters in {str(checkpoint)!r} do not fit their base: {error}; use another checkpoint"
                              ) from None


def _load_file(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; use another checkpoint") from None


def load_into(model: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a model's parameters and buffers, converting dtype and device; strict about names and shapes.

    where: the source, for the message. A tied tensor goes by its first name. Raises one CheckpointError that names all
    that does not fit, before anything is changed.
    """
    targets: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            targets[name] = tensor
            seen.add(id(tensor))
    problems = _misfits(targets, tensors)
    if problems:
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(problems)}; use the [model] section it was "
                              "trained with")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _misfits(targets: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    missing = [name for name in targets if name not in tensors]
    extra = [name for name in tensors if name not in targets]
    shapes = [f"{name} {list(tensors[name].shape)} for {list(target.shape)}" for name, target in targets.items()
              if name in tensors and tensors[name].shape != target.shape]
    problems = [f"{what} {_first(names)}" for what, names in
                (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if names]
    for prefix, source in (("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")):
        if any(name.startswith(prefix) for name in extra):
            problems.append(f"names begin with {prefix!r}, which {source} adds: save the model it wraps")
    return problems


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ----------------------------------------------------------------------------------------------------------------------
# One run per folder

class RunLock:
    """Holds RUN/.lock while a run writes to its folder, so that a second run there is refused.

    The lock is flock's: the system drops it when the process ends, however it ends. Raises CheckpointError if another
    process holds it or the folder cannot be written.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = Path(run_dir)

    def __enter__(self) -> "RunLock":
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"run folder {str(self.run_dir)!r} cannot be written: {error.strerror}; choose "
                                  "another train.out_dir") from None
        try:
            self._lock()
        except BaseException:
            os.close(self._descriptor)
            raise
        with suppress(OSError):  # a full disk: who holds the lock is only a hint for the next one
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 200).decode(errors="replace") or "another process"
            raise CheckpointError(f"run folder {str(self.run_dir)!r} is in use by {holder}; stop that run or choose "
                                  "another train.out_dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            warnings.warn(f"the file system of {str(self.run_dir)!r} has no locks ({error.strerror}): make sure that "
                          "no second run writes there", stacklevel=2)

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)
