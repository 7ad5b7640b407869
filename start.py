"""What a run starts from: its own newest checkpoint, init_from (a run or a Hugging Face folder), fork_from, or nothing.

Rank 0 chooses and every rank follows. What was left out of the config and only shows once data and parent are known is
resolved here; what must not change when a run goes on is checked here. Files are checkpoint.py's, finetune/runs.py's.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

import checkpoint
import config as configuration
import devices
import distributed
from checkpoint import CheckpointError
from config import Config, ConfigError, MachineError
from convert import HuggingFaceModel, is_hugging_face, read_hf
from data.dataset import Dataset
from data.tokenizer import Tokenizer
from devices import Machine
from distributed import World
from finetune import lora
from finetune.runs import ADAPTER, SavedRun, load_base, read_folder, run_dir_of, save_base, take_over, weights_of
from model import GPT
from optim import LossScale, Optimizer, SpikeGuard
from tensor_files import SavedTensors

Parent = SavedRun | HuggingFaceModel  # what supplies [model], the tokenizer and the chat template


@dataclass
class Progress:
    """What a checkpoint's state.json holds beside weights and moments."""

    step: int = 0  # completed steps
    tokens: int = 0  # of them, and of a fork those that its parent was trained on: they say where in the data it stands
    skips_in_a_row: int = 0
    scale: LossScale = field(default_factory=LossScale)
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    val_loss: float | None = None  # of the evaluation at this very step, if there was one
    val_due: bool = False  # that evaluation was cut short by a stop signal, or its loss was not finite
    micro_batch: int | None = None  # sequences, found at the first start if train.micro_batch = "auto"
    kernels: dict[str, str] | None = None  # the backend of each operation, chosen at the first start
    base_sha256: str | None = None  # of RUN/base, if the checkpoints hold adapters to it

    def as_state(self, *, updates: int, data_hash: str, world: World) -> dict:
        return {"step": self.step, "tokens": self.tokens, "updates": updates, "skips_in_a_row": self.skips_in_a_row,
                "loss_scale": [self.scale.scale, self.scale.good_steps], "val_loss": self.val_loss,
                "val_due": self.val_due, "micro_batch": self.micro_batch, "kernels": self.kernels,
                "data_hash": data_hash, "world_size": world.size, "threads": torch.get_num_threads(),
                "torch": torch.__version__, "spikes": dataclasses.asdict(self.guard)} | (
                    {"base_sha256": self.base_sha256} if self.base_sha256 else {})


# ---- The four ways to start ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    path: str | None = None
    step: int = 0
    is_settled: bool = True  # its last step was not skipped, and the evaluation of that is not due


class Fresh(Start):
    """New weights from train.seed."""


class Init(Start):
    """The weights of a checkpoint or a Hugging Face folder (train.init_from)."""


class Fork(Start):
    """Weights, moments and step of another run's checkpoint (train.fork_from)."""


class Resume(Start):
    """The run's own newest checkpoint."""


def agree_on_start(config: Config, parent: Parent | None, dataset: Dataset, world: World,
                   note: Callable[[str], None]) -> Start:
    """Rank 0 chooses and checks what the run starts from; every rank gets the same answer. Of several ranks each reads
    its share of a checkpoint to go on from; if one finds damage, rank 0 chooses again. Raises CheckpointError,
    ConfigError."""
    def choose(unread: tuple[str, ...]) -> Start:
        start = Fresh()
        with distributed.raise_on_all_ranks(world):
            if world.is_main:
                start = _choose_start(config, parent, dataset, note, unread)
        name, values = distributed.gather([type(start).__name__, dataclasses.asdict(start)], world)[0]
        return {"Fresh": Fresh, "Init": Init, "Fork": Fork, "Resume": Resume}[name](**values)

    start = choose(checkpoint.SIZES_ONLY if world.size > 1 else ())
    if world.size == 1 or not isinstance(start, Fork | Resume):
        return start
    found = distributed.gather(checkpoint.problem(Path(start.path), world), world)
    wrong = next((f"rank {rank} finds that {text}" for rank, text in enumerate(found) if text is not None), None)
    if wrong is not None and (again := choose(())).path != start.path:  # rank 0 read all of it itself
        return again
    if wrong is not None:
        raise CheckpointError(f"checkpoint {start.path!r} is whole for rank 0, but {wrong}; put the run folder on a "
                              "disk that all ranks share")
    return start


def _choose_start(config: Config, parent: Parent | None, dataset: Dataset, note: Callable[[str], None],
                  unread: tuple[str, ...] = ()) -> Start:
    """The run's own newest checkpoint beats fork_from and init_from. unread: of a checkpoint to go on from."""
    train, out_dir = config.train, Path(config.train.out_dir)
    if (own := checkpoint.newest(out_dir, note, unread)) is not None:
        state = _state_to_go_on_from(own, "out_dir", config, note)
        _check_resumable(config, state, dataset.hash)
        return Resume(str(own), state["step"], not (state["val_due"] or state["skips_in_a_row"]))
    if any(out_dir.glob("checkpoints/step_*.damaged")):
        raise CheckpointError(f"every checkpoint in {str(out_dir / 'checkpoints')!r} is damaged and none is left to go "
                              "on from; remove them to start from step 0, or choose another train.out_dir")
    if train.fork_from is not None:
        path = checkpoint.resolve(train.fork_from, note, unread=unread)
        step = _state_to_go_on_from(path, "fork_from", config, note)["step"]
        if step >= train.max_steps:
            raise ConfigError(f"train.fork_from starts at step {step} but train.max_steps = {train.max_steps}; raise "
                              "it, max_steps counts from step 0")
        return Fork(str(path), step)
    if train.init_from is not None:
        is_hf = isinstance(parent, HuggingFaceModel)
        path = parent.dir if is_hf else checkpoint.resolve(train.init_from, note, unread=checkpoint.WEIGHTS_ONLY)
        return Init(str(path))
    return Fresh()


def _state_to_go_on_from(path: Path, knob: str, config: Config, note: Callable[[str], None]) -> dict:
    """state.json of a checkpoint. Raises CheckpointError for weights that convert.py wrote: no training can go on from
    them, only start."""
    run = getattr(config.train, knob)
    if not checkpoint.holds(path, "optimizer"):
        raise CheckpointError(f"train.{knob} = {run!r} holds converted weights without optimizer state; start a run of "
                              f"its own from them: train.init_from={quote(run)} and another train.out_dir")
    state = checkpoint.load_state(path)
    if "tokens" not in state and config.data.document_mask and state["step"] < config.train.max_steps:
        note("data.document_mask: the version that trained this run let an end-of-text close the document before it, "
             "this one lets it open the document behind it: losses differ from here on (docs/DECISIONS.md)")
    return state


def _check_resumable(config: Config, state: dict, data_hash: str) -> None:
    """Raise CheckpointError with the list of what must not change in a resumed run and did."""
    old = configuration.load_run_config(Path(config.train.out_dir))
    changes = [line for section in ("model", "optim", "lora") for line in
               configuration.differences(getattr(config, section), getattr(old, section), section)]
    changes += [f"train.{name}: {getattr(old.train, name)} -> {getattr(config.train, name)}"
                for name in ("seed", "tokens_per_step", "dtype", "tf32")
                if getattr(config.train, name) != getattr(old.train, name)]
    if state["data_hash"] != data_hash:
        changes.append(f"data: hash {state['data_hash'][:16]} -> {data_hash[:16]} ({config.data.dir})")
    if changes:
        raise CheckpointError(f"run {config.train.out_dir!r} cannot go on with other settings ({'; '.join(changes)}); "
                              "undo them, or choose another train.out_dir (train.fork_from continues as a new run)")


# ---- What was left out of the config ---------------------------------------------------------------------------------

def has_checkpoint(config: Config) -> bool:
    return any((Path(config.train.out_dir) / "checkpoints").glob("step_*"))


def read_parent(config: Config) -> Parent | None:
    """What init_from or fork_from names, or once this run has a checkpoint, the run itself (the parent may be gone by
    then). No weights are read. Raises ConfigError."""
    knob = "init_from" if config.train.init_from is not None else "fork_from"
    named = getattr(config.train, knob)
    if named is None:
        return None
    path = Path(config.train.out_dir) if has_checkpoint(config) else Path(named)
    if is_hugging_face(path):
        if knob == "fork_from":
            raise ConfigError(f"train.fork_from = {named!r} is a Hugging Face folder, which has no moments to go on "
                              "with; use train.init_from")
        return read_hf(path)
    run_dir = run_dir_of(path) if checkpoint.is_checkpoint(path) else path
    if not (run_dir / "config.toml").exists():
        what = "is neither a run folder (it has no config.toml) nor a Hugging Face folder (no config.json)" \
            if path.exists() else "does not exist"
        raise ConfigError(f"train.{knob} = {named!r} {what}; name a run that train.py made"
                          + (", or a downloaded Hugging Face folder" if knob == "init_from" else ""))
    return read_folder(run_dir)


def inherit(config: Config, given: set[str], parent: Parent | None, world: World) -> Config:
    """config with what the parent supplies, and with decay_steps, which is written at the first start so that raising
    max_steps later changes no step's learning rate. Raises ConfigError, also if the batch does not divide."""
    config = config if parent is None else take_over(config, given, parent)
    optim, tokens, share = config.optim, config.train.tokens_per_step, config.model.max_seq_len * world.size
    if optim.decay_steps is None:
        saved = configuration.load_run_config(Path(config.train.out_dir)).optim if has_checkpoint(config) else optim
        config = replace(config, optim=replace(optim, decay_steps=saved.decay_steps or config.train.max_steps))
    configuration.check(config)
    if _ends_early(config) and optim.min_lr == 0.0:
        way_out = "lower that, or raise optim.decay_steps or optim.min_lr"
        if has_checkpoint(config):
            way_out = f"for a longer schedule start a new run from here, {fork_words(config, config.train.max_steps)}"
        raise ConfigError(f"optim.schedule ends at step {config.optim.decay_steps} at learning rate 0 (optim.min_lr): "
                          f"no step after it, up to train.max_steps = {config.train.max_steps}, would learn; {way_out}")
    if tokens % share:
        near = [str(n) for n in (tokens // share * share, tokens // share * share + share) if n > 0]
        raise ConfigError(f"train.tokens_per_step = {tokens} does not divide by model.max_seq_len x ranks = "
                          f"{config.model.max_seq_len} x {world.size}; near it: {' or '.join(near)}")
    return config


def _ends_early(config: Config) -> bool:
    return config.optim.schedule != "constant" and config.optim.decay_steps < config.train.max_steps


def fork_words(config: Config, max_steps: int | str | None, path: Path | None = None) -> str:
    """What a command adds to go on as a new run from this run's newest checkpoint, or that at path; with a schedule of
    so many steps."""
    words = [f"train.fork_from={quote(str(path or config.train.out_dir))}", "train.out_dir=NEW"]
    words += ["train.init_from=None"] if config.train.init_from is not None else []
    words += [f"train.max_steps={max_steps} optim.decay_steps={max_steps}"] if max_steps is not None else []
    return f"adding to this command: {' '.join(words)}"


def when_finished(config: Config) -> str:
    """How a run that reached max_steps can go on."""
    optim, max_steps = config.optim, config.train.max_steps
    if optim.schedule == "constant" or optim.min_lr > 0.0:
        return "raise train.max_steps to go on" + ("" if optim.schedule == "constant" or optim.decay_steps > max_steps
                                                   else f" at optim.min_lr = {optim.min_lr:g}")
    if optim.decay_steps > max_steps:
        return f"raise train.max_steps to go on, to optim.decay_steps = {optim.decay_steps} at most"
    return f"its schedule ended at learning rate 0, for a longer one start a new run, {fork_words(config, 'STEPS')}"


def resolve(config: Config, *, tokenizer: Tokenizer, parent: Parent | None, machine: Machine, data_dir: Path) -> Config:
    """config with vocab_size, dtype and the folder of the data. Raises ConfigError if tokenizer, model and parent do
    not belong together."""
    if parent is not None and not parent.tokenizer.encodes_like(tokenizer):
        raise ConfigError(f"data.tokenizer = {tokenizer.name!r} differs from that of {str(parent.dir)!r}, whose "
                          "weights this run takes; leave data.tokenizer out")
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size = {vocab_size} is below the tokenizer's {tokenizer.vocab_size}; leave it "
                          "out")
    return replace(config, model=replace(config.model, vocab_size=vocab_size),
                   data=replace(config.data, dir=str(data_dir)),
                   train=replace(config.train, dtype=str(machine.dtype).removeprefix("torch.")))


def check_same_on_all_ranks(config: Config, dataset: Dataset, world: World) -> None:
    """Raise MachineError if ranks would train differently: another config, or an old or incomplete copy of the data."""
    text = configuration.to_toml(replace(config, data=replace(config.data, dir=None)))  # paths may differ
    for what, mine, way_out in (
            ("config", hashlib.sha256(text.encode()).hexdigest(),
             "give every node the same command, checkout and kind of device"),
            ("data", dataset.hash, "copy the shards to every node again")):
        hashes = distributed.gather(mine, world)
        odd = next((rank for rank, value in enumerate(hashes) if value != hashes[0]), None)
        if odd is not None:
            raise MachineError(f"rank {odd} has another {what} than rank 0 (hash {hashes[odd][:16]} against "
                               f"{hashes[0][:16]}, data {str(dataset.dir)!r}); {way_out}")


# ---- Model, optimizer and progress -----------------------------------------------------------------------------------

def build(start: Start, config: Config, parent: Parent | None, machine: Machine,
          world: World) -> tuple[GPT, Optimizer, Progress]:
    """The model, its optimizer and its progress, from the seed or the checkpoint, the same on every rank. Raises
    CheckpointError, ConfigError on all ranks."""
    ranks = distributed.ranks_per_copy(config.train.shard, world)
    with torch.device("meta") if ranks > 1 else contextlib.nullcontext():
        torch.manual_seed(config.train.seed)
        model = GPT(config.model, compute_dtype=machine.dtype,
                    activation_checkpointing=config.train.activation_checkpointing)
        if config.lora.rank:
            torch.manual_seed(config.train.seed)
            lora.add_adapters(model, config.lora)
    if ranks > 1:
        if machine.compiles:
            for block in model.blocks:
                block.compile(dynamic=False)
        distributed.shard(model, ranks, machine.device, world)
    progress = Progress(scale=LossScale.for_dtype(machine.dtype), guard=SpikeGuard(config.train.skip_spikes))
    with distributed.raise_on_all_ranks(world):
        tensors = _starting_weights(start, config, parent, is_needed=world.is_main or ranks > 1)
        if config.lora.rank and world.is_main and not isinstance(start, Resume):
            progress.base_sha256 = save_base(Path(config.train.out_dir), tensors)
        torch.manual_seed(config.train.seed)
        if tensors:
            for name, value in lora.initial_adapters(model):
                tensors[name] = value
            checkpoint.load_into(model, tensors, start.path)
        elif ranks > 1:
            for name, value in model.initial_weights():
                checkpoint.fill({name: model.get_parameter(name)}, {name: value})
        model = model.to(machine.device)
        # Muon's products may be rough, but in a float32 run a rounding to bfloat16 would turn last bits into steps.
        rough = devices.computes_bfloat16(machine.device) and machine.dtype != torch.float32
        optimizer = Optimizer(model, config.optim, newton_schulz_dtype=torch.bfloat16 if rough else torch.float32,
                              world=world)
        if isinstance(start, Fork | Resume):
            _go_on(start, config, parent, model, optimizer, progress)
    return model, optimizer, progress


def _starting_weights(start: Start, config: Config, parent: Parent | None, *,
                      is_needed: bool) -> dict[str, Tensor] | SavedTensors:
    """The tensors that the model starts with, for adapters their base; none for fresh weights, and none of init_from if
    they are not needed: rank 0 gives its own to the others (distributed.wrap), unless each holds a share."""
    if isinstance(start, Fresh) or (isinstance(start, Init) and not is_needed):
        return {}
    if isinstance(start, Init):
        tensors = parent.weights() if isinstance(parent, HuggingFaceModel) else weights_of(Path(start.path))
    else:
        tensors = (load_base if config.lora.rank else weights_of)(Path(start.path))
    return _cut_positions(tensors, config)


def _go_on(start: Fork | Resume, config: Config, parent: Parent | None, model: GPT, optimizer: Optimizer,
           progress: Progress) -> None:
    """Adapters, moments and counters of the checkpoint, in place."""
    path, is_resume = Path(start.path), isinstance(start, Resume)
    trained = config if is_resume else parent.config  # what made the checkpoint
    state = checkpoint.load_state(path)
    try:
        what = "keep [lora] as it was"
        if config.lora.rank:
            lora.load_adapters(model, checkpoint.load_tensors(path, ADAPTER))
        what = "keep optim.name as it was"
        checkpoint.fill(optimizer.state_tensors(), _cut_positions(checkpoint.open_tensors(path, "optimizer"), config))
        optimizer.updates = state["updates"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {start.path!r}: {error}; {what}") from None
    progress.step = state["step"]
    progress.tokens = state.get("tokens", state["step"] * trained.train.tokens_per_step)  # older ones lack it
    if is_resume:
        progress.skips_in_a_row = state["skips_in_a_row"]
        progress.val_due, progress.base_sha256 = state["val_due"], state.get("base_sha256")
        progress.micro_batch, progress.kernels = state.get("micro_batch"), state.get("kernels")
        progress.guard = replace(progress.guard, **state.get("spikes", {}) | {"deviations": progress.guard.deviations})
    if progress.scale.dynamic and trained.train.dtype == "float16":
        progress.scale.scale, progress.scale.good_steps = state["loss_scale"]


def _cut_positions(tensors: dict[str, Tensor] | SavedTensors, config: Config) -> dict[str, Tensor] | SavedTensors:
    """tensors with the tables of learned positions, and their moments, cut to a smaller max_seq_len."""
    for name in [name for name in tensors if name.endswith("wpe.weight")]:
        tensors[name] = tensors[name][:config.model.max_seq_len]
    return tensors


def describe(start: Start, config: Config) -> str:
    """Where the weights come from, and what is to be known of the schedule, as a line for the log."""
    what = {Fresh: "new weights from train.seed", Init: f"weights of {start.path}, at step {start.step}",
            Fork: f"everything of {start.path}, at step {start.step}",
            Resume: f"going on from step {start.step} ({start.path})"}[type(start)]
    return f"start: {what}" + (f"; optim.schedule ends at step {config.optim.decay_steps}, the steps after it are made "
                               f"at optim.min_lr = {config.optim.min_lr:g}" if _ends_early(config) else "")
