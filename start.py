"""What a run starts from: its own newest checkpoint, another run (init_from, fork_from), or nothing.

Rank 0 chooses and every rank follows. What was left out of the config and only shows once data and parent are known is
resolved here; what must not change when a run goes on is checked here. Files are checkpoint.py's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import checkpoint
import config as configuration
import distributed
import kernels
from checkpoint import CheckpointError
from config import Config, ConfigError, ModelConfig
from data.shards import Dataset
from data.tokenizer import Tokenizer, load_tokenizer
from distributed import World
from kernels import self_check
from model import GPT, padded_vocab_size
from optim import LossScale, Optimizer


@dataclass
class Progress:
    """What a checkpoint's state.json holds beside weights and moments."""

    step: int = 0  # completed steps
    skips_in_a_row: int = 0
    scale: LossScale = field(default_factory=LossScale)
    val_loss: float | None = None  # of the evaluation at this very step, if there was one
    val_due: bool = False  # a stop signal cut that evaluation short

    def as_state(self, *, updates: int, data_hash: str, world: World) -> dict:
        return {"step": self.step, "updates": updates, "skips_in_a_row": self.skips_in_a_row,
                "loss_scale": [self.scale.scale, self.scale.good_steps], "val_loss": self.val_loss,
                "val_due": self.val_due,
                "data_hash": data_hash, "world_size": world.size, "threads": torch.get_num_threads(),
                "torch": torch.__version__}


@dataclass(frozen=True)
class Start:
    """The checkpoint a run starts from and how much of it is taken."""

    path: Path | None = None
    takes: str = "nothing"  # nothing | weights (init_from) | everything (fork_from, or the run's own: resume)
    is_resume: bool = False
    step: int = 0
    is_finished: bool = False


def find_start(config: Config, note: Callable[[str], None]) -> Start:
    """Rank 0's choice: the run's own newest checkpoint beats fork_from and init_from. Raises CheckpointError."""
    folder = Path(config.train.out_dir) / "checkpoints"
    own = checkpoint.newest(Path(config.train.out_dir), note)
    if own is not None:
        return Start(own, "everything", is_resume=True)
    if any(folder.glob("step_*.damaged")):
        raise CheckpointError(f"every checkpoint in {str(folder)!r} is damaged and none is left to go on from; remove "
                              "them to start from step 0, or choose another train.out_dir")
    if config.train.fork_from is not None:
        return Start(checkpoint.resolve(config.train.fork_from, note), "everything")
    if config.train.init_from is not None:
        return Start(checkpoint.resolve(config.train.init_from, note), "weights")
    return Start()


def agree_on_start(config: Config, dataset: Dataset, world: World, note: Callable[[str], None]) -> Start:
    """Rank 0 chooses and checks what the run starts from; every rank gets the same answer. Raises CheckpointError."""
    start = Start()
    with distributed.together(world):
        if world.is_main:
            start = find_start(config, note)
            if start.is_resume:
                state = checkpoint.load_state(start.path)
                check_resumable(config, state, dataset.hash)
                finished = state["step"] >= config.train.max_steps and not state["val_due"]
                start = replace(start, step=state["step"], is_finished=finished)
    path, *others = distributed.gather(
        [start.path and str(start.path), start.takes, start.is_resume, start.step, start.is_finished], world)[0]
    return Start(path and Path(path), *others)


def check_same_tokenizer(parent: Path, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the data was encoded by another tokenizer than the weights were trained on."""
    if load_tokenizer(str(parent)).fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"data.tokenizer = {tokenizer.name!r} differs from that of {str(parent)!r}, whose weights "
                          "this run takes; leave data.tokenizer out")


def parent_run(config: Config) -> Path | None:
    """The run that supplies [model] and the tokenizer: init_from or fork_from, or once it has a checkpoint, the run's
    own folder (the parent may be gone by then)."""
    parent = config.train.init_from or config.train.fork_from
    if parent is None or has_checkpoint(config):
        return parent and Path(config.train.out_dir)
    path = Path(parent)
    run_dir = checkpoint.run_dir_of(path) if path.name.startswith("step_") else path
    if not (run_dir / "config.toml").exists():
        raise ConfigError(f"{parent!r} is not a run folder (it has no config.toml); name one that train.py made")
    return run_dir


def has_checkpoint(config: Config) -> bool:
    return any((Path(config.train.out_dir) / "checkpoints").glob("step_*"))


def inherit(config: Config, given: set[str], parent: Path | None, world: World) -> Config:
    """config with [model] and the tokenizer of the parent run; then the batch must divide. Raises ConfigError."""
    if parent is not None:
        model = _inherited_model(config, given, configuration.load_config(parent / "config.toml").model)
        data = config.data if config.data.tokenizer else replace(config.data, tokenizer=str(parent))
        config = replace(config, model=model, data=data)
    tokens, share = config.train.tokens_per_step, config.model.max_seq_len * world.size
    if tokens % share:
        raise ConfigError(f"train.tokens_per_step = {tokens} does not divide by model.max_seq_len x ranks = "
                          f"{config.model.max_seq_len} x {world.size}; near it: "
                          f"{configuration.near_multiples(tokens, share)}")
    return config


def resolve_config(config: Config, *, tokenizer: Tokenizer, dtype: torch.dtype, data_dir: Path) -> Config:
    """config with what was left to be found out: vocab_size, decay_steps, dtype, the folder of the data."""
    model, optim = config.model, config.optim
    if model.vocab_size is None:
        model = replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size = {model.vocab_size} is below the tokenizer's {tokenizer.vocab_size}; "
                          "leave it out")
    if optim.decay_steps is None:  # written at the first start, so that raising max_steps later changes no step's lr
        saved = Path(config.train.out_dir) / "config.toml"
        first = configuration.load_config(saved).optim.decay_steps if has_checkpoint(config) else None
        optim = replace(optim, decay_steps=first or config.train.max_steps)
    train = replace(config.train, dtype=str(dtype).removeprefix("torch."))
    config = Config(model, replace(config.data, dir=str(data_dir)), optim, train)
    configuration.check(config)
    return config


def _inherited_model(config: Config, given: set[str], parent: ModelConfig) -> ModelConfig:
    """The parent's [model]; beside it only dropout and a smaller max_seq_len may be given."""
    model = parent
    for key in sorted(name.removeprefix("model.") for name in given if name.startswith("model.")):
        value, theirs = getattr(config.model, key), getattr(parent, key)
        if key == "dropout" or (key == "max_seq_len" and value <= theirs):
            model = replace(model, **{key: value})
        elif value != theirs:
            raise ConfigError(f"model.{key} = {value} but the run it starts from has {theirs}; of [model] only dropout "
                              "and a smaller max_seq_len may be given beside init_from and fork_from")
    return model


def check_resumable(config: Config, state: dict, data_hash: str) -> None:
    """Raise CheckpointError with the list of what must not change in a resumed run and did."""
    out_dir = Path(config.train.out_dir)
    old = configuration.load_config(out_dir / "config.toml")
    changes = configuration.differences(config.model, old.model, "model")
    changes += configuration.differences(config.optim, old.optim, "optim")
    for name in ("seed", "tokens_per_step", "dtype"):
        if getattr(config.train, name) != getattr(old.train, name):
            changes.append(f"train.{name}: {getattr(old.train, name)} -> {getattr(config.train, name)}")
    if state["data_hash"] != data_hash:
        changes.append(f"data: hash {state['data_hash'][:16]} -> {data_hash[:16]} ({config.data.dir})")
    if changes:
        raise CheckpointError(f"run {str(out_dir)!r} cannot go on with other settings ({'; '.join(changes)}); undo "
                              "them, or choose another train.out_dir (train.fork_from continues as a new run)")


def load_start(start: Start, model: GPT, optimizer: Optimizer, progress: Progress, config: Config) -> None:
    """Fill model, optimizer and progress in place from the checkpoint. Raises CheckpointError."""
    if start.path is None:
        return
    max_seq_len = model.config.max_seq_len
    checkpoint.load_into(model, _cut_positions(checkpoint.load_tensors(start.path, "model"), max_seq_len),
                         str(start.path))
    if start.takes == "weights":
        return
    state = checkpoint.load_state(start.path)
    try:
        moments = _cut_positions(checkpoint.load_tensors(start.path, "optimizer"), max_seq_len)
        optimizer.load_state_tensors(moments, state["updates"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint {str(start.path)!r}: {error}; keep optim.name as it was") from None
    progress.step, progress.skips_in_a_row = state["step"], state["skips_in_a_row"]
    if not start.is_resume and progress.step >= config.train.max_steps:
        raise ConfigError(f"train.fork_from starts at step {progress.step} but train.max_steps = "
                          f"{config.train.max_steps}; raise it, max_steps counts from step 0")
    progress.val_due = start.is_resume and state["val_due"]
    if progress.scale.dynamic and state["loss_scale"][0] > 1.0:  # a fork from bfloat16 keeps float16's first scale
        progress.scale.scale, progress.scale.good_steps = state["loss_scale"]


def _cut_positions(tensors: dict[str, torch.Tensor], max_seq_len: int) -> dict[str, torch.Tensor]:
    """tensors with the tables of learned positions, and their moments, cut to a smaller max_seq_len."""
    return {name: tensor[:max_seq_len] if name.endswith("wpe.weight") else tensor for name, tensor in tensors.items()}


def describe(start: Start, progress: Progress) -> str:
    """Where the weights come from, as a line for the log."""
    if start.path is None:
        return "start: new weights from train.seed"
    if start.is_resume:
        return f"start: going on from step {progress.step} ({start.path})"
    return f"start: {start.takes} of {start.path}, at step {progress.step}"


# ----------------------------------------------------------------------------------------------------------------------
# Kernels

def check_kernels_can_run(config: Config, device: torch.device) -> None:
    """Raises ConfigError if train.kernels = triton asks for what this machine cannot do, before any work."""
    reason = kernels.why_no_triton(device)
    if config.train.kernels == "triton" and reason is not None:
        raise ConfigError(f"train.kernels = 'triton' but {reason}; kernels=auto takes PyTorch where Triton cannot run")


def choose_kernels(config: Config, *, dtype: torch.dtype, device: torch.device, world: World) -> str:
    """Switch each operation to Triton if its kernel is right on every rank. Returns the line that says which, and why.

    Raises ConfigError on all ranks if train.kernels = triton and one is not.
    """
    mine = self_check.verdicts(config.train.kernels, config.model, dtype=dtype, device=device,
                               table_rows=padded_vocab_size(config.model.vocab_size))
    problems: dict[str, str] = {}  # the first rank's for each operation
    for rank, theirs in enumerate(distributed.gather(mine, world)):
        for op, problem in theirs.items():
            if problem is not None and op not in problems:
                problems[op] = problem if world.size == 1 else f"rank {rank}: {problem}"
    if config.train.kernels == "triton" and problems:
        with distributed.together(world):
            raise ConfigError("train.kernels = 'triton' but " + "; ".join(f"{op}: {p}" for op, p in problems.items())
                              + "; kernels=auto takes PyTorch for these")
    kernels.choose_backends(op for op in mine if op not in problems)
    by_backend: dict[str, list[str]] = {}
    for op in mine:
        by_backend.setdefault(f"torch ({problems[op]})" if op in problems else "triton", []).append(op)
    return "kernels: " + "; ".join(f"{backend} for {', '.join(ops)}" for backend, ops in by_backend.items())
