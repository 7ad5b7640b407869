"""A saved run, read: config, tokenizer, chat template and weights, adapters merged. The one way from RUN to a model.

A checkpoint of a run with adapters (lora.py) holds adapter_model.safetensors and adapter_config.json instead of the
model; what they are added to is kept once, in RUN/base/model.safetensors, and state.json has its sha256. A run that
comes from a Hugging Face model keeps its generation_config.json, for exports and for the tokens that end its texts.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from torch import Tensor

import checkpoint
import files
from checkpoint import CheckpointError
from config import Config, ConfigError, LoraConfig, ModelConfig, differences, load_run_config
from data.chat import load_template, read_template, turn_end
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from finetune import lora
from model import GPT
from tensor_files import SavedTensors

ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class SavedRun:
    """What a run folder says."""

    dir: Path
    config: Config
    tokenizer: Tokenizer
    chat_template: str | None  # None: neither it nor what it started from was trained on conversations
    checkpoint: Path | None  # None: none was chosen
    generation: dict  # RUN/generation_config.json; empty if there is none

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def tokenizer_dir(self) -> Path:
        return self.dir

    @property
    def end_ids(self) -> frozenset[int]:
        return end_ids(self.tokenizer, self.chat_template, self.generation)

    def weights(self) -> dict[str, Tensor] | SavedTensors:
        """The chosen checkpoint's model on the CPU, adapters merged. Raises CheckpointError."""
        return weights_of(self.checkpoint)


def end_ids(tokenizer: Tokenizer, chat_template: str | None, generation: dict) -> frozenset[int]:
    """The tokens that end what a model writes: end-of-text, what the chat template puts behind the assistant's turns,
    and those that the model it comes from names."""
    ends = {tokenizer.eot, *listed_ends(generation)}
    return frozenset(ends if chat_template is None else ends | {turn_end(tokenizer, chat_template)})


def read_folder(run_dir: Path) -> SavedRun:
    """A run folder without its checkpoints. Raises ConfigError, TokenizerError, ChatError."""
    return SavedRun(run_dir, load_run_config(run_dir), load_tokenizer(str(run_dir / TOKENIZER_FILE)),
                    load_template(run_dir), None, load_generation(run_dir))


def load_generation(folder: Path) -> dict:
    """generation_config.json of a run or of a Hugging Face folder; empty if there is none. Raises ConfigError."""
    path = folder / GENERATION_FILE
    try:
        table = files.parse_json(path.read_bytes()) if path.exists() else {}
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}, not a table")
        listed_ends(table)
        table.pop("_from_model_config", None)  # under which older transformers go by config.json instead
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}; copy it again") from None
    return table


def save_generation(folder: Path, table: dict) -> None:
    """Write FOLDER/generation_config.json, whole or not at all; none for an empty table."""
    if table:
        files.write_whole(folder / GENERATION_FILE, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def listed_ends(table: dict) -> list[int]:
    """The ids that generation_config.json or config.json says end a text. Raises ValueError."""
    value = table.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise ValueError(f"eos_token_id = {value!r} should be an id or a list of ids")
    return ids


def read_run(run: str | Path, note: Callable[[str], None]) -> SavedRun:
    """RUN, a run folder (its newest valid checkpoint) or one checkpoint inside it, verified but for the moments. note
    receives lines for the user. Raises CheckpointError, ConfigError, TokenizerError, ChatError."""
    chosen = checkpoint.resolve(run, note, unread=checkpoint.WEIGHTS_ONLY)
    return replace(read_folder(run_dir_of(chosen)), checkpoint=chosen)


def run_dir_of(path: Path) -> Path:
    """RUN of RUN/checkpoints/step_N, each of which may be a link: the place is the one that was named, not where the
    bytes lie. Raises CheckpointError for a checkpoint without its run."""
    places = [Path(os.path.abspath(path)), Path(path).resolve()]
    for place in places:
        if (place.parent.parent / "config.toml").exists():
            return place.parent.parent
        links = [part for part in (place, place.parent) if part.is_symlink()]
        places += [Path(os.path.abspath(link.parent / os.readlink(link) / place.relative_to(link))) for link in links]
    raise CheckpointError(f"checkpoint {str(path)!r} lies in no run folder: config.toml and tokenizer.json are not in "
                          f"{str(places[0].parent.parent)!r}; copy the run folder as a whole, or put this folder into "
                          "RUN/checkpoints of a copy, and name that")


def weights_of(path: Path) -> dict[str, Tensor] | SavedTensors:
    """The model's tensors in a checkpoint, on the CPU, each read when it is asked for; adapters are merged in float32.
    Raises CheckpointError."""
    if not checkpoint.holds(path, ADAPTER):
        return checkpoint.open_tensors(path, "model")
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


def save_base(run_dir: Path, tensors: dict[str, Tensor] | SavedTensors) -> str:
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
    base = run_dir_of(path) / "base"
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

def kept_template(config: Config, data_dir: Path | None, parent) -> str | None:
    """The chat template of a run: that of the chats it learns from, else the one named, else the parent's, whose chats
    it may still know. data_dir: None before they are prepared; parent: as for take_over, or None. Raises ChatError."""
    template = None if data_dir is None else load_template(data_dir)
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
    tokenizer = parent.tokenizer_dir / TOKENIZER_FILE
    if data.tokenizer is None and data.dir is None and not tokenizer.exists():  # GPT-2's older files
        raise ConfigError(f"train.init_from = {str(parent.dir)!r} has no {TOKENIZER_FILE} to prepare text with; "
                          f"convert it first: python convert.py from-hf {quote(str(parent.dir))} RUN, then "
                          "train.init_from=RUN")
    if data.tokenizer is None and tokenizer.exists():
        data = replace(data, tokenizer=str(tokenizer))  # the file: a run may be called gpt2
    if config.train.fork_from is not None:  # its moments are those of its adapters
        changes = [line for line in differences(config.lora, parent.config.lora, "lora")
                   if line.partition(":")[0] in given]
        if changes:
            raise ConfigError(f"train.fork_from takes the moments of {config.train.fork_from!r} and with them its "
                              f"adapters: [lora] cannot change ({'; '.join(changes)}); leave it out, or use "
                              "train.init_from")
        config = replace(config, lora=parent.config.lora)
    return replace(config, model=model, data=data)


# ---- One run per folder ----------------------------------------------------------------------------------------------

@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds RUN/.lock while a run writes to its folder, so that a second run there is refused. Raises CheckpointError,
    also if the folder cannot be written."""
    with ExitStack() as stack:
        try:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(Path(run_dir) / ".lock"))
        except files.Locked as holder:
            raise CheckpointError(f"run folder {str(run_dir)!r} is in use by {holder}; stop that run or choose another "
                                  "train.out_dir") from None
        except OSError as error:
            raise CheckpointError(f"run folder {str(run_dir)!r} cannot be written: {error.strerror}; choose another "
                                  "train.out_dir") from None
        yield
