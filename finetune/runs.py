"""A saved run, read: config, tokenizer, chat template and weights, adapters merged. The one way from RUN to a model.

A checkpoint of a run with adapters (lora.py) holds adapter_model.safetensors and adapter_config.json instead of the
model; what they are added to is kept once, in RUN/base/model.safetensors, and state.json has its sha256.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

import checkpoint
import files
from checkpoint import CheckpointError
from config import Config, ConfigError, LoraConfig, ModelConfig, differences, load_run_config
from data.chat import load_template, read_template
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from finetune import lora
from model import GPT

ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config"


@dataclass(frozen=True)
class SavedRun:
    """What a run folder says."""

    dir: Path
    config: Config
    tokenizer: Tokenizer
    chat_template: str | None  # None: neither it nor what it started from was trained on conversations
    checkpoint: Path | None  # None: none was chosen

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def weights(self) -> dict[str, Tensor]:
        """The chosen checkpoint's model on the CPU, adapters merged. Raises CheckpointError."""
        return weights_of(self.checkpoint)


def read_folder(run_dir: Path) -> SavedRun:
    """A run folder without its checkpoints. Raises ConfigError, TokenizerError, ChatError."""
    return SavedRun(run_dir, load_run_config(run_dir), load_tokenizer(str(run_dir / TOKENIZER_FILE)),
                    load_template(run_dir), None)


def read_run(run: str | Path, note: Callable[[str], None]) -> SavedRun:
    """RUN, a run folder (its newest valid checkpoint) or one checkpoint inside it, verified but for the moments. note
    receives lines for the user. Raises CheckpointError, ConfigError, TokenizerError, ChatError."""
    chosen = checkpoint.resolve(run, note, weights_only=True)
    read = read_folder(checkpoint.run_dir_of(chosen))
    return SavedRun(read.dir, read.config, read.tokenizer, read.chat_template, chosen)


def weights_of(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, on the CPU; adapters are merged in float32. Raises CheckpointError."""
    if not checkpoint.holds(path, ADAPTER):
        return checkpoint.load_tensors(path, "model")
    base, adapters = load_base(path), checkpoint.load_tensors(path, ADAPTER)
    try:
        return lora.merge(base, adapters, checkpoint.load_state(path, ADAPTER_CONFIG))
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"adapters in {str(path)!r} do not fit their base: {error}; use another checkpoint"
                              ) from None


def files_to_save(model: GPT, lora_config: LoraConfig) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
    """What checkpoint.save writes of a model: tensors and texts by their names."""
    if lora_config.rank == 0:
        return {"model": model.state_dict()}, {}
    return {ADAPTER: lora.peft_tensors(model)}, {ADAPTER_CONFIG: lora.peft_config(model.config, lora_config)}


def save_base(run_dir: Path, tensors: dict[str, Tensor]) -> str:
    """Write RUN/base/model.safetensors, what adapters are added to, whole and durably; its sha256. Raises SaveError."""
    path = Path(run_dir) / "base" / "model.safetensors"
    with files.disk_errors(path):
        if not path.parent.is_dir():
            files.make_folder(path.parent)
            files.sync(path.parent.parent)
    checkpoint.write_tensor_file(path, tensors)
    return files.sha256(path)


def load_base(path: Path) -> dict[str, Tensor]:
    """What the adapters of a checkpoint are added to. Raises CheckpointError if it has none, or not the base that they
    were trained on."""
    if not checkpoint.holds(path, ADAPTER):
        raise CheckpointError(f"checkpoint {str(path)!r} holds no adapters to go on with; use train.init_from to start "
                              "adapters on it")
    base = checkpoint.run_dir_of(path) / "base"
    try:
        found = files.sha256(base / "model.safetensors")
    except OSError as error:
        raise CheckpointError(f"'{base / 'model.safetensors'}', which the adapters in {str(path)!r} belong to, cannot "
                              f"be read: {error.strerror}; copy the run folder as a whole") from None
    if found != checkpoint.load_state(path).get("base_sha256"):
        raise CheckpointError(f"'{base / 'model.safetensors'}' is not what the adapters in {str(path)!r} were trained "
                              f"on (sha256 {found[:16]}...); put the run's own base back")
    return checkpoint.load_tensors(base, "model")


# ---- What a run takes over from the one it starts from ---------------------------------------------------------------

def kept_template(config: Config, data_dir: Path, parent) -> str | None:
    """The chat template of a run: that of the chats it learns from, else the one named, else the parent's, whose chats
    it may still know. parent: as for take_over, or None. Raises ChatError."""
    template = load_template(data_dir)
    if template is None and config.data.chat_template is not None:
        template = read_template(config.data.chat_template)
    return parent.chat_template if template is None and parent is not None else template


def take_over(config: Config, given: set[str], parent) -> Config:
    """config with the parent's [model] and tokenizer, of a fork also its [lora]. given: the knobs that the user named;
    parent: a SavedRun or convert.HuggingFaceModel. Raises ConfigError for what cannot be given beside it."""
    model, data = parent.model, config.data
    for key in sorted(name.removeprefix("model.") for name in given if name.startswith("model.")):
        value, theirs = getattr(config.model, key), getattr(parent.model, key)
        if key == "dropout" or (key == "max_seq_len" and value <= theirs):
            model = replace(model, **{key: value})
        elif value != theirs:
            raise ConfigError(f"model.{key} = {value} but the run it starts from has {theirs}; of [model] only dropout "
                              "and a smaller max_seq_len may be given beside init_from and fork_from")
    if data.tokenizer is None and (parent.dir / TOKENIZER_FILE).exists():
        data = replace(data, tokenizer=str(parent.dir / TOKENIZER_FILE))  # the file: a run may be called gpt2
    if config.train.fork_from is not None:  # its moments are those of its adapters
        changes = [line for line in differences(config.lora, parent.config.lora, "lora")
                   if line.partition(":")[0] in given]
        if changes:
            raise ConfigError(f"train.fork_from takes the moments of {config.train.fork_from!r} and with them its "
                              f"adapters: [lora] cannot change ({'; '.join(changes)}); leave it out, or use "
                              "train.init_from")
        config = replace(config, lora=parent.config.lora)
    return replace(config, model=model, data=data)
