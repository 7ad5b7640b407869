"""finetune/runs.py and start.py: a run is read once, and only what is needed of it is read and verified."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import checkpoint
import convert
import eval as evaluation
import files
import sample
import start as starting
from checkpoint import CheckpointError
from config import UserError, load_run_config
from devices import Machine
from distributed import World
from finetune.runs import read_run, run_dir_of, run_lock
from tests.crashing_disk import in_child
from tests.test_checkpoint import RowsOf, in_threads
from tests.test_train import assert_same_bits, losses, rows, run, settings, tensors  # noqa: F401


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_is_read_is_verified_and_the_moments_are_left_alone(settings, monkeypatch):  # noqa: F811
    step = run(settings, "run", "train.max_steps=4", "train.keep=1") / "checkpoints" / "step_00000004"
    hashed, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path, *rest: (hashed.append(path.name), sha256(path, *rest))[1])
    saved = read_run("run", pytest.fail)
    assert saved.checkpoint == step and "optimizer.safetensors" not in hashed
    assert {"model.safetensors", "state.json"} <= set(hashed)
    assert saved.model == load_run_config(Path("run")).model
    flip(step / "optimizer.safetensors")
    read_run("run", pytest.fail)
    with pytest.raises(CheckpointError, match="optimizer.safetensors does not have the sha256"):  # a fork reads it
        run(settings, "forked", f"train.fork_from={step}")
    flip(step / "model.safetensors")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        read_run("run", lambda line: None)


def test_a_hugging_face_parent_is_read_once_and_by_rank_0_alone(settings, monkeypatch):  # noqa: F811
    convert.to_hf(run(settings, "parent", "train.max_steps=2"), Path("hf"))
    reads, weights = [], convert.HuggingFaceModel.weights
    monkeypatch.setattr(convert.HuggingFaceModel, "weights", lambda hf: (reads.append(hf.dir), weights(hf))[1])
    config = load_run_config(run(settings, "tuned", "train.init_from=hf", "train.max_steps=3"))
    assert reads == [Path("hf")]
    parent = starting.read_parent(config)
    assert reads == [Path("hf")]
    others = starting._starting_weights(starting.Init("hf"), config, parent, is_needed=False)
    assert others == {} and reads == [Path("hf")]
    run(settings, "tuned", "train.init_from=hf", "train.max_steps=4")  # its own checkpoint by now
    assert reads == [Path("hf")]


def test_whatever_reads_a_run_reads_the_checkpoints_of_sharded_ones(settings, monkeypatch):  # noqa: F811
    """The same run with its checkpoint in the files of three ranks, and as it was: nobody sees a difference."""
    step = run(settings, "whole", "train.max_steps=4", "train.keep=1") / "checkpoints" / "step_00000004"
    shutil.copytree("whole", "rows")
    parts = {name: checkpoint.load_tensors(step, name) for name in ("model", "optimizer")}

    def save(world: World) -> None:
        tensors = {name: {key: RowsOf(tensor, world) for key, tensor in part.items()} for name, part in parts.items()}
        checkpoint.save(Path("rows"), 4, tensors=tensors, state=checkpoint.load_state(step), keep=1, world=world)

    in_threads(3, save, monkeypatch)
    assert [len(list(Path("rows/checkpoints").rglob(f"{name}*.safetensors"))) for name in parts] == [3, 3]
    models = [sample.build_model(read_run(name, pytest.fail), device=torch.device("cpu"), dtype="float32",
                                 note=lambda line: None).state_dict() for name in ("whole", "rows")]
    assert_same_bits(*models)
    for name in ("whole", "rows"):
        convert.to_hf(Path(name), Path(f"hf_{name}"), dtype="bfloat16")
        run(settings, f"cut_{name}", f"train.init_from={name}", "train.max_steps=2", "model.max_seq_len=8")
        run(settings, f"tuned_{name}", f"train.init_from={name}", "lora.rank=2", "train.max_steps=2")
        run(settings, f"forked_{name}", f"train.fork_from={name}", "train.max_steps=6")
        run(settings, name, "train.max_steps=6")
    assert files.sha256(Path("hf_rows/model.safetensors")) == files.sha256(Path("hf_whole/model.safetensors"))
    assert files.sha256(Path("tuned_rows/base/model.safetensors")) == files.sha256(
        Path("tuned_whole/base/model.safetensors"))
    for kind in ("cut_", "tuned_", "forked_", ""):
        assert losses(Path(f"{kind}rows")) == losses(Path(f"{kind}whole"))
    assert_same_bits(tensors(Path("rows"), 6), tensors(Path("whole"), 6))


def test_what_only_another_rank_finds_damaged_is_refused_and_not_renamed(tmp_path, monkeypatch):
    """Else a node without the shared disk would set good checkpoints aside, or train on from other bytes."""
    chosen, asked = starting.Resume(str(tmp_path), 4), []
    monkeypatch.setattr(starting, "_choose_start", lambda *args: (asked.append(args[-1]), chosen)[1])
    monkeypatch.setattr(checkpoint, "problem", lambda path, world: ["x cannot be read (gone)", None][world.rank != 1])

    def agree(world: World) -> str:
        with pytest.raises(CheckpointError) as caught:
            starting.agree_on_start(None, None, None, world, pytest.fail)
        return str(caught.value)

    texts = in_threads(3, agree, monkeypatch)
    assert asked == [checkpoint.SIZES_ONLY, ()]  # the second time rank 0 reads all of it itself
    assert set(texts) == {f"checkpoint {str(tmp_path)!r} is whole for rank 0, but rank 1 finds that x cannot be read "
                          "(gone); put the run folder on a disk that all ranks share"}


def test_a_folder_of_shards_is_no_run(settings):  # noqa: F811
    run(settings, "run", "train.max_steps=1")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        read_run(next(Path("shards").iterdir()), pytest.fail)


def test_weights_of_adapters_are_the_base_with_their_product(settings):  # noqa: F811
    run(settings, "base", "train.max_steps=1")
    run(settings, "tuned", "train.init_from=base", "lora.rank=2", "lora.alpha=6", "train.max_steps=3")
    merged, base = read_run("tuned", pytest.fail).weights(), read_run("base", pytest.fail).weights()
    adapters = checkpoint.load_tensors(Path("tuned/checkpoints/step_00000003"), "adapter_model")
    stem = "base_model.model.transformer.h.0.mlp.c_fc"
    product = adapters[f"{stem}.lora_B.weight"].double() @ adapters[f"{stem}.lora_A.weight"].double()
    expected = base["blocks.0.mlp.fc.weight"].double() + 6 / 2 * product
    torch.testing.assert_close(merged["blocks.0.mlp.fc.weight"].double(), expected, rtol=0, atol=1e-7)
    assert product.abs().max() > 1e-4 and torch.equal(merged["wte.weight"], base["wte.weight"])


@pytest.mark.parametrize("mlp", ["gelu", "relu2"])
def test_adapters_are_taken_from_their_folder_and_the_exported_base(settings, mlp):  # noqa: F811
    """As peft has them: adapter_model.safetensors and adapter_config.json, which names the base."""
    convert.to_hf(run(settings, "base", "train.max_steps=1", f"model.mlp={mlp}"), Path("hf"))
    run(settings, "tuned", "train.init_from=base", "lora.rank=2", "lora.alpha=6", "train.max_steps=3")
    Path("adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(f"tuned/checkpoints/step_00000003/{name}", "adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": "hf"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    merged, base = read_run("tuned", pytest.fail).weights(), read_run("base", pytest.fail).weights()
    run(settings, "again", "train.init_from=adapter", "train.max_steps=1", "optim.lr=1e-9", "optim.warmup_steps=0")
    for name, tensor in read_run("again", pytest.fail).weights().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)  # and a step of 1e-9
    run(settings, "more", "train.init_from=adapter", "train.max_steps=1", "lora.rank=3")  # new ones on the sum
    torch.testing.assert_close(checkpoint.load_tensors(Path("more/base"), "model"), merged, rtol=0, atol=1e-6)
    assert (merged["blocks.1.mlp.fc.weight"] - base["blocks.1.mlp.fc.weight"]).abs().max() > 1e-4


def test_a_run_folder_has_the_ends_of_its_parents_generation(settings):  # noqa: F811
    """Its own end-of-text, its template's and those of the parent, after a copy too; resumed from itself alone."""
    convert.to_hf(run(settings, "parent", "train.max_steps=1"), Path("hf"))
    Path("hf/generation_config.json").write_text('{"eos_token_id": [256, 10], "temperature": 0.5}')
    Path("parent/generation_config.json").write_text('{"eos_token_id": [10, 256], "temperature": 0.5}')
    words = ("train.init_from=parent", "train.max_steps=2")
    run(settings, "tuned", *words)
    shutil.rmtree("parent")
    Path("tuned").rename("copied")
    run(settings, "copied", *words[:1], "train.max_steps=3")
    saved = read_run("copied", pytest.fail)
    assert saved.end_ids == {256, 10} and saved.generation["temperature"] == 0.5
    for text, message in (("[" * 100_000, "nested too deeply"), ('{"eos_token_id": true}', "True should be an id"),
                          ("[1]", "holds a list")):
        Path("copied/generation_config.json").write_text(text)
        with pytest.raises(UserError, match=f"copied/generation_config.json' cannot be read: .*{message}"):
            read_run("copied", pytest.fail)


def test_adapters_are_on_the_machines_device_as_the_weights_are(settings):  # noqa: F811
    """The meta device stands for a GPU."""
    base = run(settings, "base", "train.max_steps=1")
    config = load_run_config(run(settings, "tuned", "train.init_from=base", "lora.rank=2", "train.max_steps=1"))
    machine = Machine(torch.device("meta"), "a GPU", torch.float32, False, ("", ""))
    start = starting.Init(str(base / "checkpoints" / "step_00000001"))
    model, optimizer, _ = starting.build(start, config, read_run(base, pytest.fail), machine, World())
    assert {tensor.device.type for tensor in (*model.parameters(), *optimizer.state_tensors().values())} == {"meta"}


def test_a_fork_that_is_refused_writes_no_log(settings):  # noqa: F811
    run(settings, "parent", "train.max_steps=2")
    with pytest.raises(CheckpointError, match="keep optim.name as it was"):
        run(settings, "fork", "train.fork_from=parent", "optim.name=muon", "train.max_steps=4")
    assert [path.name for path in Path("fork").iterdir()] == [".lock"]


# ---- Links -----------------------------------------------------------------------------------------------------------

def moved(path: Path, place: str) -> Path:
    """The folder moved to another disk, and linked where it was."""
    target = Path(place).absolute()
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    path.symlink_to(target)
    return path


def linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def all_moved(run: Path) -> Path:
    return moved(run / "checkpoints", "disk/all")


STEP = "step_00000004"
LINKS = {  # what is linked; the name by which the run is then meant
    "checkpoints on another disk": lambda run: all_moved(run).parent,
    "one of them named": lambda run: all_moved(run) / STEP,
    "latest": lambda run: linked(run / "checkpoints" / "latest", Path(STEP)),
    "latest on another disk": lambda run: linked(all_moved(run) / "latest", Path(STEP)),
    "a step on another disk": lambda run: moved(run / "checkpoints" / STEP, "disk/step"),
    "a link from elsewhere": lambda run: linked(Path("best"), run / "checkpoints" / STEP),
    "a link to a link": lambda run: linked(Path("best"), all_moved(run) / STEP),
    "a link to checkpoints": lambda run: linked(Path("all"), all_moved(run)) / STEP,
    "the run on another disk": lambda run: moved(run, "disk/run"),
}


@pytest.mark.parametrize("link", LINKS)
def test_a_run_is_found_through_links(settings, link, capsys):  # noqa: F811
    run(settings, "run", "train.max_steps=4")
    weights = read_run("run", pytest.fail).weights()
    name = str(LINKS[link](Path("run")))
    read = read_run(name, pytest.fail)
    assert (Path(read.dir) / "config.toml").samefile("run/config.toml") and read.weights().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in read.weights().items())
    sample.main([name, "--max-new-tokens", "2"])
    evaluation.main([name])
    convert.to_hf(name, Path("hf"))
    forked = run(settings, "forked", f"train.fork_from={name}", "train.max_steps=5")
    tuned = run(settings, "tuned", f"train.init_from={name}", "train.max_steps=1", "optim.warmup_steps=0")
    assert [row["step"] for row in rows(forked)] == [5] and rows(tuned)[0]["loss"] < 5


@pytest.mark.parametrize("link", ["checkpoints on another disk", "a step on another disk"])
def test_adapters_and_retention_go_on_through_links(settings, link):  # noqa: F811
    run(settings, "base", "train.max_steps=1")
    words = ["train.init_from=base", "lora.rank=2", "train.keep=1", "train.eval_every=0"]
    run(settings, "tuned", *words, "train.max_steps=4")
    LINKS[link](Path("tuned"))
    tuned, whole = run(settings, "tuned", *words), run(settings, "whole", *words)
    assert losses(tuned) == losses(whole)
    assert [path.name for path in (tuned / "checkpoints").iterdir()] == ["step_00000012"]


def test_a_checkpoint_without_its_run_says_what_is_missing(settings, capsys):  # noqa: F811
    run_dir = run(settings, "run", "train.max_steps=4")
    shutil.copytree(run_dir / "checkpoints" / "step_00000004", "alone/step_00000004")
    for use in (lambda: read_run("alone/step_00000004", pytest.fail), lambda: sample.main(["alone/step_00000004"]),
                lambda: run(settings, "tuned", "train.init_from=alone/step_00000004")):
        with pytest.raises(CheckpointError, match="lies in no run folder: config.toml and tokenizer.json are not in"):
            use()
    Path("copy/checkpoints").mkdir(parents=True)  # the way out
    for path in (run_dir / "config.toml", run_dir / "tokenizer.json"):
        shutil.copy(path, "copy")
    shutil.move("alone/step_00000004", "copy/checkpoints")
    sample.main(["copy", "--max-new-tokens", "2"])


def test_a_link_to_a_disk_that_is_not_mounted_does_not_start_the_run_anew(settings):  # noqa: F811
    run_dir = run(settings, "run", "train.max_steps=4")
    moved(run_dir / "checkpoints", "disk/all")
    Path("disk").rename("unmounted")
    before = (run_dir / "metrics.jsonl").read_bytes()
    for use in (lambda: run(settings, "run"), lambda: read_run("run", pytest.fail)):
        with pytest.raises(CheckpointError, match="is a link to '.*disk/all', which is not there; mount"):
            use()
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    Path("unmounted").rename("disk")
    assert [row["step"] for row in rows(run(settings, "run"))] == list(range(1, 13))


def test_a_checkpoint_knows_its_run_from_inside(settings, monkeypatch):  # noqa: F811
    path = run(settings, "run", "train.max_steps=1") / "checkpoints" / "step_00000001"
    expected = path.absolute().parent.parent
    monkeypatch.chdir(path)
    assert run_dir_of(Path(".")) == run_dir_of(Path("../step_00000001")) == expected


# ---- The lock --------------------------------------------------------------------------------------------------------

def test_a_second_run_in_the_same_folder_is_refused_with_the_holders_name(tmp_path):
    def second() -> None:
        with pytest.raises(CheckpointError) as caught:
            run_lock(tmp_path / "run").__enter__()
        (tmp_path / "said").write_text(str(caught.value))

    with run_lock(tmp_path / "run"):
        assert in_child(second) == 0
    said = (tmp_path / "said").read_text()
    assert f"in use by process {os.getpid()} on {os.uname().nodename}" in said and "train.out_dir" in said


def test_the_lock_ends_with_the_block_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with run_lock(tmp_path):
            with pytest.raises(CheckpointError, match="in use by"):
                run_lock(tmp_path).__enter__()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    def lock_and_die() -> None:
        run_lock(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lock_and_die) == -signal.SIGKILL
    with run_lock(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made_is_an_error_with_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file.*cannot be written.*another train.out_dir"):
        run_lock(tmp_path / "file").__enter__()
