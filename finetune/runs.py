"""A saved run, read: config, tokenizer, chat template and weights, adapters merged. The one way from RUN to a model.

A checkpoint of a run with adapters (lora.py) holds adapter_model.safetensors and adapter_config.json instead of the
model; what they are added to is kept once, in RUN/base/model.safetensors, and state.json has its sha256.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import checkpoint
import files
from checkpoint import CheckpointError
from config import Config, LoraConfig, ModelConfig, load_run_config
from data.chat import load_template
from data.tokenizer import Tokenizer, load_tokenizer
from finetune import lora
from model import GPT

ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config"


@dataclass(frozen=True)
class SavedRun:
    """What a run folder says."""

    dir: Path
    config: Config
    tokenizer: Tokenizer
    chat_template: str | None  # None: it was not trained on conversations
    checkpoint: Path | None  # None: none was chosen

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def weights(self) -> dict[str, Tensor]:
        """The chosen checkpoint's model on the CPU, adapters merged. Raises CheckpointError."""
        return weights_of(self.checkpoint)


def read_folder(run_dir: Path) -> SavedRun:
    """A run folder without its checkpoints. Raises ConfigError, TokenizerError, ChatError."""
    return SavedRun(run_dir, load_run_config(run_dir), load_tokenizer(str(run_dir)), load_template(run_dir), None)


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
        return lora.merge(base, adapters, checkpoint.load_text(path, ADAPTER_CONFIG))
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
