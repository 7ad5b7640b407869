"""Hugging Face model folders <-> run folders, for the models that both sides compute alike; without transformers.

    python convert.py from-hf HF_DIR RUN        python convert.py to-hf RUN HF_DIR

Families: GPT-2, Llama (2 and 3), Qwen2 and Qwen3 (docs/CONVERT.md has the switches). Weights are read from safetensors
alone, one tensor at a time, and widened to float32, which is exact; what is written is the same numbers. A folder is
written under another name and renamed when it is whole. What maps to no family is refused with the switch's name.

Dims: C width, D head dim, V vocabulary (rows without padding).
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import checkpoint
import cli
import config as configuration
import files
from config import Config, ConfigError, MachineError, ModelConfig, TrainConfig, UserError, exit_cleanly
from data.chat import load_template, save_template
from data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, from_vocab_and_merges, load_tokenizer
from finetune import lora
from finetune.runs import read_run
from model import GPT, padded_vocab_size

FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}
# config.json's keys and what [model] calls them, for both directions; of two for the same the last one counts
GPT2_KEYS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_inner": "mlp_hidden",
             "vocab_size": "vocab_size", "n_ctx": "max_seq_len", "n_positions": "max_seq_len",
             "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings"}
LLAMA_KEYS = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
              "hidden_size": "n_embd", "head_dim": "head_dim", "intermediate_size": "mlp_hidden",
              "vocab_size": "vocab_size", "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
              "tie_word_embeddings": "tie_embeddings"}
OPTIONAL_KEYS = ("n_inner", "n_positions", "num_key_value_heads", "head_dim")
# transformers' values of keys that config.json leaves out
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                  "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
                                  "max_window_layers": 28}
DEFAULTS = {"gpt2": {"n_ctx": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                     "activation_function": "gelu_new"},
            "llama": LLAMA_DEFAULTS, "qwen2": QWEN_DEFAULTS, "qwen3": QWEN_DEFAULTS | {"head_dim": 128}}
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu2": "relu2"}
DEFAULT_CONTEXT = 8192  # of a RoPE model that knows more: a run's windows, caches and tables are that long
WEIGHTS_FILE = "model.safetensors"
WEIGHT_DTYPES = ("F32", "BF16", "F16")  # those that float32 holds exactly
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
IS_A_PICKLE = ("is a pickle, which could execute code, and is never loaded; docs/CONVERT.md shows how to turn it into "
               "safetensors where it was made")
# Buffers that old transformers saved: causal masks and RoPE's frequencies. They follow from the config.
BUFFER = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)$")
OURS = "flatgpt"  # key of config.json under which to-hf notes switches that the family cannot express


class ConvertError(UserError):
    """A folder that cannot be converted: unknown architecture, tensors that do not fit, no family, or no room."""


# ----------------------------------------------------------------------------------------------------------------------
# Names and shapes: one list for both directions

@dataclass(frozen=True)
class Rule:
    """One tensor of ours and those of theirs whose rows it holds one after the other."""

    ours: str
    theirs: dict[str, int]  # name -> rows, as ours counts them (outputs)
    shape: tuple[int, ...]  # of ours, padding included
    transposed: bool = False  # GPT-2's Conv1D holds (in, out)

    def split(self, ours: Tensor) -> dict[str, Tensor]:
        """Theirs of ours, views of it; the padding belongs to none."""
        parts = ours[:sum(self.theirs.values())].split(list(self.theirs.values()))
        return {name: part.T if self.transposed else part for name, part in zip(self.theirs, parts, strict=True)}


def rules(config: ModelConfig, family: str) -> Iterator[Rule]:
    """Every tensor of the model, the table of tokens first. config: one that the family can have (family_config)."""
    C, V, D, hidden, is_gpt2 = config.n_embd, config.vocab_size, config.dim_per_head, config.mlp_width, family == "gpt2"
    queries, keys = config.n_head * D, config.kv_heads * D
    blocks, modules = lora.FAMILIES["gpt2" if is_gpt2 else "llama"]  # Qwen2 and Qwen3 share Llama's names
    base, table, attn_norm, mlp_norm, final_norm = ("transformer", "wte", "ln_1", "ln_2", "ln_f") if is_gpt2 else (
        "model", "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")

    def norm(ours: str, theirs: str) -> Iterator[Rule]:
        for kind in ("weight", "bias") if config.norm == "layernorm" else ("weight",):
            yield Rule(f"{ours}.{kind}", {f"{theirs}.{kind}": C}, (C,))

    yield Rule("wte.weight", {f"{base}.{table}.weight": V}, (padded_vocab_size(V), C))
    if is_gpt2:
        yield Rule("wpe.weight", {f"{base}.wpe.weight": config.max_seq_len}, (config.max_seq_len, C))
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"{blocks}{layer}"
        yield from norm(f"{ours}.attn_norm", f"{theirs}.{attn_norm}")
        yield from norm(f"{ours}.mlp_norm", f"{theirs}.{mlp_norm}")
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield Rule(f"{ours}.attn.{name}.weight", {f"{theirs}.self_attn.{name}.weight": D}, (D,))
        for name, rows, columns, has_bias in (
                ("attn.qkv", [3 * C] if is_gpt2 else [queries, keys, keys], C, config.has_qkv_bias),
                ("attn.proj", [C], queries, config.bias),
                ("mlp.fc", [hidden] * len(modules["mlp.fc"]), C, config.has_mlp_bias),
                ("mlp.proj", [C], hidden, config.has_mlp_bias)):
            for kind, shape in (("weight", (sum(rows), columns)), ("bias", (sum(rows),)))[:1 + has_bias]:
                parts = {f"{theirs}.{module}.{kind}": n for module, n in zip(modules[name], rows, strict=True)}
                yield Rule(f"{ours}.{name}.{kind}", parts, shape, transposed=is_gpt2 and kind == "weight")
    yield from norm("final_norm", f"{base}.{final_norm}")
    if not config.tie_embeddings:
        yield Rule("lm_head.weight", {"lm_head.weight": V}, (padded_vocab_size(V), C))


def _misfits(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """What is wrong with the names and shapes of tensors, as text; empty if nothing is."""
    lists = {"missing": [name for name in expected if name not in found],
             "unknown": [name for name in found if name not in expected],
             "of another shape": [f"{name} {found[name]} for {shape}" for name, shape in expected.items()
                                  if name in found and found[name] != shape]}
    return "; ".join(f"{what} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                     for what, names in lists.items() if names)


# ----------------------------------------------------------------------------------------------------------------------
# config.json -> ModelConfig

@dataclass(frozen=True)
class ConfigFile:
    """config.json. A key whose value is null counts as left out; what is left out has transformers' value."""

    path: str
    family: str
    table: dict

    def need(self, key: str) -> object:
        if key not in self.table:
            raise ConvertError(f"{self.path!r} has no {key!r}; copy it again")
        return self.table[key]

    def only(self, key: str, *allowed: object) -> None:
        """Raise ConvertError if a key has a value under which the model would compute something else than ours."""
        if key in self.table and self.table[key] not in allowed:
            raise ConvertError(f"{self.path!r}: {key} = {self.table[key]!r} cannot be converted, only "
                               f"{' or '.join(repr(value) for value in allowed)}")


def read_config(folder: Path) -> ConfigFile:
    """config.json of a Hugging Face folder. Raises ConvertError, with the way out, for all else that may be there."""
    path = folder / "config.json"
    if folder.is_file() and folder.suffix in PICKLES:
        raise ConvertError(f"{str(folder)!r} {IS_A_PICKLE}")
    if not folder.is_dir():
        raise ConvertError(f"model folder {str(folder)!r} does not exist; name a folder with config.json and "
                           f"{WEIGHTS_FILE} (hf download NAME --local-dir DIR fetches one)")
    if not path.exists() and (folder / "config.toml").exists():
        raise ConvertError(f"{str(folder)!r} is a run already (it has a config.toml); use it as it is")
    if not path.exists():
        raise ConvertError(f"model folder {str(folder)!r} has no config.json" + (
            _pickle_in(folder) or f"; name a folder with config.json and {WEIGHTS_FILE}"))
    table = {key: value for key, value in _read_json(path).items() if value is not None}
    kind, classes = table.get("model_type"), table.get("architectures", [])
    if kind is None:
        kind = next((family for family, name in FAMILIES.items() if name in classes), None)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConvertError(f"{str(path)!r}: model_type {kind!r} (architectures {classes}) is none of "
                           f"{', '.join(FAMILIES)}; other models cannot be converted")
    return ConfigFile(str(path), kind, DEFAULTS[kind] | table)


def _pickle_in(folder: Path) -> str | None:
    """Half a sentence on the pickle in a folder that lacks what is needed, if there is one."""
    name = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES), None)
    return name and f", and {name!r} {IS_A_PICKLE}"


def _read_json(path: Path) -> dict:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}, not a table")
        return table
    except (OSError, ValueError) as error:
        raise ConvertError(f"{str(path)!r} cannot be read as JSON: {error}; copy it again") from None


def model_config(file: ConfigFile, max_seq_len: int | None = None) -> tuple[ModelConfig, int]:
    """[model], and the tokens of context that the model knows. max_seq_len: the context wanted, at most that; None =
    all of it, of a RoPE model up to DEFAULT_CONTEXT. Raises ConvertError."""
    if "quantization_config" in file.table:
        raise ConvertError(f"{file.path!r}: quantization_config: the weights are quantized; use the model's original "
                           "in float32, bfloat16 or float16")
    is_gpt2 = file.family == "gpt2"
    values = {ours: file.need(theirs) for theirs, ours in (GPT2_KEYS if is_gpt2 else LLAMA_KEYS).items()
              if theirs in file.table or theirs not in OPTIONAL_KEYS}
    values |= _gpt2_values(file) if is_gpt2 else _llama_values(file)
    try:
        model = configuration.apply_table(Config(), {"model": values}).model
        known = model.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= known:
            raise ConvertError(f"--max-seq-len {max_seq_len} should lie between 1 and the {known} tokens that the "
                               f"model knows ({file.path!r})")
        if is_gpt2 and max_seq_len not in (None, known):
            raise ConvertError(f"--max-seq-len {max_seq_len}: GPT-2's table of positions has {known} rows; give a "
                               "shorter context where it is used (model.max_seq_len)")
        if not is_gpt2:
            fills_width = model.n_head * model.dim_per_head == model.n_embd
            model = replace(model, max_seq_len=max_seq_len or min(known, DEFAULT_CONTEXT),
                            n_kv_head=None if model.kv_heads == model.n_head else model.kv_heads,
                            head_dim=None if fills_width else model.dim_per_head)
        configuration.check(Config(model=model, train=TrainConfig(tokens_per_step=model.max_seq_len)))
    except ConfigError as error:
        raise ConvertError(f"{file.path!r}: {error}") from None
    return (model if _window_hides(file, model) else replace(model, window=None)), known


def _gpt2_values(file: ConfigFile) -> dict:
    file.only("activation_function", *GELUS)
    file.only("scale_attn_weights", True)
    file.only("scale_attn_by_inverse_layer_idx", False)
    file.only("add_cross_attention", False)
    return {"mlp": GELUS[file.table["activation_function"]]}


def _llama_values(file: ConfigFile) -> dict:
    file.only("hidden_act", "silu", "swish")
    file.only("rope_interleaved", False)
    file.only("use_mrope", False)
    table, family = file.table, file.family
    values = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": family == "qwen3"}
    mlp_bias = table["mlp_bias"] if family == "llama" else False
    if family == "qwen2":
        values |= {"bias": False, "qkv_bias": True}
    else:
        values |= {"bias": table["attention_bias"]} | (
            {"mlp_bias": mlp_bias} if mlp_bias != table["attention_bias"] else {})
    if family != "llama" and table["use_sliding_window"]:
        values["window"] = table["sliding_window"]
    return values | _rope_values(file)


def _rope_values(file: ConfigFile) -> dict:
    """RoPE's switches, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    table = file.table.get("rope_scaling") or file.table.get("rope_parameters") or {}
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise ConvertError(f"{file.path!r}: rope_scaling or rope_parameters = {table!r} cannot be converted, only one "
                           "flat table for all layers")
    rope = replace(file, table={
        "rope_type": table.get("type", "default"), "rope_theta": file.table["rope_theta"],
        "partial_rotary_factor": file.table["partial_rotary_factor"],
        "original_max_position_embeddings": file.table["max_position_embeddings"]} | table)
    rope.only("rope_type", "default", "linear", "llama3")
    rope.only("partial_rotary_factor", 1.0)
    kind, values = rope.table["rope_type"], {"position": "rope", "rope_theta": rope.table["rope_theta"]}
    if kind != "default":
        values["rope_scaling"] = {"kind": kind, "factor": rope.need("factor")}
    if kind == "llama3":
        values["rope_scaling"] |= {"original_max_seq_len": rope.table["original_max_position_embeddings"]} | {
            key: rope.need(key) for key in ("low_freq_factor", "high_freq_factor")}
    return values


def _window_hides(file: ConfigFile, model: ModelConfig) -> bool:
    """Whether the sliding window of Qwen2 and Qwen3 hides tokens, in every layer."""
    if model.window is None or model.window >= model.max_seq_len:
        return False
    first = file.table["max_window_layers"]
    if not isinstance(first, int):
        raise ConvertError(f"{file.path!r}: max_window_layers = {first!r} should be a whole number; copy it again")
    types = set(file.table.get("layer_types") or (
        "sliding_attention" if layer >= first else "full_attention" for layer in range(model.n_layer)))
    if types not in ({"full_attention"}, {"sliding_attention"}):
        raise ConvertError(f"{file.path!r}: use_sliding_window = True in some layers only cannot be converted; a "
                           f"context of at most sliding_window = {model.window} tokens does not need it: --max-seq-len "
                           f"{model.window}")
    return types == {"sliding_attention"}


# ----------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder -> our model, tokenizer and tensors

@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face folder in our terms. Weights are read when they are asked for."""

    dir: Path
    model: ModelConfig
    known_seq_len: int  # tokens of context that the model knows; model.max_seq_len may be fewer
    tokenizer: Tokenizer
    chat_template: str | None
    rules: list[Rule]  # of all tensors of model
    parts: dict  # their name -> slice of an open safetensors file: shape and dtype; [:] reads it

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, float32, by our names, tables padded; in memory once. Raises ConvertError."""
        if self.model.tie_embeddings and "lm_head.weight" in self.parts:
            name = next(iter(self.rules[0].theirs))
            table, head = self.parts[name], self.parts["lm_head.weight"]
            if table.get_dtype() != head.get_dtype() or not torch.equal(table[:], head[:]):
                raise ConvertError(f"{str(self.dir)!r}: config.json ties the embeddings but lm_head.weight differs "
                                   f"from {name}; set tie_word_embeddings to false if the head is its own, or remove "
                                   "lm_head.weight")
        tensors = {}
        for rule in self.rules:
            tensors[rule.ours] = torch.zeros(rule.shape)
            for name, part in rule.split(tensors[rule.ours]).items():
                part.copy_(self.parts[name][:])  # in place: nothing exists twice but pages of the file
        return tensors


def read_hf(folder: Path, *, max_seq_len: int | None = None) -> HuggingFaceModel:
    """A Hugging Face folder without its weights: of safetensors the headers alone are read, and of our own exports the
    biases that may be left out. max_seq_len as in model_config. Raises ConvertError, TokenizerError and ChatError."""
    file = read_config(folder)
    model, known = model_config(file, max_seq_len)
    tokenizer = _tokenizer(folder, file)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConvertError(f"{str(folder)!r}: the tokenizer has ids up to {tokenizer.vocab_size - 1} but vocab_size in "
                           f"config.json is {model.vocab_size}; remove the added tokens, or give the model rows for "
                           "them")
    wanted = list(rules(model, file.family))
    table, expected = next(iter(wanted[0].theirs)), {}
    for rule in wanted:
        expected |= rule.split(torch.empty(rule.shape, device="meta"))
    parts = _open_parts(folder, prefix=table.split(".")[0] + ".")
    if model.tie_embeddings and "lm_head.weight" in parts and table not in parts:
        parts[table] = parts.pop("lm_head.weight")  # the head stands for both
    elif model.tie_embeddings and "lm_head.weight" in parts:
        expected["lm_head.weight"] = expected[table]  # weights() compares the two
    problems = _misfits({name: list(part.shape) for name, part in expected.items()},
                        {name: part.get_shape() for name, part in parts.items()})
    if problems:
        raise ConvertError(f"the weights in {str(folder)!r} do not fit its config.json: {problems}; copy the folder "
                           "again")
    for name, part in parts.items():
        if part.get_dtype() not in WEIGHT_DTYPES:
            raise ConvertError(f"the weights in {str(folder)!r} are not all float32, bfloat16 or float16: {name} "
                               f"{part.get_dtype()}; use the model's original")
    model = _without_zero_biases(file.table.get(OURS), model, wanted, parts)
    kept = [rule for rule in wanted if _has(model, rule)]
    return HuggingFaceModel(folder, model, known, tokenizer, _chat_template(folder), kept, parts)


def _tokenizer(folder: Path, file: ConfigFile) -> Tokenizer:
    """Its end-of-text is the eos_token of tokenizer_config.json, else config.json's eos_token_id, else the special
    token with a known name."""
    eos = file.table.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if (folder / TOKENIZER_FILE).exists():
        return load_tokenizer(str(folder / TOKENIZER_FILE), end_of_text=eos)  # a folder called gpt2 is no name
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists() and file.family == "gpt2":
        return from_vocab_and_merges(folder, end_of_text=eos)
    other = next((f"{name} but " for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()), "")
    raise ConvertError(f"{str(folder)!r} holds {other}no {TOKENIZER_FILE}; make one where transformers is installed: "
                       f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else that of tokenizer_config.json (of a list of named ones the default)."""
    template = load_template(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    if template is None and path.exists():
        template = _read_json(path).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
    return template if isinstance(template, str) else None


def _open_parts(folder: Path, *, prefix: str) -> dict:
    """The tensors of model.safetensors, or of the shards that its index names, by the names that the model with a head
    gives them: the body saved alone (openai's gpt2, say) lacks the prefix. Raises ConvertError."""
    paths, index = [folder / WEIGHTS_FILE], folder / f"{WEIGHTS_FILE}.index.json"
    if not paths[0].exists():
        if not index.exists():
            raise ConvertError(f"{str(folder)!r} holds neither {WEIGHTS_FILE} nor {index.name}"
                               + (_pickle_in(folder) or "; copy the folder again"))
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ConvertError(f"{str(index)!r} has no weight_map of file names in its folder; copy it again")
        paths = [folder / name for name in sorted(set(names.values()))]
        missing = [path.name for path in paths if not path.exists()]
        if missing or not paths:
            raise ConvertError(f"{str(index)!r} names {len(missing)} files that are not there "
                               f"({', '.join(missing[:3])}); copy them too")
    parts = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")  # reads the header and maps the file into memory
        except (OSError, SafetensorError) as error:
            raise ConvertError(f"{str(path)!r} cannot be read as safetensors: {error}; copy it again") from None
        for name in file.keys():
            if not BUFFER.search(name):
                full_name = name if name.startswith((prefix, "lm_head.")) else prefix + name
                parts[full_name] = file.get_slice(name)
    return parts


def _without_zero_biases(switches: object, model: ModelConfig, wanted: list[Rule], parts: dict) -> ModelConfig:
    """[model] without what to-hf added: biases that the run did not have, if they are still 0 (training may have moved
    them)."""
    if not isinstance(switches, dict):
        return model
    had = {name: bool(switches.get(name)) for name in _biases(model)}
    if any(had[name] and not has for name, has in _biases(model).items()):
        return model  # the note is not of this model
    smaller = replace(model, **had)
    added = [name for rule in wanted if not _has(smaller, rule) for name in rule.theirs]
    return model if any(parts[name][:].any() for name in added) else smaller


def _biases(config: ModelConfig) -> dict[str, bool]:
    """Which biases a model has, by the switch that says so."""
    return {"bias": config.bias, "qkv_bias": config.has_qkv_bias, "mlp_bias": config.has_mlp_bias}


def _has(config: ModelConfig, rule: Rule) -> bool:
    """Whether a model has this tensor of its family, which may be a bias that it lacks."""
    switch = "qkv_bias" if ".attn.qkv." in rule.ours else "mlp_bias" if ".mlp." in rule.ours else "bias"
    return not rule.ours.endswith(".bias") or _biases(config)[switch]


# ----------------------------------------------------------------------------------------------------------------------
# ModelConfig -> config.json

def choose_family(config: ModelConfig) -> str:
    """The family that computes what the model computes. Raises ConvertError naming the switches in the way."""
    is_gpt2, only_qkv_bias = config.position == "learned", config.has_qkv_bias and not (
        config.bias or config.has_mlp_bias)
    family = "gpt2" if is_gpt2 else "qwen3" if config.qk_norm else \
        "qwen2" if config.window is not None or only_qkv_bias else "llama"
    wrong = {"norm": config.norm != ("layernorm" if is_gpt2 else "rmsnorm"),
             "mlp": config.mlp not in (GELUS.values() if is_gpt2 else ("swiglu",)),
             "qk_norm": is_gpt2 and config.qk_norm, "n_kv_head": is_gpt2 and config.kv_heads != config.n_head,
             "head_dim": is_gpt2 and config.n_head * config.dim_per_head != config.n_embd,
             "window": is_gpt2 and config.window is not None, "bias": family == "qwen2" and config.bias,
             "mlp_bias": family in ("qwen2", "qwen3") and config.has_mlp_bias,
             "n_embd": family == "llama" and config.n_embd % config.n_head != 0,
             "logit_softcap": config.logit_softcap != 0.0}
    switches = [f"model.{name} = {getattr(config, name)!r}" for name, is_wrong in wrong.items() if is_wrong]
    if switches:
        raise ConvertError(f"the model maps to no Hugging Face family: with model.position = {config.position!r} the "
                           f"nearest is {family}, which cannot have {', '.join(switches)}; docs/CONVERT.md lists what "
                           "can be exported")
    return family


def family_config(config: ModelConfig, family: str) -> ModelConfig:
    """config with the biases that its family always has (to be written as 0 where the model lacks them)."""
    if family == "gpt2":
        return replace(config, bias=True, qkv_bias=None, mlp_bias=None)
    if family == "qwen2":
        return replace(config, bias=False, qkv_bias=True, mlp_bias=None)
    attention_bias = config.bias or config.has_qkv_bias
    return replace(config, bias=attention_bias, qkv_bias=None, mlp_bias=config.has_mlp_bias)


def hf_config(config: ModelConfig, family: str, *, bos: int, eos: int, dtype: str) -> dict:
    """config.json of a model of the family."""
    complete = family_config(config, family)
    sizes = replace(config, mlp_hidden=config.mlp_width, n_kv_head=config.kv_heads, head_dim=config.dim_per_head)
    table = {"architectures": [FAMILIES[family]], "model_type": family, "bos_token_id": bos, "eos_token_id": eos,
             "dtype": dtype, "torch_dtype": dtype, "initializer_range": 0.02, "use_cache": True}
    table |= {theirs: getattr(sizes, ours) for theirs, ours in (GPT2_KEYS if family == "gpt2" else LLAMA_KEYS).items()}
    if _biases(config) != _biases(complete):
        table[OURS] = _biases(config)
    if family == "gpt2":
        activation = next(theirs for theirs, ours in GELUS.items() if ours == config.mlp)
        return table | {"activation_function": activation, "scale_attn_weights": True, "attn_pdrop": 0.0,
                        "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    scaling, rope = config.rope_scaling, {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_seq_len}
    # RoPE by transformers 5's key and by the older ones, which other programs read
    table |= {"rope_parameters": rope | {"rope_theta": config.rope_theta}, "rope_theta": config.rope_theta,
              "rope_scaling": rope if scaling is not None else None, "hidden_act": "silu", "attention_dropout": 0.0}
    if family in ("llama", "qwen3"):
        table["attention_bias"] = complete.bias
    if family == "llama":
        table["mlp_bias"] = complete.has_mlp_bias
    elif config.window is None:
        table["use_sliding_window"] = False
    else:
        table |= {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0,
                  "layer_types": ["sliding_attention"] * config.n_layer}
    return table


# ----------------------------------------------------------------------------------------------------------------------
# The two commands

def from_hf(folder: Path, run: Path, *, max_seq_len: int | None = None,
            note: Callable[[str], None] = lambda line: None) -> None:
    """Write the run folder of a Hugging Face folder, whole or not at all. Raises UserError and MachineError."""
    _refuse_full(run, "run folder")
    hf = read_hf(folder, max_seq_len=max_seq_len)
    T = hf.model.max_seq_len
    if T < hf.known_seq_len and max_seq_len is None:
        note(f"context: {T:,} of the {hf.known_seq_len:,} tokens that the model knows; --max-seq-len "
             f"{hf.known_seq_len} takes all")
    config = Config(model=hf.model, train=TrainConfig(tokens_per_step=max(1, 524_288 // T) * T))
    config = configuration.apply_table(config, {"train": {"out_dir": str(run)}})
    weights = hf.weights()
    with _new_folder(run) as temporary:
        checkpoint.save(temporary, 0, model=weights, optimizer=None, state={"val_loss": None}, keep=1)
        hf.tokenizer.save(temporary / TOKENIZER_FILE)
        if hf.chat_template is not None:
            save_template(temporary, hf.chat_template)
        files.write_whole(temporary / "config.toml", configuration.to_toml(config))
    with torch.device("meta"):
        parameters = GPT(hf.model).parameter_count()
    note(f"run {str(run)!r}: {parameters:,} parameters in float32, context {T:,}, vocabulary {hf.model.vocab_size:,}, "
         f"end-of-text {hf.tokenizer.eot_token}")


def to_hf(run: Path, folder: Path, *, dtype: str = "float32", note: Callable[[str], None] = lambda line: None) -> None:
    """Write the Hugging Face folder of a run or of one checkpoint, whole or not at all. dtype float32 or bfloat16.

    Raises UserError and MachineError."""
    _refuse_full(folder, "model folder")
    saved = read_run(run, note)
    config, tokenizer = saved.config.model, saved.tokenizer
    family = choose_family(config)
    bos, eos = tokenizer.start, tokenizer.eot
    tensors = _hf_tensors(config, family, saved.weights(), where=str(saved.checkpoint))
    if dtype != "float32":
        tensors = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    tables = {
        "config.json": hf_config(config, family, bos=bos, eos=eos, dtype=dtype),
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos},
        TOKENIZER_CONFIG_FILE: {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos_token or tokenizer.eot_token,
            "eos_token": tokenizer.eot_token, "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False}}
    with _new_folder(folder) as temporary:
        checkpoint.write_tensor_file(temporary / WEIGHTS_FILE, tensors)
        tokenizer.save(temporary / TOKENIZER_FILE)  # may write a tokenizer_config.json, of which ours says more
        for name, table in tables.items():
            files.write_whole(temporary / name, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        if saved.chat_template is not None:
            save_template(temporary, saved.chat_template)
    note(f"model {str(folder)!r}: {FAMILIES[family]}, {dtype}, of {str(saved.checkpoint)!r}")


def _hf_tensors(config: ModelConfig, family: str, ours: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Their tensors of ours, views where possible; biases that the family has and the model lacks are 0."""
    wanted = list(rules(family_config(config, family), family))
    problems = _misfits({rule.ours: list(rule.shape) for rule in wanted if _has(config, rule)},
                        {name: list(t.shape) for name, t in ours.items()})
    if problems:
        raise ConvertError(f"checkpoint {where!r} does not fit the run's config.toml: {problems}; put back the config "
                           "it was trained with")
    theirs = {}
    for rule in wanted:
        theirs |= rule.split(ours[rule.ours] if rule.ours in ours else torch.zeros(rule.shape))
    return theirs


def _refuse_full(folder: Path, what: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        holds = "holds a run" if (folder / "config.toml").exists() else "is not empty"
        raise ConvertError(f"{what} {str(folder)!r} {holds}; name a new or empty one")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which durably takes the path's place once the block is through; else it goes."""
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        files.make_folder(temporary)
        yield temporary
        files.publish(temporary, path)  # an empty folder may stand there
    except OSError as error:
        kind = MachineError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else ConvertError
        raise kind(f"folder {str(path)!r} cannot be written: {error.strerror}; nothing was left behind") from None
    finally:
        files.delete_folder(temporary, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python convert.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{from-hf,to-hf}")
    reading = commands.add_parser("from-hf", help="make a run of a Hugging Face folder")
    reading.add_argument("folder", type=Path, metavar="HF_DIR", help="config.json, safetensors, tokenizer.json")
    reading.add_argument("run", type=Path, metavar="RUN",
                         help="new run folder: to sample from, evaluate, and for train.init_from")
    reading.add_argument("--max-seq-len", type=int, metavar="N",
                         help=f"context of the run; left out = the model's, with RoPE at most {DEFAULT_CONTEXT}")
    writing = commands.add_parser("to-hf", help="make a Hugging Face folder of a run")
    writing.add_argument("run", type=Path, metavar="RUN",
                         help="run folder (its newest checkpoint) or one checkpoint inside it")
    writing.add_argument("folder", type=Path, metavar="HF_DIR",
                         help="new folder, for from_pretrained and what reads its like")
    writing.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                         help="of the weights; default float32, the run's own")
    args = parser.parse_args(argv)
    if args.command == "from-hf":
        from_hf(args.folder, args.run, max_seq_len=args.max_seq_len, note=cli.note)
    else:
        to_hf(args.run, args.folder, dtype=args.dtype, note=cli.note)


if __name__ == "__main__":
    exit_cleanly(main)
