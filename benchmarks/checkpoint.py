"""bench.py checkpoint: saving beside dd with fsync, waited for and beside the training; verifying and loading."""

import argparse
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import checkpoint
import cli
from benchmarks import measure
from config import UserError
from distributed import World
from model import GPT
from optim import Optimizer

SAVED, DD = "checkpoint", "dd"


def add_to(commands) -> None:
    parser = measure.command(commands, run, "Saving beside dd; loading.", repeats=5, config="gpt2_124m.toml")
    parser.add_argument("--dir", default=".", help="folder on the disk to measure, left as it was; default: this one")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    """checkpoint.save of weights and moments, and dd of as many bytes, into a new folder below --dir each time. Each
    repeat runs them in both orders: on some disks whoever writes second is slower, whoever it is."""
    config = measure.complete_config(args)
    if not Path(args.dir).is_dir():
        raise UserError(f"--dir {args.dir!r} is no folder; name one on the disk to measure")
    model = GPT(config.model)
    optimizer = Optimizer(model, config.optim)
    moments = optimizer.state_tensors().values()
    for tensor in moments:
        tensor.normal_()  # zeros might be compressed
    size = sum(t.nbytes for t in (*model.state_dict().values(), *moments))
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.dir) as folder:
        saver = checkpoint.BackgroundSaver(World())
        _save_beside(saver, model, optimizer, Path(folder))  # its buffers are made by the first save
        ours = partial(_save_and_load, model, optimizer, saver, folder=Path(folder), size=size)
        dd = partial(_write_by_dd, folder=Path(folder), size=size)
        for _ in range(args.repeats):
            for contenders in ({f"{SAVED}, first": ours, f"{DD}, second": dd},
                               {f"{DD}, first": dd, f"{SAVED}, second": ours}):
                figures.take_turns(contenders, repeats=1, peers=(f"{DD}, first", f"{DD}, second"))
    for place in ("first", "second"):
        figures.add_ratios(f"{SAVED} / {DD}, both {place}", f"{SAVED}, {place}", f"{DD}, {place}", "save s", "resume s")
    return {"model": f"{measure.label(args.config)}, {model.parameter_count():,} parameters and their moments",
            "bytes": f"{size:,} in {Path(args.dir).resolve()}",
            "save s": "which a run waits for, unless train.async_save: then for stall s of beside s",
            "verify s, load s, resume s": "every sha256; copying into model and optimizer; both, of dd reading as many "
                                          "bytes; the files are in the page cache",
            "first, second": "which of the two wrote first; a repeat runs both orders, ratios are of the same place"}


def _save_and_load(model: GPT, optimizer: Optimizer, saver: checkpoint.BackgroundSaver, *, folder: Path,
                   size: int) -> dict[str, float]:
    def load() -> None:
        checkpoint.load_into(model, checkpoint.open_tensors(path, "model"), str(path))
        checkpoint.fill(optimizer.state_tensors(), checkpoint.open_tensors(path, "optimizer"))

    os.sync()  # what others left to write is not ours
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_tensors()}
    save_s, path = measure.seconds_of(lambda: checkpoint.save(folder / "run", 1, tensors=tensors, state={}, keep=1))
    verify_s, _ = measure.seconds_of(lambda: checkpoint.resolve(path, cli.note))
    load_s, _ = measure.seconds_of(load)
    shutil.rmtree(folder / "run")
    os.sync()
    stall_s, beside_s = _save_beside(saver, model, optimizer, folder)
    return {"save s": save_s, "save GB/s": size / 1e9 / save_s, "stall s": stall_s, "beside s": beside_s,
            "verify s": verify_s, "load s": load_s, "resume s": verify_s + load_s}


def _save_beside(saver: checkpoint.BackgroundSaver, model: GPT, optimizer: Optimizer,
                 folder: Path) -> tuple[float, float]:
    """Seconds until training could go on, and until the checkpoint was there, with nothing else to do meanwhile."""
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_tensors()}
    stall_s, _ = measure.seconds_of(lambda: saver.start(folder / "beside", 1, tensors=tensors, state={}, keep=1,
                                                        texts=None))
    rest_s, _ = measure.seconds_of(saver.finish)
    shutil.rmtree(folder / "beside")
    return stall_s, stall_s + rest_s


def _write_by_dd(*, folder: Path, size: int) -> dict[str, float]:
    blocks = -(-size // 2 ** 20)
    os.sync()
    seconds = measure.run_to_end("dd", "if=/dev/zero", "of=zeros", f"bs={2 ** 20}", f"count={blocks}", "conv=fsync",
                                 cwd=folder).seconds
    read_s = measure.run_to_end("dd", "if=zeros", "of=/dev/null", f"bs={2 ** 20}", cwd=folder).seconds
    (folder / "zeros").unlink()
    return {"save s": seconds, "save GB/s": blocks * 2 ** 20 / 1e9 / seconds, "resume s": read_s}
