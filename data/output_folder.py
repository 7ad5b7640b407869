"""The folder that prepare.py fills: whose it is, what is done in it, and where to go on after a stop or a change.

.progress.json holds a point: how many units are done, a hash over what was in them, and the tokens in each open shard.
Points before it stay, up to POINTS of them: where the sources were changed meanwhile (a bad row was mended), the last
one whose hash is still right is where to go on.
"""

import itertools
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from shlex import quote

import files
from config import ConfigError, UserError
from data.chat import TEMPLATE_FILE
from data.dataset import files_of, load_index
from data.tokenizer import TOKENIZER_FILE
from data.write_shards import write_index

PROGRESS_FILE = ".progress.json"
LOCK_FILE = ".lock"
POINTS = 1000  # kept to go back to, at most


class Busy(UserError):
    """Another process is preparing the same folder."""


class OutputFolder:
    """The folder while it is being filled: locked, with .progress.json saying what is done: a point, as START, and
    points before it to go back to, which hold the number of finished shards. changed: names of sources that are not
    what they were.
    """

    START = {"units": 0, "digest": "", "invalid_utf8": 0, "bad_rows": 0, "separators": 0, "bad_rows_named": [],
             "splits": {}}

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.changed: list[str] = []
        self.progress = self.START | {"settings": settings, "tokenizer_sha256": None, "points": []}
        self._made = not path.exists()
        self._lock = ExitStack()

    def open(self) -> dict | None:
        """Make and lock the folder; the index if it is finished, else None. Raises UserError if it is not ours."""
        try:
            left = any((self.path / name).exists() for name in (PROGRESS_FILE, LOCK_FILE))
            if self.path.is_dir() and load_index(self.path) is not None and not left:
                return self._claim()  # finished: there is nothing to write, and it may be read-only
            try:
                files.make_folder(self.path)
            except FileExistsError:
                if not self.path.is_dir():
                    raise
            self._acquire_lock()
            return self._claim()
        except files.Locked:
            raise Busy(f"another process is preparing {str(self.path)!r}; wait for it, or name another folder (--out, "
                       "data.dir)") from None
        except OSError as error:
            raise UserError(f"output folder {str(self.path)!r} cannot be written: {error.strerror}; name another "
                            "(--out, data.dir)") from None

    def _acquire_lock(self) -> None:
        path, is_ours = self.path / LOCK_FILE, False
        while not is_ours:  # else whoever held it finished, and removed it between our open and our lock
            self._lock.close()
            lock = self._lock.enter_context(files.locked(path))
            with suppress(FileNotFoundError):
                is_ours = os.path.samestat(os.fstat(lock), os.stat(path))
        self._lock.callback(path.unlink, missing_ok=True)

    def _claim(self) -> dict | None:
        index = load_index(self.path)
        if index is not None:
            refuse_differences(self.path, index, self.settings, way_out=another_folder(self.path))
            if (self.path / PROGRESS_FILE).exists():  # killed right after index.json was written
                self._remove_all_but(index)
            return index
        names = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE, f".{PROGRESS_FILE}.tmp"}
        if PROGRESS_FILE in names:
            try:
                self.progress |= files.parse_json((self.path / PROGRESS_FILE).read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"output folder {str(self.path)!r}: {PROGRESS_FILE} is damaged; remove the folder and "
                                "start again") from None
            theirs, sources = self.progress["settings"], ("sources", "val_sources")
            pairs = [pair for key in sources for pair in itertools.zip_longest(theirs[key], self.settings[key])]
            if all(one and other and one["name"] == other["name"] for one, other in pairs):
                self.changed = [ours["name"] for one, ours in pairs if not same_sources([one], [ours])]
            ours = {key: value for key, value in self.settings.items() if not (self.changed and key in sources)}
            refuse_differences(self.path, self.progress, ours, way_out="it is not finished: give the command that began"
                               " it again, name another folder (--out, data.dir) or remove it")
            if not self.changed:
                self.progress["settings"] = self.settings  # what becomes of bad rows may be another choice now
        elif names:
            raise UserError(f"output folder {str(self.path)!r} is not empty, it holds "
                            f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}; name an empty or new "
                            "one (--out, data.dir); to train on these shards as they are: data.source=[]")
        return None

    @property
    def point(self) -> dict:
        """What is done."""
        return {key: self.progress[key] for key in self.START}

    def save(self, **changes) -> None:
        """Write .progress.json with changes."""
        self.progress |= changes
        files.write_whole(self.path / PROGRESS_FILE, json.dumps(self.progress))

    def save_point(self, point: dict) -> None:
        """Write .progress.json with what is done now, and keep what it said before."""
        points = self.progress["points"]
        if 0 < self.progress["units"] < point["units"]:
            splits = {split: state | {"shards": len(state["shards"])}
                      for split, state in self.progress["splits"].items()}
            points = [*points, self.point | {"splits": splits}]
        self.save(**point, points=points if len(points) < POINTS else points[1::2])

    def points(self) -> dict[int, dict]:
        """The points to go on from, by their units."""
        now = self.point
        before = [point | {"splits": {split: state | {"shards": now["splits"][split]["shards"][:state["shards"]]}
                                      for split, state in point["splits"].items()}}
                  for point in self.progress["points"]]
        return {point["units"]: point for point in (*before, now)}

    def go_back(self, point: dict, **changes) -> None:
        """Go on from a point, with the sources as they are now. What was made after it is written over, or removed in
        the end."""
        self.save(**point, **changes, settings=self.settings,
                  points=[earlier for earlier in self.progress["points"] if earlier["units"] < point["units"]])

    def finish(self, index: dict) -> None:
        """Write index.json; what was needed on the way goes."""
        write_index(self.path, index)
        self._remove_all_but(index)

    def discard(self) -> None:
        """Remove all that was written: a mistake of the user's leaves nothing behind."""
        self._remove_all_but({"shards": []}, TOKENIZER_FILE, "tokenizer_config.json", TEMPLATE_FILE)

    def _remove_all_but(self, index: dict, *others: str) -> None:
        """Remove what prepare() makes on its way but the shards of an index. Only for a folder with .progress.json."""
        keep = {name for shard in index["shards"] for name in files_of(shard)}
        for pattern in ("*.tmp", ".train_*.part", ".val_*.part", "train_*.bin", "val_*.bin", PROGRESS_FILE, *others):
            for path in self.path.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock, and of a folder made for nothing."""
        with suppress(OSError):
            self._lock.close()
        if self._made:
            with suppress(OSError):  # it is not empty
                self.path.rmdir()


def refuse_differences(folder: Path, made: dict, ours: dict, *, way_out: str) -> None:
    """Raise ConfigError listing how the settings that made a folder, of its index or its progress, differ from ours.
    Where there was no choice yet, what was done then counts; where no row was bad, what becomes of them does not."""
    theirs = {"bad_rows": "error", "parse_special": False} | made.get("settings", {})
    if not made.get("bad_rows"):
        theirs["bad_rows"] = ours.get("bad_rows")
    if "shards" in made:  # finished: check_content() says that its chats are of an earlier format
        theirs = {"chat_format": ours.get("chat_format")} | theirs
    if "kind" in theirs and not any(counts["truncated"] for counts in made.get("examples", {}).values()):
        theirs = {"too_long": "cut"} | theirs
    lines = [f"{key}: {json.dumps(theirs.get(key))} -> {json.dumps(ours[key])}" for key in ours
             if theirs.get(key) != ours[key]
             and not (key in ("sources", "val_sources") and same_sources(theirs.get(key, []), ours[key]))]
    if lines:
        raise ConfigError(f"data folder {str(folder)!r} was made with other settings ({'; '.join(lines)}); "
                          f"{way_out}")


def same_sources(theirs: list[dict], ours: list[dict]) -> bool:
    """Whether sources are the same as far as both know: of older folders their content is not known."""
    return len(theirs) == len(ours) and all(one.items() <= other.items() or other.items() <= one.items()
                                            for one, other in zip(theirs, ours, strict=True))


def another_folder(folder: Path) -> str:
    """The ways out for a finished folder."""
    return ("name another folder (--out, data.dir) or remove this one; to train on it as it is: data.source=[] "
            f"data.dir={quote(str(folder))}")
