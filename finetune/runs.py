"""A saved run, read: its config, tokenizer, chat template and merged weights. The one way from RUN to a model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import checkpoint
from config import Config, load_config
from data.chat import load_template
from data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class SavedRun:
    """What a run folder and one checkpoint in it say. Weights are read when they are asked for."""

    dir: Path
    checkpoint: Path
    config: Config
    tokenizer: Tokenizer
    chat_template: str | None  # None: it was not trained on conversations

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors on the CPU, adapters merged. Raises CheckpointError."""
        return checkpoint.load_tensors(self.checkpoint, "model")


def read_run(run: str | Path, note: Callable[[str], None]) -> SavedRun:
    """RUN, a run folder (its newest valid checkpoint) or one checkpoint inside it. Only the files that hold its weights
    are verified. note receives lines for the user. Raises CheckpointError, ConfigError, TokenizerError."""
    chosen = checkpoint.resolve(run, note)
    folder = checkpoint.run_dir_of(chosen)
    return SavedRun(folder, chosen, load_config(folder / "config.toml"), load_tokenizer(str(folder)),
                    load_template(folder))
