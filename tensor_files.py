"""Tensors in safetensors files: written straight from memory, read by rows from one file or from several.

A file is the length of its header, the header as JSON (dtype, shape and place of each tensor), and raw bytes. Where
tensors are divided among files, the header's __metadata__ says which rows these are: {"rows": {name: [first, of how
many]}} as JSON text, and once more as torch.distributed.checkpoint's HuggingFaceStorageReader reads it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import files

DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def row_count(tensor: Tensor) -> int:
    """A number counts as one row."""
    return tensor.shape[0] if tensor.dim() else 1


def rows_metadata(firsts: dict[str, int], like: dict[str, Tensor]) -> dict[str, str]:
    """What a file says of rows that begin there, of tensors like these."""
    offsets = {name: {"saved_offsets": [first, *like[name].dim() * [0]][:like[name].dim()]}
               for name, first in firsts.items()}
    return {"rows": json.dumps({name: [first, row_count(like[name])] for name, first in firsts.items()}),
            "DCP_SHARDING_INFO": json.dumps(offsets)}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None,
          bodies: Iterable[Tensor] | None = None) -> None:
    """Write a file from the tensors' memory, each made contiguous when its turn comes: the library's writer would copy
    all of them first, which takes a third of a save's time. bodies: the values in turn, where those of tensors have
    none ("meta"). Not synced. Raises OSError."""
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    bodies = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in bodies or tensors.values())
    files.write(path, (part for parts in ([len(text).to_bytes(8, "little") + text], bodies) for part in parts))


class SavedTensors(Mapping[str, Tensor]):
    """Tensors by name as they lie in files, each in one or as rows in several. Only headers are read until a tensor, or
    rows of it, are asked for: on the CPU, and of a single file a view of its memory map, to be copied before the file
    can go.

    like: the tensors without values ("meta"). Raises ValueError, naming the file, for one that cannot be read, and
    unless each row is there, once.
    """

    def __init__(self, paths: list[Path]):
        self.like: dict[str, Tensor] = {}
        self._parts: dict[str, list[tuple]] = {}  # first row, row behind the last, path, what gives rows with [:]
        for path in paths:
            try:
                file = safe_open(path, "pt")
                places = json.loads((file.metadata() or {}).get("rows", "{}"))
                for name in file.keys():
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    here = shape[0] if shape else 1
                    first, count = places.get(name, (0, here))
                    like = torch.empty([count, *shape[1:]] if shape else [], dtype=DTYPES[part.get_dtype()],
                                       device="meta")
                    known = self.like.setdefault(name, like)
                    if (known.shape, known.dtype) != (like.shape, like.dtype):
                        raise ValueError(f"its {name} is {like.dtype} {list(like.shape)}, in another file "
                                         f"{known.dtype} {list(known.shape)}")
                    self._parts.setdefault(name, []).append((first, first + here, path, part))
            except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part[:2])
            end = 0
            for first, next_end, path, _ in [*parts, (row_count(self.like[name]), 0, parts[-1][2], None)]:
                if first != end:
                    raise ValueError(f"rows {min(first, end)} to {max(first, end)} of {name} are "
                                     f"{'there twice' if first < end else 'missing'} in {str(path)!r} and the files "
                                     "beside it")
                end = next_end

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows first to end (not with it) of a tensor; of a number, itself."""
        if not self.like[name].dim():
            return self._parts[name][0][3][...]
        found = [part[max(first, begin) - begin:min(end, stop) - begin] for begin, stop, _, part in self._parts[name]
                 if begin < end and first < stop]
        return found[0] if len(found) == 1 else torch.cat(found or [self._parts[name][0][3][:0]])

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, row_count(self.like[name]))

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.like[name], self._parts[name] = tensor.to("meta"), [(0, row_count(tensor), None, tensor)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
