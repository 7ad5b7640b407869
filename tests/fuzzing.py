"""Damaged and hostile inputs: how properties are run in two tiers, what hypothesis makes of a good file, and what
counts as an answer. Used by tests/test_faults_*.py; docs/RELIABILITY.md has what they found."""

import atexit
import contextlib
import copy
import functools
import inspect
import json
import math
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from config import MachineError, UserError

pytest.importorskip("hypothesis", reason="hypothesis is not installed: damaged and hostile inputs stay unchecked")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SLOWER = 8  # times as many cases in the slow tier
LIMIT_BYTES = 2 << 30  # of address space beyond what the process has: a header that claims 10^12 items fails


def fuzz(cases: int, **strategies) -> Callable:
    """Makes a property two tests: so many cases, the same each time, and (marked slow) SLOWER times as many new ones.
    The property's other parameters are fixtures."""
    def make(check: Callable) -> Callable:
        def tier(count: int, *, is_fast: bool) -> Callable:
            return settings(max_examples=count, deadline=None, database=None, derandomize=is_fast, print_blob=True,
                            suppress_health_check=list(HealthCheck))(given(**strategies)(check))

        tiers = {"fast": tier(cases, is_fast=True), "slow": tier(SLOWER * cases, is_fast=False)}

        def test(tier: str, **fixtures) -> None:
            with limited_memory():
                tiers[tier](**fixtures)

        functools.update_wrapper(test, check, assigned=("__name__", "__doc__", "__module__"), updated=())
        del test.__wrapped__
        fixtures = [p for name, p in inspect.signature(check).parameters.items() if name not in strategies]
        test.__signature__ = inspect.Signature([inspect.Parameter("tier", inspect.Parameter.KEYWORD_ONLY), *(
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fixtures)])
        return pytest.mark.parametrize("tier", ["fast", pytest.param("slow", marks=pytest.mark.slow)])(test)
    return make


@contextlib.contextmanager
def limited_memory(more_bytes: int = LIMIT_BYTES) -> Iterator[None]:
    """What asks for terabytes gets a MemoryError, which no property takes for an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Refused:
    """One of the project's errors."""

    def __init__(self, text: str):
        self.text = text


def outcome(call: Callable, *names: str):
    """What call() gives, or Refused, whose line has one of the names in it. All else is raised: so fails the test."""
    try:
        with watched():
            return call()
    except (UserError, MachineError) as error:
        text = str(error)
        assert text.strip() and len(text) < 20_000, text
        assert not names or any(name in text for name in names), text
        return Refused(text)


# ---- What the process does meanwhile ---------------------------------------------------------------------------------

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect",
             "os.remove", "os.rename", "shutil.rmtree")
allowed: list[Path] | None = None  # folders whose files may be opened; None: nobody watches


def _audit(event: str, arguments: tuple) -> None:
    if allowed is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | Path):
        path = Path(os.path.realpath(os.fsdecode(arguments[0])))
        code = path.suffix in (".py", ".pyc", ".so") or str(path).startswith(("/proc", "/sys", "/dev/null", str(ROOT)))
        inside = any(path.is_relative_to(folder) for folder in allowed)
        assert inside or (code and not arguments[2] & WRITING), f"{path} was opened"
    inside = event in ("os.remove", "os.rename", "shutil.rmtree") and any(
        Path(os.fsdecode(arguments[0])).is_relative_to(folder) for folder in allowed)
    assert event not in FORBIDDEN or inside, f"{event}{arguments}"


sys.addaudithook(_audit)


@functools.cache
def scratch() -> Path:
    """A folder for this process's cases."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """A file with other bytes, for the time of a block."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Nothing outside scratch() is opened, but Python's own code to be imported; no program is run, no pickle read."""
    global allowed
    allowed = [Path(os.path.realpath(scratch()))]
    try:
        yield
    finally:
        allowed = None


# ---- What hypothesis makes -------------------------------------------------------------------------------------------

@st.composite
def mutations(draw, data: bytes) -> bytes:
    """The bytes with one to three wounds: flipped bits, cuts, insertions, zeros, a part twice."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 8, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "remove", "zero", "twice"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del changed[at:at + length]
        elif kind == "zero":
            changed[at:at + length] = bytes(len(changed[at:at + length]))
        else:
            changed[at:at] = changed[at:at + length]
    return bytes(changed)


NUMBERS = st.one_of(st.sampled_from([0, 1, -1, 2 ** 31, 2 ** 63, 10 ** 12, 10 ** 400, -0.5, 1e308, math.inf, -math.inf,
                                     math.nan, 0.1, 255, 256, 257]), st.integers(), st.floats())
WORDS = st.one_of(st.sampled_from(["", "..", "../x", "/etc/passwd", "a/b", "\0", "a\0b", "\ud800", "<|endoftext|>",
                                   "model.safetensors", "state.json", "train_00000.bin", "{{ x }}", "(a+)+$", "\n"]),
                  st.text(max_size=8))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
JSON = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                     st.dictionaries(WORDS, inner, max_size=3)), max_leaves=5)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of each value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


@st.composite
def other_json(draw, good: object) -> object:
    """A JSON value with one or two of its parts replaced, left out, renamed or repeated."""
    changed = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 2))):
        if not (found := places(changed)):
            return changed
        path = draw(st.sampled_from(found))
        parent = functools.reduce(lambda part, key: part[key], path[:-1], changed)
        kinds = ["replace", "replace", "replace", "remove", "rename", "repeat", "add"]
        kind, key = draw(st.sampled_from(kinds)), path[-1]
        if kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(WORDS)] = parent.pop(key)
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(WORDS)] = copy.deepcopy(parent[key])
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = draw(JSON)
    return changed


def json_text(value: object) -> bytes:
    return json.dumps(value).encode()
