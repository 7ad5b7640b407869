"""Config values, checkpoints, shards and Hugging Face folders, damaged or hostile, by the thousand.

Each property reads what hypothesis makes, mutations of a good file mostly, by the entry point that a command has for
it. It gets what an independent reading of the same bytes gives, or one of the project's errors: see fuzzing.py. The
fast tier is the same cases each time; `pytest -m slow` draws new ones.
"""

import contextlib
import functools
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config as configuration
import files
from config import Config, UserError
from data import chat
from data.dataset import SPLITS, open_dataset, open_split
from data.loader import TrainLoader
from data.prepare import prepare
from data.verify_shards import verify
from tests.fuzzing import (
    JSON,
    NUMBERS,
    Refused,
    changed,
    fuzz,
    json_text,
    mutations,
    other_json,
    outcome,
    scratch,
    st,
)
from tests.test_sample import make_model, save_run

TEMPLATE = chat.DEFAULT_TEMPLATE


# ---- Config ----------------------------------------------------------------------------------------------------------

KNOBS = [f"{section}.{name}" for section, values in vars(Config()).items() for name in vars(values)]
TOML_WORDS = st.one_of(
    st.sampled_from(["1e400", "-1e400", "nan", "inf", "-inf", "0x" + "F" * 6000, "1" * 5000, "9" * 400, "1e308", "1_0",
                     "true", "None", "[]", "[1, 2]", "[[1]]", "{}", "{kind = 'linear'}", "1979-05-27", "''", "[" * 3000,
                     "3\noptim.lr = 5", "3\n[x]", "3 # comment", '"""a\nb"""', "'a\\u0000b'", '"a\\u0000b"', "~/x",
                     "0.1", "a" * 5000, '"auto"', "auto", "cuda", "1.0", "1.5", "-1", "0", "2", "float32", "linear"]),
    NUMBERS.map(repr), st.text(max_size=12), st.floats(0, 1).map(repr), st.integers(0, 100).map(str))


def as_written(word: str) -> tuple[str, object]:
    """An override as TOML has it, else as the text itself: a reading apart from config.py's."""
    name, _, text = word.partition("=")
    try:
        table = tomllib.loads(f"x = {text}")
        return name, table["x"] if set(table) == {"x"} and str(table["x"]) else text
    except (ValueError, RecursionError):  # str: an integer that is too long to be one
        return name, text


def same(given: object, taken: object) -> bool:
    """Whether a knob holds what was written for it."""
    if isinstance(taken, tuple):
        listed = given if isinstance(given, list) else [given]
        return len(listed) == len(taken) and all(map(same, listed, taken))
    if isinstance(taken, str):
        return taken == str(given) or taken == os.path.expanduser(str(given)) or taken == str(given).lower()
    if isinstance(taken, bool) or isinstance(given, bool):
        return given is taken or str(given) == str(taken)
    return given == taken or (isinstance(given, int) and isinstance(taken, float) and float(given) == taken)


@fuzz(1000, words=st.lists(st.tuples(st.sampled_from([*KNOBS, "model.rope_scaling.factor", "model.x", "x.lr", "lr"]),
                                     TOML_WORDS).map("=".join), min_size=1, max_size=2))
def test_overrides(words):
    found = outcome(lambda: configuration.parse_arguments(words),
                    *[part for word in words for part in word.split("=")[0].split(".")])
    if isinstance(found, Refused):
        return
    config, given = found
    last = dict(as_written(word) for word in words)
    for name, value in last.items():
        section, *path = name.split(".")
        taken = functools.reduce(getattr, path, getattr(config, section))
        if taken is None or not isinstance(taken, bool | int | float | str | tuple):
            assert value in (None, "None") or isinstance(value, dict), (name, value, taken)
        else:
            text = name, value, taken
            assert same(value, taken) or same(dict(w.partition("=")[::2] for w in words)[name], taken), text
    again = configuration.apply_table(Config(), tomllib.loads(configuration.to_toml(config)))
    assert again == config


TOML = (Path(__file__).parents[1] / "configs" / "demo.toml").read_bytes()


@fuzz(600, data=mutations(TOML))
def test_config_files(data):
    path = scratch() / "c.toml"
    path.write_bytes(data)
    found = outcome(lambda: configuration.parse_arguments([str(path)]))
    if not isinstance(found, Refused):
        table = tomllib.loads(data.decode("utf-8-sig"))  # it is what Python's own reader has there
        for section, values in table.items():
            for name, value in values.items():
                assert isinstance(value, dict) or same(value, getattr(getattr(found[0], section), name)), (name, value)


@fuzz(400, table=st.dictionaries(st.sampled_from([*vars(Config()), "x", ""]), st.one_of(JSON, st.dictionaries(
    st.sampled_from([name.split(".")[1] for name in KNOBS]), JSON, max_size=3)), max_size=3))
def test_config_tables(table):
    """Values of every type in every knob, past TOML's own spelling."""
    outcome(lambda: configuration.check(configuration.apply_table(Config(), {
        section: values for section, values in table.items() if isinstance(values, dict)})))


def test_an_error_is_one_line_whatever_its_names_spell(capsys):
    def fail(argv: list[str]) -> None:
        raise UserError("knob 'a\nerror: b' \x1b[2J \ud800 é")

    with pytest.raises(SystemExit):
        configuration.exit_cleanly(fail)
    assert capsys.readouterr().err == "error: knob 'a\\nerror: b' \\x1b[2J \\ud800 é\n"


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

@functools.cache
def run_folder() -> Path:
    return save_run(scratch() / "run", make_model(max_seq_len=16, n_layer=1, n_embd=8, n_head=2), template=TEMPLATE)


CHECKPOINT_FILES = ("manifest.json", "state.json", "model.safetensors")


@functools.cache
def checkpoint_file(name: str) -> bytes:
    return (run_folder() / "checkpoints" / "step_00000001" / name).read_bytes()


def load_all(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.resolve(run, lambda line: None)
    checkpoint.load_state(path)
    return checkpoint.load_tensors(path, "model")


def same_tensors(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@fuzz(300, data=st.sampled_from(CHECKPOINT_FILES).flatmap(
    lambda name: mutations(checkpoint_file(name)).map(lambda changed: (name, changed))))
def test_bytes_of_a_checkpoint(data):
    name, after = data
    path = run_folder() / "checkpoints" / "step_00000001" / name
    good = load_all(run_folder())
    with changed(path, after):
        found = outcome(lambda: load_all(run_folder()), str(run_folder()))
    if not isinstance(found, Refused):
        assert after == checkpoint_file(name) or name == "manifest.json", "a changed file passes for whole"
        assert same_tensors(found, good)


@fuzz(300, manifest=st.deferred(lambda: other_json(json.loads(checkpoint_file("manifest.json")))))
def test_manifests(manifest):
    path = run_folder() / "checkpoints" / "step_00000001" / "manifest.json"
    with changed(path, json_text(manifest)):
        found = outcome(lambda: load_all(run_folder()), str(run_folder()))
    if not isinstance(found, Refused):
        assert same_tensors(found, load_all(run_folder()))


def test_a_manifest_reaches_no_file_outside_its_checkpoint(tmp_path):
    run = Path(shutil.copytree(run_folder(), tmp_path / "run"))
    (tmp_path / "secret.json").write_text("secret")
    path = run / "checkpoints" / "step_00000001" / "manifest.json"
    for name in ("../../../secret.json", str(tmp_path / "secret.json")):
        manifest = json.loads(path.read_text())
        manifest["files"][name] = {"size": 6, "sha256": files.sha256(tmp_path / "secret.json")}
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="damaged"):
            checkpoint.resolve(run / "checkpoints" / "step_00000001", lambda line: None)


def read_independently(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by its description: a length, a JSON header, little-endian numbers."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    return {name: np.frombuffer(body[slice(*one["data_offsets"])], {"F32": "<f4"}[one["dtype"]]).reshape(one["shape"])
            for name, one in header.items() if name != "__metadata__"}


@contextlib.contextmanager
def as_if_saved_so(name: str, data: bytes) -> Iterator[None]:
    """A checkpoint one of whose files says something else, and whose manifest agrees: made on purpose."""
    folder = run_folder() / "checkpoints" / "step_00000001"
    manifest = json.loads(checkpoint_file("manifest.json"))
    with changed(folder / name, data):
        manifest["files"][name] = {"size": len(data), "sha256": files.sha256(folder / name)}
        with changed(folder / "manifest.json", json_text(manifest)):
            yield


@st.composite
def hostile_tensors(draw, data: bytes) -> bytes:
    """A safetensors file, its header read as JSON and changed there, or its bytes changed."""
    if draw(st.booleans()):
        return draw(mutations(data))
    size = int.from_bytes(data[:8], "little")
    header = json_text(draw(other_json(json.loads(data[8:8 + size]))))
    return len(header).to_bytes(8, "little") + header + data[8 + size:]


@fuzz(300, data=st.deferred(lambda: hostile_tensors(checkpoint_file("model.safetensors"))))
def test_hostile_tensors_in_a_checkpoint(data):
    model = make_model(max_seq_len=16, n_layer=1, n_embd=8, n_head=2)

    def load() -> None:
        checkpoint.load_into(model, load_all(run_folder()), "the checkpoint")

    with as_if_saved_so("model.safetensors", data):
        found = outcome(load, "model.safetensors", "the checkpoint")
    if not isinstance(found, Refused):
        expected = read_independently(data)
        for name, tensor in dict(model.named_parameters()).items():
            np.testing.assert_array_equal(tensor.detach().numpy(), expected[name], strict=True)


@fuzz(200, state=st.deferred(lambda: other_json(json.loads(checkpoint_file("state.json")) | {"step": 1})))
def test_hostile_states(state):
    with as_if_saved_so("state.json", json_text(state)):
        outcome(lambda: checkpoint.load_state(checkpoint.resolve(run_folder(), lambda line: None)), "state.json")


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_byte_of_a_checkpoint_flipped_and_every_length_of_its_files(tmp_path, bits):
    """One bit of each byte (slow: each bit), of each file."""
    tensors = {"wte.weight": torch.arange(20.0).view(5, 4), "h.0.bias": torch.full((3,), 0.5)}
    path = checkpoint.save(tmp_path, 1, tensors={"model": tensors, "optimizer": tensors}, keep=1,
                           state={"step": 1, "val_loss": None})
    passed = []
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        flipped = (data[:i] + bytes([data[i] ^ 1 << (i + bit) % 8]) + data[i + 1:] for i in range(len(data))
                   for bit in range(bits))
        for after in [*flipped, *(data[:size] for size in range(len(data)))]:
            file.write_bytes(after)
            try:
                checkpoint.resolve(path, lambda line: None)
            except checkpoint.CheckpointError as error:
                assert str(path) in str(error)
            else:
                passed.append((file.name, after))
        file.write_bytes(data)
    last = (path / "manifest.json").read_bytes()[:-1]
    assert passed == [("manifest.json", last)]  # JSON without its last newline says the same
    checkpoint.resolve(path, lambda line: None)


# ---- Shards ----------------------------------------------------------------------------------------------------------

@functools.cache
def data_folder(kind: str) -> Path:
    """Text in two shards and one; or examples with tracks."""
    source = scratch() / f"{kind}.{'txt' if kind == 'text' else 'jsonl'}"
    source.write_text("The cat sat on the mat, and slept.\n" * 20 if kind == "text" else "".join(
        json.dumps({"prompt": f"{n}?", "response": "x" * (n % 7 + 1)}) + "\n" for n in range(40)))
    prepare([str(source)], scratch() / kind, tokenizer="bytes", val_fraction=0.3, max_seq_len=16,
            shard_tokens=300, workers=1)
    return scratch() / kind


def everything(folder: Path) -> dict[str, np.ndarray]:
    """All tokens and tracks of a data folder, and its rows' length."""
    dataset, found = open_dataset(folder), {}
    for split in SPLITS:
        stream = open_split(dataset, split)
        for track in (None, *sorted(stream.tracks)):
            found[f"{split} {track}"] = stream.windows(np.array([0]), stream.tokens, track)[0]
        found[f"{split} rows"] = np.array([stream.row_tokens or 0])
    return found


def same_arrays(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


BINARY = {"text": ("train_00000.bin", "train_00001.bin", "val_00000.bin"),
          "examples": ("train_00000.bin", "train_00000.loss.bin", "train_00000.start.bin", "val_00000.loss.bin")}


@fuzz(250, kind=st.sampled_from(["text", "examples"]), data=st.data())
def test_bytes_of_shards_and_tracks(kind, data):
    folder = data_folder(kind)
    good, path = everything(folder), folder / data.draw(st.sampled_from(BINARY[kind]))
    before = path.read_bytes()
    with changed(path, after := data.draw(mutations(before))):
        problems = verify(folder, lambda line: None)
        assert (problems == []) == (after == before), "a changed shard passes --verify, or a whole one does not"
        assert all(path.name in problem for problem in problems)
        found = outcome(lambda: everything(folder), path.name)
        if not isinstance(found, Refused):  # opening checks sizes and headers: the tokens are those of the file
            number = int(path.name.split("_")[1].split(".")[0])
            track = path.suffixes[0][1:] if len(path.suffixes) > 1 else None
            start = 0 if number == 0 else 300
            values = np.frombuffer(after[1024:], "<u2") if track is None else np.frombuffer(after, np.uint8)
            key = f"{path.name.split('_')[0]} {track}"
            np.testing.assert_array_equal(found.pop(key)[start:start + len(values)], values)
            good.pop(key)
            assert same_arrays(found, good)


def index_of(kind: str) -> dict:
    return json.loads((data_folder(kind) / "index.json").read_bytes())


@fuzz(300, kind=st.sampled_from(["text", "examples"]), data=st.data())
def test_indexes(kind, data):
    folder, good = data_folder(kind), everything(data_folder(kind))
    with changed(folder / "index.json", json_text(index := data.draw(other_json(index_of(kind))))):
        problems = verify(folder, lambda line: None)
        found = outcome(lambda: everything(folder), str(folder))
        if not isinstance(found, Refused):
            outcome(lambda: TrainLoader(open_split(open_dataset(folder), "train"), seq_len=16, seed=1,
                                        tokens_per_step=16), str(folder))
    if not problems and not isinstance(found, Refused) and all(
            index.get(key) == index_of(kind).get(key) for key in ("shards", "settings")):
        assert same_arrays(found, good), "--verify passes other data"


@fuzz(400, name=st.sampled_from(["train.bin", "val.bin", "x_train_1.bin"]), data=st.one_of(
    st.binary(max_size=64), st.deferred(lambda: mutations((data_folder("text") / "train_00000.bin").read_bytes()))))
def test_foreign_shards(name, data):
    folder = scratch() / "foreign"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(data)
    split = "val" if "val" in name else "train"

    def read() -> np.ndarray:
        stream = open_split(open_dataset(folder), split)
        return stream.windows(np.array([0]), stream.tokens)[0]

    found = outcome(read, name)
    if not isinstance(found, Refused):
        has_header = data[:8] == np.array([20240520, 1], "<i4").tobytes()
        np.testing.assert_array_equal(found, np.frombuffer(data[1024 * has_header:], "<u2"))


def test_a_track_that_the_index_does_not_know_is_refused(tmp_path):
    """Left over from other data, it would say unseen what the loss counts."""
    folder = Path(shutil.copytree(data_folder("text"), tmp_path / "data"))
    tokens = open_dataset(folder).headers[0].tokens
    (folder / "train_00000.loss.bin").write_bytes(bytes(tokens))
    assert "train_00000.loss.bin' is not in index.json" in verify(folder, lambda line: None)[0]
    with pytest.raises(UserError, match="is not in index.json"):
        open_dataset(folder)
