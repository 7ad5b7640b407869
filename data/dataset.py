"""A data folder: its index, or what stands for one, and its splits.

index.json names the shards with split, token count and sha256. Folders without one are read too: *train*.bin and
*val*.bin of llm.c and modded-nanogpt, and nanoGPT's train.bin and val.bin. The files themselves are shards.py's.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import files
from data.shards import REDO, TRACKS, ShardError, ShardHeader, TokenStream, read_header, track_path

INDEX_FILE = "index.json"
INDEX_FORMAT = 1
SPLITS = ("train", "val")
SAMPLE_BYTES = 64 << 10  # hashed at both ends of a foreign shard, which carries no sha256


@dataclass(frozen=True)
class Dataset:
    """A data folder whose headers were checked. A foreign one (no index.json) knows no vocabulary: None."""

    dir: Path
    index: dict
    headers: tuple[ShardHeader, ...]  # of the shards in the index, in their order
    vocab_size: int | None = None

    @functools.cached_property
    def hash(self) -> str:
        """sha256 hex over the index as canonical JSON; with the shards' sha256 inside it stands for the data."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def raw_files(self) -> list[str]:
        """Files without a header, which were taken for bare uint16 ids; for a note to the user."""
        return [shard["file"] for shard in self.index["shards"] if shard.get("raw")]


def open_dataset(data_dir: Path) -> Dataset:
    """The data folder, with every header read and compared with the index. Raises ShardError."""
    data_dir, index = Path(data_dir), load_index(data_dir)
    if index is None:
        return _foreign_dataset(data_dir)
    headers = tuple(check_shard(data_dir, index, shard) for shard in index["shards"])
    return Dataset(data_dir, index, headers, vocab_size=index["vocab_size"])


def load_index(data_dir: Path) -> dict | None:
    """The index of a data folder, its shape checked; None if the folder has none. Raises ShardError."""
    path = Path(data_dir) / INDEX_FILE
    try:
        index = files.parse_json(path.read_text(encoding="utf-8"))
        problem = _index_problem(index)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardError(f"index {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        problem = f"is not valid JSON ({error})"
    if problem:
        raise ShardError(f"index {str(path)!r} {problem}; prepare the data again")
    return index


def _index_problem(index: object) -> str | None:
    if not isinstance(index, dict):
        return f"has format {type(index).__name__!r}, expected {INDEX_FORMAT}"
    row, settings = index.get("row_tokens"), index.get("settings", {})
    for key, is_good, expected in (
            ("format", index.get("format") == INDEX_FORMAT, INDEX_FORMAT),
            ("dtype", index.get("dtype") in ("uint16", "uint32"), "uint16 or uint32"),
            ("vocab_size", type(index.get("vocab_size")) is int and index["vocab_size"] > 0, "a whole number"),
            ("eot", type(index.get("eot", "missing")) in (int, type(None)), "an id or null"),
            ("row_tokens", row is None or (type(row) is int and row > 1), "a whole number above 1"),
            ("settings", isinstance(settings, dict), "a table"),
            ("row_tokens", isinstance(settings, dict) and settings.get("max_seq_len") in (
                None, row - 1 if type(row) is int else -1), "settings.max_seq_len + 1"),
            ("shards", isinstance(index.get("shards"), list), "a list")):
        if not is_good:
            return f"has {key} {index.get(key)!r}, expected {expected}"
    kinds = {"file": str, "split": str, "tokens": int, "sha256": str}
    for number, shard in enumerate(index["shards"]):
        if not isinstance(shard, dict) or any(type(shard.get(key)) is not kind for key, kind in kinds.items()):
            return f"describes shard {number} without {', '.join(kinds)}"
        if any(type(shard.get(f"{track}_sha256", "")) is not str for track in TRACKS) or shard["tokens"] % (row or 1):
            return f"describes shard {number} with a sha256 that is none, or with tokens that are no whole rows"
        if shard["split"] not in SPLITS or Path(shard["file"]).name != shard["file"] or not shard["file"].isprintable():
            return f"names shard {shard['file']!r} of split {shard['split']!r}, expected a file here and train or val"
    return None


def check_shard(data_dir: Path, index: dict, shard: dict) -> ShardHeader:
    """The header of a shard of the index. Raises ShardError if it does not say what the index says."""
    header = read_header(data_dir / shard["file"])
    if (header.dtype.name, header.tokens) != (index["dtype"], shard["tokens"]):
        raise ShardError(f"shard {str(header.path)!r} holds {header.tokens} tokens of {header.dtype.name} but "
                         f"{INDEX_FILE} says {shard['tokens']} of {index['dtype']}; {REDO}")
    for track in TRACKS:
        path = track_path(header.path, track)
        size = path.stat().st_size if path.exists() else None
        if (size is not None) != (f"{track}_sha256" in shard) or size not in (None, header.tokens):
            found = ("is missing" if size is None else f"is not in {INDEX_FILE}" if f"{track}_sha256" not in shard else
                     f"holds {size} bytes but its shard {header.tokens} tokens")
            raise ShardError(f"{str(path)!r} {found}; {REDO}")
    return header


def _foreign_dataset(data_dir: Path) -> Dataset:
    """A folder of llm.c, modded-nanogpt or nanoGPT shards, with an index made for it."""
    shards, headers, dtypes = [], [], {}
    for split in SPLITS:
        for path in shards_in(data_dir, f"*{split}*.bin"):
            if all(name in path.name for name in SPLITS):
                raise ShardError(f"shard {str(path)!r} has both train and val in its name; rename it")
            header = read_header(path, foreign=True)
            headers.append(header)
            dtypes[header.dtype.name] = path.name
            with open(path, "rb") as file:  # data sets of equal sizes are told apart without reading them
                digest = hashlib.sha256(file.read(SAMPLE_BYTES))
                file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
            shards.append({"file": path.name, "split": split, "tokens": header.tokens, "sha256": None,
                           "sample_sha256": digest.hexdigest()} | ({} if header.bytes else {"raw": True}))
    if not shards:
        found = f"holds neither {INDEX_FILE} nor *train*.bin and *val*.bin" if data_dir.exists() else "does not exist"
        raise ShardError(f"data folder {str(data_dir)!r} {found}; make it with python -m data.prepare SOURCE "
                         f"--out {quote(str(data_dir))}")
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
        raise ShardError(f"data folder {str(data_dir)!r} mixes shards of {found}; keep one kind")
    return Dataset(data_dir, {"format": INDEX_FORMAT, "dtype": next(iter(dtypes)), "shards": shards}, tuple(headers))


def shards_in(data_dir: Path, pattern: str) -> list[Path]:
    """The files of that name, sorted, without tracks."""
    return sorted(path for path in data_dir.glob(pattern) if path.suffixes[-2:-1] not in ([f".{t}"] for t in TRACKS))


def open_split(dataset: Dataset, split: str) -> TokenStream:
    """The stream of split "train" or "val". Raises ShardError if the data folder has no shard of it."""
    headers = [header for header, shard in zip(dataset.headers, dataset.index["shards"], strict=True)
               if shard["split"] == split]
    if not headers:
        way_out = f"add one named *{split}*.bin" if dataset.vocab_size is None else "prepare the data again"
        if split == "val":
            way_out += " with --val-fraction or --val" if dataset.vocab_size is not None else ""
            way_out += "; train.py goes without by data.val_fraction=0, eval.py scores a text by --data FILE"
        raise ShardError(f"data folder {str(dataset.dir)!r} has no {split} shard; {way_out}")
    return TokenStream(headers, f"{split} split of {str(dataset.dir)!r}", dataset.index.get("row_tokens"))


def files_of(shard: dict) -> dict[str, str | None]:
    """The files of a shard of the index, itself first, with their sha256."""
    return {shard["file"]: shard["sha256"]} | {track_path(shard["file"], track).name: shard[f"{track}_sha256"]
                                               for track in TRACKS if f"{track}_sha256" in shard}
