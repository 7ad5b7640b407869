"""Token shards, checked against the sha256 of index.json: all at once, or in the background while a run goes on."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import files
from data.dataset import INDEX_FILE, Dataset, check_shard, files_of, load_index, shards_in
from data.shards import REDO, ShardError, read_header


def verify(data_dir: Path, note: Callable[[str], None]) -> list[str]:
    """One line for each thing wrong with a data folder: headers, counts, sha256 (without an index headers only)."""
    data_dir, problems = Path(data_dir), []
    try:
        index = load_index(data_dir)
    except ShardError as error:
        return [str(error)]
    shards = [{"file": path.name} for path in shards_in(data_dir, "*.bin")] if index is None else index["shards"]
    for shard in shards:
        try:
            if index is None:
                header = read_header(data_dir / shard["file"], foreign=True)
                kind = "" if header.bytes else " (no header: bare uint16 ids)"
                note(f"{shard['file']}: {header.tokens} tokens{kind}; no {INDEX_FILE}, so no sha256 to compare")
            else:
                check_shard(data_dir, index, shard)
                _check_sha256(data_dir, shard)
                note(f"{shard['file']}: {shard['tokens']} tokens, sha256 as recorded")
        except ShardError as error:
            problems.append(str(error))
    return problems if shards else [f"data folder {str(data_dir)!r} holds no shards (*.bin)"]


def _check_sha256(data_dir: Path, shard: dict, pause: Callable[[float], None] | None = None) -> None:
    for name, expected in files_of(shard).items():
        path = data_dir / name
        try:
            found = files.sha256(path, pause)
        except OSError as error:
            raise ShardError(f"shard {str(path)!r} cannot be read: {error.strerror}") from None
        if found != expected:
            raise ShardError(f"shard {str(path)!r} is damaged: its sha256 is {found[:16]}..., {INDEX_FILE} says "
                             f"{expected[:16]}...; {REDO}")


class BackgroundVerifier:
    """Checks the sha256 of every shard in a daemon thread while a run goes on; the loop polls .error.

    It rests twice as long as it works, so that a training step hardly notices. Foreign shards carry no sha256: nothing
    to do. `error` is set when a shard was not found as recorded.
    """

    def __init__(self, dataset: Dataset):
        self.error: ShardError | None = None
        self._thread = threading.Thread(target=self._run, args=(dataset,), name="shard-verifier", daemon=True)
        self._thread.start()

    def _run(self, dataset: Dataset) -> None:
        if sys.platform == "linux":  # there a thread has its own niceness; 19 is the lowest priority
            with suppress(OSError):  # a sandbox that forbids it: the rests must do
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            for shard in dataset.index["shards"]:
                if shard["sha256"] is not None:
                    _check_sha256(dataset.dir, shard, pause=lambda worked_s: time.sleep(2 * worked_s))
        except ShardError as error:
            self.error = error
