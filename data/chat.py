"""Chat templates: Jinja2 text in Hugging Face's convention, kept as chat_template.jinja in a run or model folder."""

from pathlib import Path

TEMPLATE_FILE = "chat_template.jinja"


def load_template(folder: Path) -> str | None:
    """The chat template of a run folder, None if it has none."""
    path = Path(folder) / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.exists() else None


def save_template(folder: Path, template: str) -> None:
    """Write the chat template into a folder."""
    (Path(folder) / TEMPLATE_FILE).write_text(template, encoding="utf-8")
