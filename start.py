"""What a run starts from: its own newest checkpoint, another run or a Hugging Face folder (init_from, fork_from), or
nothing.

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
from config import Config, ConfigError, LoraConfig, ModelConfig
from data.chat import DEFAULT_TEMPLATE, load_template, read_template
from data.shards import Dataset
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from distributed import World
from finetune import lora
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
    base_sha256: str | None = None  # of RUN/base, if the checkpoints hold adapters to it

    def as_state(self, *, updates: int, data_hash: str, world: World) -> dict:
        return {"step": self.step, "updates": updates, "skips_in_a_row": self.skips_in_a_row,
                "loss_scale": [self.scale.scale, self.scale.good_steps], "val_loss": self.val_loss,
                "val_due": self.val_due,
                "data_hash": data_hash, "world_size": world.size, "threads": torch.get_num_threads(),
                "torch": torch.__version__} | ({"base_sha256": self.base_sha256} if self.base_sha256 else {})


@dataclass(frozen=True)
class Parent:
    """What supplies [model], the tokenizer and the chat template."""

    path: Path
    model: ModelConfig
    lora: LoraConfig
    tokenizer: Tokenizer
    chat_template: str | None


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
        _check_holds_optimizer(own, "train.out_dir", config.train.out_dir)
        return Start(own, "everything", is_resume=True)
    if any(folder.glob("step_*.damaged")):
        raise CheckpointError(f"every checkpoint in {str(folder)!r} is damaged and none is left to go on from; remove "
                              "them to start from step 0, or choose another train.out_dir")
    if config.train.fork_from is not None:
        parent = checkpoint.resolve(config.train.fork_from, note)
        _check_holds_optimizer(parent, "train.fork_from", config.train.fork_from)
        return Start(parent, "everything")
    if config.train.init_from is not None:
        parent = config.train.init_from
        return Start(Path(parent) if is_hugging_face(parent) else checkpoint.resolve(parent, note), "weights")
    return Start()


def _check_holds_optimizer(path: Path, knob: str, run: str) -> None:
    """Raise CheckpointError for weights that convert.py wrote: no training can go on from them, only start."""
    if not checkpoint.holds_optimizer(path):
        raise CheckpointError(f"{knob} = {run!r} holds converted weights without optimizer state; start a run of its "
                              f"own from them: train.init_from={run} and another train.out_dir")


def agree_on_start(config: Config, dataset: Dataset, world: World, note: Callable[[str], None]) -> Start:
    """Rank 0 chooses and checks what the run starts from; every rank gets the same answer. Raises CheckpointError."""
    start = Start()
    with distributed.raise_on_all_ranks(world):
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


def check_same_tokenizer(parent: Parent, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the data was encoded by another tokenizer than the weights were trained on."""
    if not parent.tokenizer.encodes_like(tokenizer):
        raise ConfigError(f"data.tokenizer = {tokenizer.name!r} differs from that of {str(parent.path)!r}, whose "
                          "weights this run takes; leave data.tokenizer out")


def is_hugging_face(folder: str | Path) -> bool:
    return (Path(folder) / "config.json").exists() and not (Path(folder) / "config.toml").exists()


def parent_of(config: Config) -> Parent | None:
    """What init_from or fork_from names, or once this run has a checkpoint, the run itself (the parent may be gone by
    then). Raises ConfigError."""
    named = config.train.init_from or config.train.fork_from
    if named is None:
        return None
    path = Path(config.train.out_dir) if has_checkpoint(config) else Path(named)
    if is_hugging_face(path):
        if config.train.fork_from is not None:
            raise ConfigError(f"train.fork_from = {named!r} is a Hugging Face folder, which has no moments to go on "
                              "with; use train.init_from")
        from convert import load_hf
        found = load_hf(path)
        return Parent(path, found.model, LoraConfig(), found.tokenizer, found.chat_template)
    run_dir = checkpoint.run_dir_of(path) if path.name.startswith("step_") else path
    if not (run_dir / "config.toml").exists():
        what = "is neither a run folder (it has no config.toml) nor a Hugging Face folder (no config.json)" \
            if path.exists() else "does not exist"
        raise ConfigError(f"train.{'init_from' if config.train.init_from else 'fork_from'} = {named!r} {what}; name a "
                          "run that train.py made" + (", or a downloaded Hugging Face folder"
                                                      if config.train.init_from else ""))
    saved = configuration.load_config(run_dir / "config.toml")
    return Parent(run_dir, saved.model, saved.lora, load_tokenizer(str(run_dir / TOKENIZER_FILE)),
                  load_template(run_dir))


def chat_template_for(config: Config, parent: Parent | None) -> str:
    """The template that renders messages: the one named, the parent's, or the plain one."""
    if config.data.chat_template is not None:
        return read_template(Path(config.data.chat_template))
    return parent.chat_template if parent is not None and parent.chat_template is not None else DEFAULT_TEMPLATE


def has_checkpoint(config: Config) -> bool:
    return any((Path(config.train.out_dir) / "checkpoints").glob("step_*"))


def inherit(config: Config, given: set[str], parent: Parent | None, world: World) -> Config:
    """config with [model] and the tokenizer of the parent, a fork also with its [lora]; then the batch must divide.
    Raises ConfigError."""
    if parent is not None:
        data = config.data
        if data.tokenizer is None and (parent.path / TOKENIZER_FILE).exists():
            data = replace(data, tokenizer=str(parent.path / TOKENIZER_FILE))  # the file: a run may be called gpt2
        config = replace(config, model=_inherited_model(config, given, parent.model), data=data)
        if config.train.fork_from is not None:
            config = replace(config, lora=_inherited_lora(config, given, parent.lora))
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
    config = replace(config, model=model, data=replace(config.data, dir=str(data_dir)), optim=optim, train=train)
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


def _inherited_lora(config: Config, given: set[str], parent: LoraConfig) -> LoraConfig:
    """A fork's moments are those of its parent's adapters."""
    changes = configuration.differences(config.lora, parent, "lora")
    changes = [line for line in changes if line.partition(":")[0] in given]
    if changes:
        raise ConfigError(f"train.fork_from takes the moments of {config.train.fork_from!r} and with them its "
                          f"adapters: [lora] cannot change ({'; '.join(changes)}); leave it out, or use "
                          "train.init_from")
    return parent


def check_resumable(config: Config, state: dict, data_hash: str) -> None:
    """Raise CheckpointError with the list of what must not change in a resumed run and did."""
    out_dir = Path(config.train.out_dir)
    old = configuration.load_config(out_dir / "config.toml")
    changes = configuration.differences(config.model, old.model, "model")
    changes += configuration.differences(config.optim, old.optim, "optim")
    changes += configuration.differences(config.lora, old.lora, "lora")
    for name in ("seed", "tokens_per_step", "dtype"):
        if getattr(config.train, name) != getattr(old.train, name):
            changes.append(f"train.{name}: {getattr(old.train, name)} -> {getattr(config.train, name)}")
    if state["data_hash"] != data_hash:
        changes.append(f"data: hash {state['data_hash'][:16]} -> {data_hash[:16]} ({config.data.dir})")
    if changes:
        raise CheckpointError(f"run {str(out_dir)!r} cannot go on with other settings ({'; '.join(changes)}); undo "
                              "them, or choose another train.out_dir (train.fork_from continues as a new run)")


def base_tensors(start: Start, max_seq_len: int) -> dict[str, torch.Tensor]:
    """What a run's adapters are added to: the weights of init_from, or the base of the checkpoint it goes on from.
    Raises CheckpointError."""
    if start.takes == "weights":
        return _weights(start.path, max_seq_len)
    if not checkpoint.is_adapter(start.path):
        raise CheckpointError(f"checkpoint {str(start.path)!r} holds no adapters to go on with; use train.init_from to "
                              "start adapters on it")
    return _cut_positions(checkpoint.load_base(start.path), max_seq_len)


def _weights(path: Path, max_seq_len: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, adapters merged, or of a Hugging Face folder."""
    if is_hugging_face(path):
        from convert import load_hf
        return _cut_positions(load_hf(path).tensors, max_seq_len)
    return _cut_positions(checkpoint.load_tensors(path, "model"), max_seq_len)


def load_start(start: Start, model: GPT, optimizer: Optimizer, progress: Progress, config: Config) -> None:
    """Fill model (one with adapters has its base already), optimizer and progress in place from the checkpoint. Raises
    CheckpointError."""
    if start.path is None:
        return
    max_seq_len = model.config.max_seq_len
    if config.lora.rank == 0:
        checkpoint.load_into(model, _weights(start.path, max_seq_len), str(start.path))
    if start.takes == "weights":
        return
    if config.lora.rank > 0:
        try:
            lora.load_adapters(model, checkpoint.load_adapter(start.path))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint {str(start.path)!r}: {error}; keep [lora] as it was") from None
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
    progress.base_sha256 = state.get("base_sha256") if start.is_resume else None
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
    """Choose the backend of each operation that is right on every rank. Returns the line that says which, and why.

    Raises ConfigError on all ranks if train.kernels = triton and one of its kernels is not right.
    """
    mine = self_check.verdicts(config.train.kernels, config.model, dtype=dtype, device=device,
                               table_rows=padded_vocab_size(config.model.vocab_size))
    of_ranks = distributed.gather(mine, world)
    with distributed.raise_on_all_ranks(world):
        return self_check.agree(config.train.kernels, of_ranks)
