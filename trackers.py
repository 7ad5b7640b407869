"""Where a run's figures go beside its own files: tensorboard or wandb, each imported where it is used."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import files
from cli import require


def check(name: str) -> None:
    """Raise UserError if the tracker's package is not installed; cheap, so every rank can ask before any work."""
    if name != "none":
        require(f"train.tracker = '{name}'", name)


def start(name: str, run_dir: Path, resume_step: int, config: dict | None) -> tuple[Callable, Callable] | None:
    """The tracker's log(figures, step=) and close(); None for "none"."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        # purge_step hides the events that a crashed run wrote after the checkpoint; tensorboard drops those >= it.
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0)

        def log(figures: dict[str, float], step: int) -> None:
            for name, figure in figures.items():
                writer.add_scalar(name, figure, step)
        return log, writer.close
    if name == "wandb":  # its id is kept in RUN/wandb_id, so that a resumed run continues it, offline as well
        import wandb
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            files.write_whole(id_file, secrets.token_hex(6))
        # wandb ignores rows at steps that it has: the steps between checkpoint and crash keep their first values
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", "flatgpt"), name=run_dir.resolve().name,
                         id=id_file.read_text().strip(), resume="allow", dir=str(run_dir), config=config)
        return run.log, run.finish
    return None
