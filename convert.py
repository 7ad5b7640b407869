"""Hugging Face model folders <-> run folders, for the models that both sides compute alike; without transformers.

    python convert.py from-hf HF_DIR RUN        python convert.py to-hf RUN HF_DIR

Families: GPT-2, Llama (2 and 3), Qwen2 and Qwen3 (docs/CONVERT.md has the switches). Weights are read from safetensors
alone, one tensor at a time, and widened to float32, which is exact; what is written is the same numbers. A folder is
written under another name and renamed when it is whole. What maps to no family is refused with the switch's name.

Dims: C width, D head dim, H query heads, Hkv key/value heads, F hidden width of the MLP, V vocabulary (rows without
padding).
"""

import argparse
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import checkpoint
import config as configuration
from config import Config, ConfigError, MachineError, ModelConfig, TrainConfig, UserError, exit_cleanly
from data.chat import load_template, save_template
from data.tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    from_vocab_and_merges,
    load_tokenizer,
)
from model import GPT, padded_vocab_size

FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu2": "relu2"}
DEFAULT_CONTEXT = 8192  # of a RoPE model that knows more: a run's windows, caches and tables are that long
WEIGHTS_FILE = "model.safetensors"
WEIGHT_DTYPES = ("F32", "BF16", "F16")  # those that float32 holds exactly
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# Buffers that old transformers saved: causal masks and RoPE's frequencies. They follow from the config.
BUFFER = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)$")
OURS = "flatgpt"  # key of config.json under which to-hf notes switches that the family cannot express


class ConvertError(UserError):
    """A folder that cannot be converted: unknown architecture, tensors that do not fit, no family, or no room."""


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face folder in our terms."""

    model: ModelConfig
    tensors: dict[str, Tensor]  # float32 by our names, tables padded
    tokenizer: Tokenizer
    chat_template: str | None


# ----------------------------------------------------------------------------------------------------------------------
# Names and shapes: one list for both directions

@dataclass(frozen=True)
class Rule:
    """One tensor of ours and those of theirs whose rows it holds one after the other."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]  # of each of theirs, as ours counts rows (outputs)
    columns: int | None = None  # None = a vector
    transposed: bool = False  # GPT-2's Conv1D holds (in, out)
    padded_rows: int | None = None  # of ours; None = the sum of rows

    def their_shape(self, part: int) -> list[int]:
        if self.columns is None:
            return [self.rows[part]]
        shape = [self.rows[part], self.columns]
        return shape[::-1] if self.transposed else shape

    def our_shape(self) -> list[int]:
        rows = self.padded_rows or sum(self.rows)
        return [rows] if self.columns is None else [rows, self.columns]

    def split(self, ours: Tensor) -> list[Tensor]:
        """Theirs of ours, views of it; the padding belongs to none."""
        parts = ours[:sum(self.rows)].split(self.rows)
        return [part.T for part in parts] if self.transposed else list(parts)


def rules(config: ModelConfig, family: str) -> list[Rule]:
    """Every tensor of the model. config must be one that the family can have (see family_config)."""
    C, V = config.n_embd, config.vocab_size
    base, table = ("transformer", "wte") if family == "gpt2" else ("model", "embed_tokens")
    table_rows = {"rows": (V,), "columns": C, "padded_rows": padded_vocab_size(V)}
    found = [Rule("wte.weight", (f"{base}.{table}.weight",), **table_rows)]
    if family == "gpt2":
        found.append(Rule("wpe.weight", ("transformer.wpe.weight",), (config.max_seq_len,), C))
    for layer in range(config.n_layer):
        found += (_gpt2_block if family == "gpt2" else _llama_block)(config, layer)
    found += _norm(config, "final_norm", f"{base}.{'ln_f' if family == 'gpt2' else 'norm'}")
    if not config.tie_embeddings:
        found.append(Rule("lm_head.weight", ("lm_head.weight",), **table_rows))
    return found


def _gpt2_block(config: ModelConfig, layer: int) -> list[Rule]:
    C, hidden, ours, theirs = config.n_embd, config.mlp_width, f"blocks.{layer}", f"transformer.h.{layer}"
    found = [*_norm(config, f"{ours}.attn_norm", f"{theirs}.ln_1"),
             *_norm(config, f"{ours}.mlp_norm", f"{theirs}.ln_2")]
    for our, their, rows, columns in (("attn.qkv", "attn.c_attn", 3 * C, C), ("attn.proj", "attn.c_proj", C, C),
                                      ("mlp.fc", "mlp.c_fc", hidden, C), ("mlp.proj", "mlp.c_proj", C, hidden)):
        found.append(Rule(f"{ours}.{our}.weight", (f"{theirs}.{their}.weight",), (rows,), columns, transposed=True))
        found.append(Rule(f"{ours}.{our}.bias", (f"{theirs}.{their}.bias",), (rows,)))
    return found


def _llama_block(config: ModelConfig, layer: int) -> list[Rule]:
    """Llama's names, which Qwen2 and Qwen3 share."""
    C, hidden, D = config.n_embd, config.mlp_width, config.dim_per_head
    queries, keys, ours, theirs = config.n_head * D, config.kv_heads * D, f"blocks.{layer}", f"model.layers.{layer}"
    found = [*_norm(config, f"{ours}.attn_norm", f"{theirs}.input_layernorm"),
             *_norm(config, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")]
    if config.qk_norm:
        found += [Rule(f"{ours}.attn.{name}.weight", (f"{theirs}.self_attn.{name}.weight",), (D,))
                  for name in ("q_norm", "k_norm")]
    for our, their, rows, columns, has_bias in (
            ("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (queries, keys, keys), C,
             config.has_qkv_bias),
            ("attn.proj", ("self_attn.o_proj",), (C,), queries, config.bias),
            ("mlp.fc", ("mlp.gate_proj", "mlp.up_proj"), (hidden, hidden), C, config.has_mlp_bias),
            ("mlp.proj", ("mlp.down_proj",), (C,), hidden, config.has_mlp_bias)):
        found.append(Rule(f"{ours}.{our}.weight", tuple(f"{theirs}.{name}.weight" for name in their), rows, columns))
        if has_bias:
            found.append(Rule(f"{ours}.{our}.bias", tuple(f"{theirs}.{name}.bias" for name in their), rows))
    return found


def _norm(config: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    kinds = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    return [Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",), (config.n_embd,)) for kind in kinds]


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

def load_hf_config(folder: Path, *, max_seq_len: int | None = None) -> ModelConfig:
    """[model] of a Hugging Face folder. max_seq_len: the context wanted, at most what the model knows; None = all that
    it knows, of a RoPE model up to DEFAULT_CONTEXT. Raises ConvertError."""
    path, table = _read_config(Path(folder))
    return _model_config(path, table, max_seq_len)


def _read_config(folder: Path) -> tuple[str, dict]:
    """The path of config.json, for messages, and its content."""
    path = folder / "config.json"
    if folder.is_file() and folder.suffix in PICKLES:
        raise ConvertError(f"{str(folder)!r} is a pickle, which could execute code, and is never loaded; "
                           "docs/CONVERT.md shows how to turn it into safetensors where it was made")
    if not folder.is_dir():
        raise ConvertError(f"model folder {str(folder)!r} does not exist; name a folder with config.json and "
                           f"{WEIGHTS_FILE} (hf download NAME --local-dir DIR fetches one)")
    if not path.exists():
        if (folder / "config.toml").exists():
            raise ConvertError(f"{str(folder)!r} is a run already (it has a config.toml); use it as it is")
        raise ConvertError(f"model folder {str(folder)!r} has no config.json" + (
            _pickle_there(folder) or f"; name a folder with config.json and {WEIGHTS_FILE}"))
    return str(path), _read_json(path)


def _pickle_there(folder: Path) -> str | None:
    """Half a sentence on the pickle in a folder that lacks what is needed, if there is one."""
    name = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES), None)
    return name and (f", and {name!r} is a pickle, which could execute code, and is never loaded; docs/CONVERT.md "
                     "shows how to turn it into safetensors where it was made")


def _read_json(path: Path) -> dict:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConvertError(f"{str(path)!r} is not JSON ({error}); copy it again") from None
    if not isinstance(table, dict):
        raise ConvertError(f"{str(path)!r} holds a {type(table).__name__}, not a table; copy it again")
    return table


def _family(path: str, table: dict) -> str:
    kind, classes = table.get("model_type"), table.get("architectures") or []
    kind = kind if isinstance(kind, str | None) else repr(kind)
    by_class = [family for family, name in FAMILIES.items() if name in classes]
    if kind not in FAMILIES and not (kind is None and by_class):
        raise ConvertError(f"{path!r}: model_type {kind!r} (architectures {classes}) is none of {', '.join(FAMILIES)}; "
                           "other models cannot be converted")
    return kind or by_class[0]


def _model_config(path: str, table: dict, max_seq_len: int | None) -> ModelConfig:
    family = _family(path, table)
    table = {key: value for key, value in table.items() if value is not None}
    if "quantization_config" in table:
        raise ConvertError(f"{path!r}: quantization_config: the weights are quantized; use the model's original in "
                           "float32, bfloat16 or float16")
    values = (_gpt2_values if family == "gpt2" else _llama_values)(path, table, family)
    known = values["max_seq_len"]
    if max_seq_len is not None and not 1 <= max_seq_len <= known:
        raise ConvertError(f"--max-seq-len {max_seq_len} should lie between 1 and the {known} tokens that the model "
                           f"knows ({path!r})")
    if family != "gpt2":
        values["max_seq_len"] = max_seq_len or min(known, DEFAULT_CONTEXT)
    elif max_seq_len not in (None, known):
        raise ConvertError(f"--max-seq-len {max_seq_len}: GPT-2's table of positions has {known} rows; give a shorter "
                           "context where it is used (model.max_seq_len)")
    try:
        config = configuration.apply_table(Config(), {"model": values})
        configuration.check(replace(config, train=TrainConfig(tokens_per_step=config.model.max_seq_len)))
    except ConfigError as error:
        raise ConvertError(f"{path!r}: {error}") from None
    return _with_window(path, table, config.model) if family in ("qwen2", "qwen3") else config.model


def _need(path: str, table: dict, key: str) -> object:
    if key not in table:
        raise ConvertError(f"{path!r} has no {key!r}; copy it again")
    return table[key]


def _whole(path: str, table: dict, key: str, default: int | None = None) -> int:
    """A whole number from config.json; without default it must be there."""
    value = _need(path, table, key) if default is None else table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConvertError(f"{path!r}: {key} = {value!r} should be a whole number; copy it again")
    return value


def _only(path: str, table: dict, key: str, *allowed: object) -> None:
    """Raise ConvertError if a key has a value under which the model would compute something else than ours."""
    if key in table and table[key] not in allowed:
        raise ConvertError(f"{path!r}: {key} = {table[key]!r} cannot be converted, only "
                           f"{' or '.join(repr(value) for value in allowed)}")


def _gpt2_values(path: str, table: dict, family: str) -> dict:
    _only(path, table, "activation_function", *GELUS)
    _only(path, table, "scale_attn_weights", True)
    _only(path, table, "scale_attn_by_inverse_layer_idx", False)
    _only(path, table, "add_cross_attention", False)
    values = {name: _whole(path, table, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    if "n_inner" in table:
        values["mlp_hidden"] = table["n_inner"]
    return values | {
        "max_seq_len": _whole(path, table, "n_positions", table.get("n_ctx", 1024)),
        "norm_eps": table.get("layer_norm_epsilon", 1e-5), "mlp": GELUS[table.get("activation_function", "gelu_new")],
        "tie_embeddings": table.get("tie_word_embeddings", True)}


def _llama_values(path: str, table: dict, family: str) -> dict:
    _only(path, table, "hidden_act", "silu", "swish")
    _only(path, table, "rope_interleaved", False)
    _only(path, table, "use_mrope", False)
    values = {ours: _whole(path, table, theirs) for ours, theirs in (
        ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"), ("n_embd", "hidden_size"),
        ("mlp_hidden", "intermediate_size"), ("vocab_size", "vocab_size"))}
    if table.get("num_key_value_heads", values["n_head"]) != values["n_head"]:
        values["n_kv_head"] = table["num_key_value_heads"]
    default = 128 if family == "qwen3" else values["n_embd"] // max(1, values["n_head"])  # transformers' own
    head_dim = _whole(path, table, "head_dim", default)
    if head_dim * values["n_head"] != values["n_embd"]:
        values["head_dim"] = head_dim
    attention_bias, mlp_bias = table.get("attention_bias", False), table.get("mlp_bias", False)
    if family == "qwen2":
        values |= {"bias": False, "qkv_bias": True}
    else:
        values |= {"bias": attention_bias}
        if (mlp_bias if family == "llama" else False) != attention_bias:
            values["mlp_bias"] = mlp_bias if family == "llama" else False
    return values | _rope_values(path, table) | {
        "max_seq_len": _whole(path, table, "max_position_embeddings", 2048 if family == "llama" else 32768),
        "norm": "rmsnorm", "norm_eps": table.get("rms_norm_eps", 1e-6), "mlp": "swiglu", "qk_norm": family == "qwen3",
        "tie_embeddings": table.get("tie_word_embeddings", False)}


def _rope_values(path: str, table: dict) -> dict:
    """RoPE's switches, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = table.get("rope_scaling") or table.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConvertError(f"{path!r}: rope_scaling or rope_parameters = {rope!r} cannot be converted, only one flat "
                           "table for all layers")
    rope = {"partial_rotary_factor": table.get("partial_rotary_factor", 1.0)} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    _only(path, {"rope_type": kind}, "rope_type", "default", "linear", "llama3")
    _only(path, rope, "partial_rotary_factor", 1.0)
    values = {"position": "rope", "rope_theta": rope.get("rope_theta", table.get("rope_theta", 10000.0))}
    if kind == "linear":
        values["rope_scaling"] = {"kind": "linear", "factor": _need(path, rope, "factor")}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", table.get("max_position_embeddings"))
        values["rope_scaling"] = {"kind": "llama3", "original_max_seq_len": original} | {
            key: _need(path, rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return values


def _with_window(path: str, table: dict, config: ModelConfig) -> ModelConfig:
    """config with the sliding window of Qwen2 and Qwen3, if it is on in every layer."""
    window = _whole(path, table, "sliding_window", 4096)
    if not table.get("use_sliding_window", False) or window >= config.max_seq_len:  # such a window hides nothing
        return config
    first = _whole(path, table, "max_window_layers", 28)
    types = table.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(config.n_layer)]
    if set(types) == {"full_attention"}:
        return config
    if set(types) != {"sliding_attention"}:
        raise ConvertError(f"{path!r}: use_sliding_window = True in some layers only cannot be converted; a context of "
                           f"at most sliding_window = {window} tokens does not need it: --max-seq-len {window}")
    return replace(config, window=window)


# ----------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder -> our model, tensors and tokenizer

def load_hf(folder: Path, *, max_seq_len: int | None = None) -> HFModel:
    """All of a Hugging Face folder, in memory once. max_seq_len as in load_hf_config. Raises ConvertError and
    TokenizerError."""
    folder = Path(folder)
    path, table = _read_config(folder)
    model = _model_config(path, table, max_seq_len)
    tokenizer = load_hf_tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConvertError(f"{str(folder)!r}: the tokenizer has ids up to {tokenizer.vocab_size - 1} but vocab_size in "
                           f"config.json is {model.vocab_size}; remove the added tokens, or give the model rows for "
                           "them")
    tensors = _read_tensors(folder, rules(model, _family(path, table)), tied=model.tie_embeddings)
    model = _without_zero_biases(table.get(OURS), model, tensors)
    return HFModel(model, tensors, tokenizer, _chat_template(folder))


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Its end-of-text is the eos_token of tokenizer_config.json, else
    config.json's eos_token_id, else the special token with a known name. Raises ConvertError and TokenizerError."""
    folder = Path(folder)
    path, table = _read_config(folder)
    eos = table.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if (folder / TOKENIZER_FILE).exists():
        return load_tokenizer(str(folder / TOKENIZER_FILE), end_of_text=eos)  # a folder called gpt2 is no name
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists() and _family(path, table) == "gpt2":
        return from_vocab_and_merges(folder, end_of_text=eos)
    other = next((name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()), None)
    there = f"holds {other} but no {TOKENIZER_FILE}" if other else f"holds no {TOKENIZER_FILE}"
    raise ConvertError(f"{str(folder)!r} {there}; make one where transformers is installed: "
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


def _read_tensors(folder: Path, wanted: list[Rule], *, tied: bool) -> dict[str, Tensor]:
    """Our tensors of the folder's safetensors files, float32. Names, shapes and dtypes are checked before reading."""
    with ExitStack() as stack:
        files = {path: _open_tensors(path, stack) for path in _weight_files(folder)}
        found = {}  # canonical name -> (file, name in it)
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 - a safetensors file cannot be iterated
                if not BUFFER.search(name):
                    found[_canonical(name, wanted[0].theirs[0])] = (path, name)
        if tied and "lm_head.weight" in found:
            _drop_tied_head(folder, files, found, table=wanted[0].theirs[0])
        slices = {name: files[path].get_slice(there) for name, (path, there) in found.items()}
        expected = {name: rule.their_shape(i) for rule in wanted for i, name in enumerate(rule.theirs)}
        problems = _misfits(expected, {name: list(part.get_shape()) for name, part in slices.items()})
        if problems:
            raise ConvertError(f"the weights in {str(folder)!r} do not fit its config.json: {problems}; copy the "
                               "folder again")
        odd = [f"{name} {part.get_dtype()}" for name, part in slices.items() if part.get_dtype() not in WEIGHT_DTYPES]
        if odd:
            raise ConvertError(f"the weights in {str(folder)!r} are not all float32, bfloat16 or float16: {odd[0]}; "
                               "use the model's original")
        return {rule.ours: _merge(rule, files, found) for rule in wanted}


def _merge(rule: Rule, files: dict[Path, "safe_open"], found: dict[str, tuple[Path, str]]) -> Tensor:
    """Our tensor, float32, filled from theirs in place: nothing exists twice but pages of the file."""
    ours = torch.zeros(rule.our_shape())
    for view, name in zip(rule.split(ours), rule.theirs, strict=True):
        view.copy_(_read(files, found[name]))
    return ours


def _read(files: dict[Path, "safe_open"], where: tuple[Path, str]) -> Tensor:
    path, name = where
    return files[path].get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names. Raises ConvertError if one is not there."""
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.exists():
        raise ConvertError(f"{str(folder)!r} holds neither {WEIGHTS_FILE} nor {index.name}"
                           + (_pickle_there(folder) or "; copy the folder again"))
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise ConvertError(f"{str(index)!r} has no weight_map of file names in its folder; copy it again")
    paths = [folder / name for name in sorted(set(names.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        raise ConvertError(f"{str(index)!r} names {len(missing)} files that are not there ({', '.join(missing[:3])}); "
                           "copy them too")
    return paths


def _open_tensors(path: Path, stack: ExitStack) -> "safe_open":
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{str(path)!r} cannot be read as safetensors: {error}; copy it again") from None


def _canonical(name: str, table: str) -> str:
    """name as the model with a head has it: the body saved alone (openai's gpt2, say) lacks the prefix."""
    prefix = table.split(".")[0] + "."
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def _drop_tied_head(folder: Path, files: dict, found: dict, *, table: str) -> None:
    """Forget a head that repeats the tied embedding; one that stands for it takes its place."""
    head = found.pop("lm_head.weight")
    if table not in found:
        found[table] = head
        return
    ours, theirs = _read(files, found[table]), _read(files, head)
    if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
        raise ConvertError(f"{str(folder)!r}: config.json ties the embeddings but lm_head.weight differs from {table}; "
                           "set tie_word_embeddings to false if the head is its own, or remove lm_head.weight")


def _without_zero_biases(switches: object, model: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
    """Undo what to-hf added: biases that the run did not have, if they are still 0 (training may have moved them).
    Takes them from tensors and returns the run's [model]."""
    if not isinstance(switches, dict):
        return model
    had = {name: bool(switches.get(name)) for name in _biases(model)}
    if any(had[name] and not has for name, has in _biases(model).items()):
        return model  # the note is not of this model
    smaller = replace(model, **had)
    added = [name for name in tensors if name.endswith(".bias") and not _has_bias(smaller, name)]
    if any(tensors[name].any() for name in added):
        return model
    for name in added:
        del tensors[name]
    return smaller


def _biases(config: ModelConfig) -> dict[str, bool]:
    """Which biases a model has, by the switch that says so."""
    return {"bias": config.bias, "qkv_bias": config.has_qkv_bias, "mlp_bias": config.has_mlp_bias}


def _has_bias(config: ModelConfig, name: str) -> bool:
    """Whether a model has this bias, by our name."""
    if name.endswith("attn.qkv.bias"):
        return config.has_qkv_bias
    return config.has_mlp_bias if ".mlp." in name else config.bias


# ----------------------------------------------------------------------------------------------------------------------
# ModelConfig -> config.json

def choose_family(config: ModelConfig) -> str:
    """The family that computes what the model computes. Raises ConvertError naming the switches in the way."""
    heads_fill_width = config.n_head * config.dim_per_head == config.n_embd
    if config.position == "learned":
        family = "gpt2"
        wrong = {"norm": config.norm != "layernorm", "mlp": config.mlp not in GELUS.values(),
                 "qk_norm": config.qk_norm, "n_kv_head": config.kv_heads != config.n_head,
                 "head_dim": not heads_fill_width, "window": config.window is not None}
    else:
        attention_biases = (config.has_qkv_bias, config.bias)
        if config.qk_norm:
            family = "qwen3"
        elif config.window is not None or (attention_biases == (True, False) and not config.has_mlp_bias):
            family = "qwen2"
        else:
            family = "llama"
        wrong = {"norm": config.norm != "rmsnorm", "mlp": config.mlp != "swiglu",
                 "bias": family == "qwen2" and config.bias,
                 "mlp_bias": family != "llama" and config.has_mlp_bias,
                 "n_embd": family == "llama" and config.n_embd % config.n_head != 0}
    wrong["logit_softcap"] = config.logit_softcap != 0.0
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
    common = {"architectures": [FAMILIES[family]], "model_type": family, "vocab_size": config.vocab_size,
              "bos_token_id": bos, "eos_token_id": eos, "tie_word_embeddings": config.tie_embeddings,
              "dtype": dtype, "torch_dtype": dtype, "initializer_range": 0.02, "use_cache": True}
    if _biases(config) != _biases(complete):
        common[OURS] = _biases(config)
    if family == "gpt2":
        activation = next(theirs for theirs, ours in GELUS.items() if ours == config.mlp)
        return common | {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_inner": config.mlp_width,
            "n_positions": config.max_seq_len, "n_ctx": config.max_seq_len, "activation_function": activation,
            "layer_norm_epsilon": config.norm_eps, "scale_attn_weights": True, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
            "resid_pdrop": 0.0}
    table = common | {
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "hidden_size": config.n_embd,
        "num_key_value_heads": config.kv_heads, "head_dim": config.dim_per_head, "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_seq_len, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0} | _rope_table(config)
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


def _rope_table(config: ModelConfig) -> dict:
    """RoPE by transformers 5's key and by the older ones, which other programs read."""
    scaling = config.rope_scaling
    if scaling is None:
        rope = {"rope_type": "default"}
    else:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                     "original_max_position_embeddings": scaling.original_max_seq_len}
    return {"rope_parameters": rope | {"rope_theta": config.rope_theta}, "rope_theta": config.rope_theta,
            "rope_scaling": None if scaling is None else rope}


# ----------------------------------------------------------------------------------------------------------------------
# The two commands

def from_hf(folder: Path, run: Path, *, max_seq_len: int | None = None,
            note: Callable[[str], None] = lambda line: None) -> None:
    """Write the run folder of a Hugging Face folder, whole or not at all. Raises UserError and MachineError."""
    folder, run = Path(folder), Path(run)
    _refuse_full(run, "run folder")
    hf = load_hf(folder, max_seq_len=max_seq_len)
    known = _read_config(folder)[1].get("max_position_embeddings", 0)
    if hf.model.max_seq_len < known and max_seq_len is None:
        note(f"context: {hf.model.max_seq_len:,} of the {known:,} tokens that the model knows; --max-seq-len {known} "
             "takes all")
    T = hf.model.max_seq_len
    config = Config(model=hf.model, train=TrainConfig(tokens_per_step=max(1, 524_288 // T) * T))
    config = configuration.apply_table(config, {"train": {"out_dir": str(run)}})
    with _new_folder(run) as temporary:
        checkpoint.save(temporary, 0, model=hf.tensors, optimizer=None, state={"val_loss": None}, keep=1)
        hf.tokenizer.save(temporary / TOKENIZER_FILE)
        if hf.chat_template is not None:
            save_template(temporary, hf.chat_template)
        (temporary / "config.toml").write_text(configuration.to_toml(config), encoding="utf-8")
    with torch.device("meta"):
        parameters = GPT(hf.model).parameter_count()
    note(f"run {str(run)!r}: {parameters:,} parameters in float32, context {T:,}, vocabulary {hf.model.vocab_size:,}, "
         f"end-of-text {hf.tokenizer.eot_token}")


def to_hf(run: Path, folder: Path, *, dtype: str = "float32", note: Callable[[str], None] = lambda line: None) -> None:
    """Write the Hugging Face folder of a run or of one checkpoint, whole or not at all. dtype float32 or bfloat16.

    Raises UserError and MachineError."""
    folder = Path(folder)
    _refuse_full(folder, "model folder")
    path = checkpoint.resolve(run, note)
    run_dir = checkpoint.run_dir_of(path)
    config = configuration.load_config(run_dir / "config.toml").model
    tokenizer = load_tokenizer(str(run_dir / TOKENIZER_FILE))
    family = choose_family(config)
    bos, eos = tokenizer.start, tokenizer.eot
    table = hf_config(config, family, bos=bos, eos=eos, dtype=dtype)
    tensors = _hf_tensors(config, family, checkpoint.load_tensors(path, "model"), where=str(path))
    if dtype != "float32":
        tensors = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    template = load_template(run_dir)
    with _new_folder(folder) as temporary:
        checkpoint.write_tensor_file(temporary / WEIGHTS_FILE, tensors)
        _write_json(temporary / "config.json", table)
        _write_json(temporary / "generation_config.json",
                    {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
        tokenizer.save(temporary / TOKENIZER_FILE)
        _write_json(temporary / TOKENIZER_CONFIG_FILE, {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos_token or tokenizer.eot_token,
            "eos_token": tokenizer.eot_token, "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False})
        if template is not None:
            save_template(temporary, template)
    note(f"model {str(folder)!r}: {FAMILIES[family]}, {dtype}, of {str(path)!r}")


def _hf_tensors(config: ModelConfig, family: str, ours: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Their tensors of ours, views where possible; biases that the family has and the model lacks are 0."""
    wanted = rules(family_config(config, family), family)
    expected = {rule.ours: rule.our_shape() for rule in wanted
                if not rule.ours.endswith(".bias") or _has_bias(config, rule.ours)}
    problems = _misfits(expected, {name: list(t.shape) for name, t in ours.items()})
    if problems:
        raise ConvertError(f"checkpoint {where!r} does not fit the run's config.toml: {problems}; put back the config "
                           "it was trained with")
    theirs = {}
    for rule in wanted:
        tensor = ours[rule.ours] if rule.ours in ours else torch.zeros(rule.our_shape())
        theirs |= zip(rule.theirs, rule.split(tensor), strict=True)
    return theirs


def _refuse_full(folder: Path, what: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        holds = "holds a run" if (folder / "config.toml").exists() else "is not empty"
        raise ConvertError(f"{what} {str(folder)!r} {holds}; name a new or empty one")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the path's place once the block is through, synced; else it goes."""
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in (*(p for p in temporary.iterdir() if p.is_file()), temporary):
            checkpoint.sync(file)
        os.rename(temporary, path)  # an empty folder may stand there
        checkpoint.sync(path.parent)
    except OSError as error:
        kind = MachineError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else ConvertError
        raise kind(f"folder {str(path)!r} cannot be written: {error.strerror}; nothing was left behind") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, table: dict) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConvertError(f"{message}; python convert.py --help shows the usage")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="convert.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{from-hf,to-hf}", parser_class=_Parser)
    reading = commands.add_parser("from-hf", help="make a run of a Hugging Face folder")
    reading.add_argument("folder", metavar="HF_DIR", help="config.json, safetensors, tokenizer.json")
    reading.add_argument("run", metavar="RUN", help="new run folder: to sample from, evaluate, and for train.init_from")
    reading.add_argument("--max-seq-len", type=int, metavar="N",
                         help=f"context of the run; left out = the model's, with RoPE at most {DEFAULT_CONTEXT}")
    writing = commands.add_parser("to-hf", help="make a Hugging Face folder of a run")
    writing.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    writing.add_argument("folder", metavar="HF_DIR", help="new folder, for from_pretrained and what reads its like")
    writing.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                         help="of the weights; default float32, the run's own")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = _parse(argv)
    if args.command == "from-hf":
        from_hf(Path(args.folder), Path(args.run), max_seq_len=args.max_seq_len, note=_note)
    else:
        to_hf(Path(args.run), Path(args.folder), dtype=args.dtype, note=_note)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
