"""Every knob of a run: what it is, its unit, its default, its checks.

A run is described by TOML files and `section.key=value` overrides, applied left to right onto the frozen dataclasses
below, one per TOML section. An unknown key, a wrong type or values that do not fit together raise ConfigError before
any work starts. Also here: UserError (a mistake that the user can mend) and `exit_cleanly`, which turns it into one
line on stderr and exit status 2. Needs the standard library only, so `python config.py --help` answers at once.
"""

import dataclasses
import difflib
import json
import math
import operator
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; its text names the thing, the value and the way out. Exit status 2."""


class ConfigError(UserError):
    """A knob that does not exist, has a wrong value, or does not fit the others."""


class MachineError(Exception):
    """The machine failed, not the user: a disk that stayed full, a lost rank. One line, exit status 1."""


def exit_cleanly(main: Callable[[list[str]], None]) -> None:
    """Run main(argv); UserError becomes `error: ...` and exit 2, MachineError and OSError (a disk that failed where
    nothing can go on without it) the same and exit 1, Ctrl-C exit 130.

    Under torchrun rank 0 prints (on other nodes their first rank, if the trouble may be theirs alone), and every worker
    exits with the same status.
    """
    try:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by who started us (`>&-`): the next file would get its number
                setattr(sys, name, open(os.devnull, mode, errors="replace"))
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, MachineError, OSError) as error:
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")
        if rank == "0" or (local_rank == "0" and not getattr(error, "is_everywhere", False)):
            # one line, whatever the names in it spell: a newline, or what a terminal obeys
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
            print(f"error: {text}" if rank == "0" else f"error: rank {rank}: {text}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- The knobs -------------------------------------------------------------------------------------------------------

def knob(default, what: str, *, choices: tuple[str, ...] = (), minimum: float | None = None,
         maximum: float | None = None, above: float | None = None, may_be_inf: bool = False):
    """A dataclass field with its help text and its allowed range (minimum and maximum inclusive, above exclusive)."""
    return field(default=default, metadata={"what": what, "choices": choices, "minimum": minimum, "maximum": maximum,
                                            "above": above, "may_be_inf": may_be_inf})


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies stretch to a longer context than the model was first trained on."""

    kind: str = knob("linear", "linear: positions / factor; llama3: only the low frequencies, as in Llama 3.1",
                     choices=("linear", "llama3"))
    factor: float = knob(1.0, "context is stretched by this factor", minimum=1.0)
    low_freq_factor: float = knob(1.0, "llama3: stretches wavelengths above original_max_seq_len / this", above=0.0)
    high_freq_factor: float = knob(4.0, "llama3: leaves wavelengths below original_max_seq_len / this", above=0.0)
    original_max_seq_len: int = knob(8192, "llama3: tokens of context before stretching", minimum=1)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Defaults are GPT-2 124M's."""

    n_layer: int = knob(12, "blocks", minimum=1, maximum=1000)
    n_head: int = knob(12, "query heads", minimum=1)
    n_kv_head: int | None = knob(None, "key/value heads (grouped-query attention); left out = n_head", minimum=1)
    n_embd: int = knob(768, "width of the residual stream", minimum=1)
    head_dim: int | None = knob(None, "width of one head; left out = n_embd / n_head", minimum=1)
    mlp_hidden: int | None = knob(None, "left out = 4 n_embd, for swiglu 8/3 n_embd, up to a multiple of 64", minimum=1)
    vocab_size: int | None = knob(None, "token ids; left out = the tokenizer's", minimum=2)
    max_seq_len: int = knob(1024, "context, tokens", minimum=1)
    norm: str = knob("layernorm", "normalisation before attention, MLP and head", choices=("layernorm", "rmsnorm"))
    norm_eps: float = knob(1e-5, "added to the variance (layernorm) or mean square (rmsnorm)", above=0.0)
    position: str = knob("learned", "learned: a table of max_seq_len rows; rope: rotary, half-split as Hugging Face",
                         choices=("learned", "rope"))
    rope_theta: float = knob(10000.0, "base of the RoPE frequencies", above=0.0)
    rope_scaling: RopeScaling | None = knob(None, "table {kind, factor, ...} to stretch RoPE; left out = none")
    mlp: str = knob("gelu", "gelu is GPT-2's tanh form, gelu_exact the erf form (nanoGPT's), relu2 is relu(x)^2",
                    choices=("gelu", "gelu_exact", "swiglu", "relu2"))
    qk_norm: bool = knob(False, "RMSNorm over each head of q and k before RoPE (as Qwen3)")
    bias: bool = knob(True, "biases in linear layers and layernorms")
    qkv_bias: bool | None = knob(None, "bias of the q, k, v projection alone (Qwen2 has it); left out = bias")
    mlp_bias: bool | None = knob(None, "bias of the MLP's layers alone (Llama may have it); left out = bias")
    tie_embeddings: bool = knob(True, "the head shares the token embedding's table")
    dropout: float = knob(0.0, "on the embedding and on both residual branches; 0.0 = off", minimum=0.0, maximum=0.99)
    logit_softcap: float = knob(0.0, "logits = cap * tanh(logits / cap); 0.0 = off", minimum=0.0)
    window: int | None = knob(None, "a token sees so many tokens, itself included; left out = all before", minimum=1)
    init: str = knob("gpt2", "gpt2: normal 0.02, residual projections / sqrt(2 n_layer); zero_residual: normal "
                             "1/sqrt(fan_in), residual projections and an untied head start at 0",
                     choices=("gpt2", "zero_residual"))

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def dim_per_head(self) -> int:
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        return 64 * math.ceil(8 * self.n_embd / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.bias if self.mlp_bias is None else self.mlp_bias


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    source: tuple[str, ...] = knob((), "text to train on, prepared first if it is not yet: files (.txt, .jsonl, .gz, "
                                       ".zst, .parquet), folders, globs ('a/*.txt'), python-stdlib; one or a list")
    val_source: tuple[str, ...] = knob((), "validation text, as source; left out = val_fraction of source is set aside")
    dir: str | None = knob(None, "folder of prepared shards; left out = shards/<name>-<hash of the data settings>")
    tokenizer: str | None = knob(None, "bytes, bpe:N (trained on source), gpt2, r50k_base, cl100k_base, o200k_base, a "
                                       "tokenizer.json or a run folder; left out = that of dir or init_from, else gpt2")
    val_fraction: float = knob(0.05, "share of the text set aside for validation; 0.0 = no validation", minimum=0.0,
                                maximum=0.9)
    text_field: str = knob("text", "the field of a .jsonl row or parquet column that holds the text")
    kind: str = knob("auto", "auto: rows with prompt and response, text and label, or messages are examples; text: "
                             "text_field is plain text, whatever else a row has", choices=("auto", "text"))
    chat_template: str | None = knob(None, "Jinja file for messages; left out = that of init_from, else a plain one")
    too_long: str = knob("cut", "rows of examples longer than the context. cut: of a chat whole oldest turns go, then "
                                "the front of the prompt or text, then the end of the response; drop: leave the row "
                                "out; error: refuse", choices=("cut", "drop", "error"))
    bad_rows: str = knob("error", "rows that cannot be used; skip: left out, counted", choices=("error", "skip"))
    parse_special: bool = knob(False, "end-of-text spelled in a text, as <|endoftext|>, ends a document")
    document_mask: bool = knob(False, "tokens see their own document only, opened by end-of-text; positions restart")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; lr is a pure function of the step."""

    name: str = knob("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest", choices=("adamw", "muon"))
    lr: float = knob(6e-4, "peak learning rate of AdamW", above=0.0)
    min_lr: float = knob(0.0, "learning rate at the end of the schedule", minimum=0.0)
    schedule: str = knob("cosine", "after warmup: cosine to min_lr; wsd: hold, then linear to min_lr; constant",
                         choices=("cosine", "wsd", "constant"))
    warmup_steps: int = knob(0, "steps of linear warmup", minimum=0)
    decay_steps: int | None = knob(None, "step that reaches min_lr; left out = max_steps at first start", minimum=1)
    decay_fraction: float = knob(0.2, "wsd: the last share of decay_steps, in which lr falls", above=0.0, maximum=1.0)
    betas: tuple[float, float] = knob((0.9, 0.95), "AdamW's decay rates of the first and second moment")
    eps: float = knob(1e-8, "AdamW's term against division by zero", above=0.0)
    weight_decay: float = knob(0.1, "decoupled, of matrices and embeddings, not norms, biases; 0.0 = off", minimum=0.0)
    grad_clip: float = knob(1.0, "largest global gradient norm; inf = off", above=0.0, may_be_inf=True)
    muon_lr: float = knob(0.02, "peak learning rate of Muon; follows the schedule of lr", above=0.0)
    muon_momentum: float = knob(0.95, "Muon's Nesterov momentum", minimum=0.0, maximum=0.999)


LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685): the weights of init_from stay as they are, only the adapters learn."""

    rank: int = knob(0, "of each adapter's product B A; 0 = off: all weights learn", minimum=0)
    alpha: float = knob(16.0, "the product counts alpha / rank times", above=0.0)
    dropout: float = knob(0.0, "on the adapters' inputs; 0.0 = off", minimum=0.0, maximum=0.99)
    targets: tuple[str, ...] = knob(LORA_TARGETS, "the blocks' linear layers that get one: of attn.qkv, attn.proj, "
                                                  "mlp.fc, mlp.proj")


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    out_dir: str = knob("out/run", "run folder: config.toml, log.txt, metrics.jsonl, tokenizer.json, checkpoints/")
    max_steps: int = knob(1000, "optimizer steps in all", minimum=1)
    tokens_per_step: int = knob(524_288, "global batch in tokens; divides by max_seq_len x ranks", minimum=1)
    micro_batch: int | str = knob("auto", "sequences per forward and backward on one rank; auto = as many as fit "
                                          "into the GPU's memory, by trial, elsewhere up to 4,096 tokens", minimum=1,
                                  choices=("auto",))
    seed: int = knob(1337, "of initialisation, data order and dropout", minimum=0, maximum=2 ** 63 - 1)
    device: str = knob("auto", "auto = cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = knob("auto", "of the matmuls; weights and moments stay float32; auto = bfloat16 where the device "
                              "computes it natively, else float16 on CUDA, else float32",
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = knob("auto", "auto = on CUDA with triton and a C compiler", choices=("auto", "true", "false"))
    tf32: bool = knob(False, "float32 matmuls on CUDA with 10 bits of mantissa instead of 23 (from sm_80): several "
                             "times as fast; Triton's kernels keep 23")
    kernels: str = knob("auto", "fused Triton kernels; auto = on CUDA from compute capability 8.0 those that pass a "
                                "check at the start, on a CPU those of kernels/cpu.py, else PyTorch; triton refuses to "
                                "run without them",
                        choices=("auto", "triton", "torch"))
    activation_checkpointing: bool = knob(False, "recompute blocks in the backward: less memory, a third more work")
    skip_spikes: float = knob(0.0, "leave out steps whose loss or gradient norm is so many robust standard deviations "
                                   "above the median of the last 128; 0.0 = off, OLMo's rule takes 6", minimum=0.0)
    shard: int | str = knob(1, "ranks that together hold one copy of weights, gradients and moments (FSDP2): 1 = each "
                               "its own (DDP), all = one copy over all ranks, between = several copies (HSDP)",
                            minimum=1, choices=("all",))
    init_from: str | None = knob(None, "run folder, checkpoint, Hugging Face folder or one of peft's adapters, whose "
                                       "weights and tokenizer start this run")
    fork_from: str | None = knob(None, "run folder or checkpoint to continue as a new run, with its moments and step")
    eval_every: int = knob(250, "steps between evaluations; 0 = only at the end", minimum=0)
    eval_tokens: int = knob(1_048_576, "validation tokens per evaluation, at most all of them", minimum=1)
    log_every: int = knob(10, "steps between log lines", minimum=1)
    save_every: int = knob(1000, "steps between checkpoints; the last step is always saved", minimum=1)
    async_save: bool = knob(False, "write checkpoints beside the training; takes main memory for a copy of this rank's "
                                   "weights and moments: 12 bytes per parameter with AdamW, divided among shards")
    keep: int = knob(2, "newest checkpoints kept, beside the best; those of skipped steps count for none", minimum=1)
    sample_every: int = knob(0, "steps between printed samples; 0 = only at the end", minimum=0)
    tracker: str = knob("none", "also send metrics to", choices=("none", "tensorboard", "wandb"))
    deterministic: bool = knob(False, "bitwise repeatable on CUDA too, somewhat slower")
    timeout_s: float = knob(600.0, "seconds a rank waits for another (for a save, say) before the run ends", above=0.0)
    profile_steps: tuple[int, ...] = knob((), "steps to trace into RUN/profile, as a list")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


# ---- Reading: files and overrides -> Config --------------------------------------------------------------------------

OVERRIDE = re.compile(r"[\w.-]+=")  # a path with = in it has a / before


def parse_arguments(arguments: list[str], default_file: Path | None = None) -> tuple[Config, set[str]]:
    """Config from FILE.toml and section.key=value words, left to right, and the names of the knobs they set.

    Without a file, default_file is read first. Raises ConfigError.
    """
    if default_file is not None and all(OVERRIDE.match(word) for word in arguments):
        arguments = [str(default_file), *arguments]
    config, given = Config(), set()
    for word in arguments:
        table = _override_table(word) if OVERRIDE.match(word) else _file_table(word)
        given |= {f"{section}.{name}" for section, values in table.items() for name in values}
        config = apply_table(config, table)
    check(config)
    return config, given


def load_run_config(run_dir: Path) -> Config:
    """RUN/config.toml. Raises ConfigError if it is not there or not whole: an empty file would read as all defaults."""
    path = Path(run_dir) / "config.toml"
    table = _file_table(str(path))
    if missing := [f"[{name}]" for name in ("model", "data", "optim", "train") if name not in table]:
        raise ConfigError(f"config file {str(path)!r} is damaged: it lacks {', '.join(missing)}; put a copy of it back")
    config = apply_table(Config(), table)
    check(config)
    return config


def _file_table(word: str) -> dict:
    path = Path(word)
    if not word.endswith(".toml"):
        raise ConfigError(f"argument {word!r} is neither a FILE.toml nor section.key=value; --help lists every knob")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        way_out = f"did you mean {near[0]!r}?" if near else "configs/ holds examples"
        raise ConfigError(f"config file {word!r} does not exist; {way_out}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, or an integer too long
        raise ConfigError(f"config file {word!r} is not valid TOML: {error}; text stands in quotes, and "
                          "switches are true or false") from None
    except OSError as error:
        raise ConfigError(f"config file {word!r} cannot be read: {error.strerror}") from None
    for section, values in table.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{word}: key {section!r} stands outside a section; put it under [model], [data], "
                              "[optim], [train] or [lora]")
    return table


def _override_table(word: str) -> dict:
    name, _, text = word.partition("=")
    section, dot, key = name.lstrip("-").partition(".")
    if not dot or not key:
        found = [section for section, values in vars(Config()).items() if name.lstrip("-") in vars(values)]
        hint = f"write {found[0]}.{name.lstrip('-')}={text}" if found else "write section.key=value"
        raise ConfigError(f"override {word!r} names no section; {hint}")
    try:
        table = tomllib.loads(f"value = {text}")
        value = table["value"] if len(table) == 1 else text  # a newline must not begin another knob, unread
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text, text)  # unquoted, such as data.source=book.txt
    kind = typing.get_type_hints(typing.get_type_hints(Config).get(section, Config)).get(key)
    if value is not None and not isinstance(value, str | list) and kind in (str, str | None, tuple[str, ...]):
        value = text  # train.out_dir=2024 and data.source=2024-05-01 are strings too
    *tables, key = key.split(".")
    for name in reversed(tables):  # model.rope_scaling.factor=2
        key, value = name, {key: value}
    return {section: {key: value}}


def apply_table(config: Config, table: dict) -> Config:
    """config with the values of {section: {key: value}} put in. Raises ConfigError naming section and key."""
    sections = typing.get_type_hints(Config)
    for section, values in table.items():
        if section not in sections:
            raise ConfigError(f"section [{section}] does not exist{_did_you_mean(section, list(sections))}")
        config = replace(config, **{section: _apply_values(getattr(config, section), section, values)})
    return config


def _apply_values(current, path: str, values: dict):
    hints, limits = typing.get_type_hints(type(current)), {f.name: f.metadata for f in fields(current)}
    changes = {}
    for key, value in values.items():
        name = f"{path}.{key}"
        if key not in limits:
            raise ConfigError(f"{name} is not a knob{_did_you_mean(key, list(limits))}")
        changes[key] = _convert(name, hints[key], value, getattr(current, key))
        _check_range(name, changes[key], limits[key])
    return replace(current, **changes)


def _did_you_mean(word: str, names: list[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(names)}"


def _convert(name: str, kind: object, value: object, current: object = None):
    """value as the knob's type, or ConfigError. An integer may be written 1e6, a list of one without brackets; a table
    changes what it names of the current one."""
    if value is None and isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind):
        return None  # model.window=None: left out
    if kind == int | str:  # a number, or one of the knob's words
        kind = str if isinstance(value, str) else int
    kind, is_number = _without_none(kind), isinstance(value, int | float) and not isinstance(value, bool)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _apply_values(current or kind(), name, value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str | bool):
        text = str(value).lower() if isinstance(value, bool) else value
        if text == "":
            raise ConfigError(f"{name} is empty; give it a value or leave it out")
        if any(c == "\0" or 0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise ConfigError(f"{name} = {_shown(text)} is not UTF-8, or holds a NUL; rename the file or folder")
        return os.path.expanduser(text) if "/" in text else text  # the shell leaves a ~ after = alone
    if kind is int and is_number and abs(value) <= sys.float_info.max and value == int(value):
        return int(value)
    if kind is float and is_number and (abs(value) <= sys.float_info.max or value in (math.inf, -math.inf)):
        return float(value)
    if typing.get_origin(kind) is tuple:
        items, inner = value if isinstance(value, list | tuple) else [value], typing.get_args(kind)
        if inner[-1] is Ellipsis or len(items) == len(inner):
            return tuple(_convert(name, inner[0], item) for item in items)
    raise ConfigError(f"{name} = {_shown(value)} should be {_type_name(kind)}")


def _shown(value: object) -> str:
    """A value as a message has room for it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, tables in tables
        text = f"{type(value).__name__} too long to be shown"
    return text if len(text) <= 200 else text[:197] + "..."


def _without_none(kind: object) -> object:
    """int of int | None"""
    return next(k for k in typing.get_args(kind) if k is not type(None)) if isinstance(kind, types.UnionType) else kind


def _type_name(kind: object) -> str:
    kind = _without_none(kind)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        item = names[inner[0]].split(" ", 1)[1]
        return f"a list of {item}s" if inner[-1] is Ellipsis else f"a list of {len(inner)} {item}s"
    return names.get(kind, "a table")


def _check_range(name: str, value: object, limits: typing.Mapping) -> None:
    if isinstance(value, float) and math.isinf(value) and not limits["may_be_inf"]:
        raise ConfigError(f"{name} = {value} should be finite")
    if limits["choices"] and isinstance(value, str) and value not in limits["choices"]:
        words = "one of" if limits["minimum"] is None else "a whole number or"
        raise ConfigError(f"{name} = {_shown(value)} should be {words} {', '.join(limits['choices'])}")
    for limit, words, is_outside in (("minimum", "at least", operator.lt), ("maximum", "at most", operator.gt),
                                     ("above", "above", operator.le)):
        if limits[limit] is not None and isinstance(value, int | float) and is_outside(value, limits[limit]):
            raise ConfigError(f"{name} = {value} should be {words} {limits[limit]}")
    if isinstance(value, int) and value >= 2 ** 63:
        raise ConfigError(f"{name} = {value} should be below 2^63")


# ---- Checks of values against each other -----------------------------------------------------------------------------

def check(config: Config) -> None:
    """Raise ConfigError if values do not fit together."""
    for conflict in _conflicts(config):
        raise ConfigError(conflict)


def _conflicts(config: Config) -> Iterator[str]:
    model, optim, train, lora = config.model, config.optim, config.train, config.lora
    if model.head_dim is None and model.n_embd % model.n_head:
        yield (f"model.n_embd = {model.n_embd} does not divide by model.n_head = {model.n_head}; change one or set "
               "model.head_dim")
    if model.n_head % model.kv_heads:
        yield f"model.n_head = {model.n_head} does not divide by model.n_kv_head = {model.kv_heads}; change one"
    if model.position == "rope" and model.dim_per_head % 2:
        yield (f"model.position = 'rope' needs an even head_dim, not {model.dim_per_head}; change model.head_dim, "
               "n_embd or n_head")
    scaling = model.rope_scaling
    if scaling is not None and model.position != "rope":
        yield "model.rope_scaling is set but model.position is 'learned'; set model.position = 'rope'"
    if scaling is not None and scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (f"model.rope_scaling.high_freq_factor = {scaling.high_freq_factor} should be above low_freq_factor = "
               f"{scaling.low_freq_factor}")
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr = {optim.min_lr} is above optim.lr = {optim.lr}"
    if not all(0.0 <= beta < 1.0 for beta in optim.betas):
        yield f"optim.betas = {list(optim.betas)} should lie in [0, 1)"
    if optim.schedule != "constant" and optim.decay_steps is not None:  # start.inherit resolves it, and checks again
        decay_start = round(optim.decay_steps * (1 - optim.decay_fraction), 6)  # 0.93 is no exact binary fraction
        if optim.warmup_steps >= optim.decay_steps:
            yield (f"optim.warmup_steps = {optim.warmup_steps} leaves no step before decay ends at "
                   f"{optim.decay_steps}; lower it or raise train.max_steps (optim.decay_steps if set)")
        if optim.schedule == "wsd" and optim.warmup_steps > decay_start:
            yield (f"optim.warmup_steps = {optim.warmup_steps} reaches into the decay, which starts at step "
                   f"{decay_start:.0f}; lower it or optim.decay_fraction")
    if train.init_from is not None and train.fork_from is not None:
        yield ("train.init_from and train.fork_from are both set; init_from takes weights only, fork_from also moments "
               "and step: keep one")
    for step in train.profile_steps:
        if not 1 <= step <= train.max_steps:
            yield f"train.profile_steps names step {step}; steps run from 1 to {train.max_steps}"
    if lora.rank > 0:
        for target in set(lora.targets) - set(LORA_TARGETS):
            yield f"lora.targets names {target!r}; there are {', '.join(LORA_TARGETS)}"
        if not lora.targets:
            yield f"lora.targets is empty; name some of {', '.join(LORA_TARGETS)}, or leave it out"
        if train.init_from is None and train.fork_from is None:
            yield f"lora.rank = {lora.rank} needs weights to adapt; name them with train.init_from"
        if optim.name == "muon":
            yield ("optim.name = 'muon' does not go with lora.rank: it orthogonalises updates of whole matrices, and "
                   "an adapter's A and B are factors of one; use adamw")


# ---- Writing: Config -> TOML that loads back equal; --help -----------------------------------------------------------

def to_toml(config: Config) -> str:
    """The whole config as TOML; a knob that is left out stays left out."""
    lines = []
    for section, values in vars(config).items():
        known = {name: value for name, value in vars(values).items() if value is not None}
        lines += [f"[{section}]", *(f"{name} = {_toml_value(value)}" for name, value in known.items()), ""]
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    if dataclasses.is_dataclass(value):
        return "{" + ", ".join(f"{f.name} = {_toml_value(getattr(value, f.name))}" for f in fields(value)) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def differences(ours: object, theirs: object, prefix: str) -> list[str]:
    """Lines 'section.key: theirs -> ours' for each knob in which two sections differ."""
    return [f"{prefix}.{name}: {getattr(theirs, name)} -> {value}" for name, value in vars(ours).items()
            if value != getattr(theirs, name)]


def help_text() -> str:
    """Every knob with its type, default and meaning."""
    lines = ["usage: python train.py [FILE.toml ...] [section.key=value ...]",
             "       torchrun --standalone --nproc_per_node=N train.py ...", "",
             "Files and overrides apply left to right; without a file configs/demo.toml is read.", ""]
    for section, kind in typing.get_type_hints(Config).items():
        lines.append(f"[{section}] {kind.__doc__}")
        hints = typing.get_type_hints(kind)
        for f in fields(kind):
            lines.append(_help_line(f, hints[f.name]))
            lines += [_help_line(inner, typing.get_type_hints(RopeScaling)[inner.name], indent=6)
                      for inner in fields(RopeScaling) if f.name == "rope_scaling"]
        lines.append("")
    return "\n".join(lines)


def _help_line(f: dataclasses.Field, kind: object, indent: int = 2) -> str:
    default = "left out" if f.default is None else _toml_value(f.default)
    type_or_choices = "|".join(f.metadata["choices"]) or _type_name(kind)
    return f"{' ' * indent}{f.name} = {default}  ({type_or_choices})\n{' ' * indent}    {f.metadata['what']}"


def main(argv: list[str]) -> None:
    print(help_text() if {"-h", "--help"} & set(argv) else to_toml(parse_arguments(argv)[0]))


if __name__ == "__main__":
    exit_cleanly(main)
