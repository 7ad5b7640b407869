"""Hugging Face model folders <-> run folders, for the models that both sides compute alike; without transformers.

    python convert.py from-hf HF_DIR RUN        python convert.py to-hf RUN HF_DIR

Families: GPT-2, Llama (2 and 3), Qwen2 and Qwen3 (docs/CONVERT.md has the switches). Weights are read from safetensors
alone, one tensor at a time, and widened to float32, which is exact; what is written is the same numbers. A folder of
peft's adapters is read as its base with them merged. A folder is written under another name and renamed when it is
whole. What maps to no family is refused with the switch's name.

Dims: C width, D head dim, V vocabulary (rows without padding).
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import checkpoint
import cli
import config as configuration
import files
from config import Config, ConfigError, ModelConfig, TrainConfig, UserError, exit_cleanly
from data.chat import check_template, load_template, save_template
from data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, from_vocab_and_merges, load_tokenizer
from finetune import lora, runs
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
NOT_WHOLE = ("layer_norm_epsilon", "rms_norm_eps", "tie_word_embeddings")
OPTIONAL_KEYS = ("n_inner", "n_positions", "num_key_value_heads", "head_dim")
# transformers' values of keys that config.json leaves out
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                  "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0, "rope_type": "default"}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
                                  "max_window_layers": 28}
DEFAULTS = {"gpt2": {"n_ctx": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                     "activation_function": "gelu_new"},
            "llama": LLAMA_DEFAULTS, "qwen2": QWEN_DEFAULTS, "qwen3": QWEN_DEFAULTS | {"head_dim": 128}}
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu2": "relu2"}
# Values under which the model computes what ours does, and what kinds of RoPE need
ALLOWED = {"activation_function": tuple(GELUS), "scale_attn_weights": (True,), "add_cross_attention": (False,),
           "scale_attn_by_inverse_layer_idx": (False,), "hidden_act": ("silu", "swish"), "rope_interleaved": (False,),
           "use_mrope": (False,), "partial_rotary_factor": (1.0,), "rope_type": ("default", "linear", "llama3")}
ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
DEFAULT_CONTEXT = 8192  # of a RoPE model that knows more: a run's windows, caches and tables are that long
WEIGHTS_FILE = "model.safetensors"
WEIGHT_DTYPES = ("F32", "BF16", "F16")  # those that float32 holds exactly
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# Buffers that old transformers saved: causal masks and RoPE's frequencies. They follow from the config.
BUFFER = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)$")
HEAD = "lm_head.weight"
OURS = "flatgpt"  # key of config.json under which to-hf notes switches that the family cannot express


class ConvertError(UserError):
    """A folder that cannot be converted: unknown architecture, tensors that do not fit, no family, or no room."""


# ---- Names and shapes: one list for both directions ------------------------------------------------------------------

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
        yield Rule(HEAD, {HEAD: V}, (padded_vocab_size(V), C))


# ---- config.json -> ModelConfig --------------------------------------------------------------------------------------

def read_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder, with model_type, transformers' values of what it leaves out, and RoPE's
    keys beside the others. Raises ConvertError, with the way out, for all else that may be there."""
    path = folder / "config.json"
    if not path.exists():
        _refuse_pickle(folder)
        if (folder / "config.toml").exists():
            raise ConvertError(f"{str(folder)!r} is a run already (it has a config.toml); use it as it is")
        problem = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConvertError(f"model folder {str(folder)!r} {problem}; name a folder with config.json and {WEIGHTS_FILE} "
                           "(hf download NAME --local-dir DIR fetches one)")
    table = {key: value for key, value in _read_json(path).items() if value is not None}
    classes = table["architectures"] if isinstance(table.get("architectures"), list) else []
    family = table.get("model_type", next((family for family, name in FAMILIES.items() if name in classes), None))
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConvertError(f"{str(path)!r}: model_type {family!r} (architectures {classes}) is none of "
                           f"{', '.join(FAMILIES)}; other models cannot be converted")
    rope = table.get("rope_scaling") or table.get("rope_parameters") or {}  # the second is transformers 5's
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConvertError(f"{str(path)!r}: rope_scaling or rope_parameters = {rope!r} cannot be converted, only one "
                           "flat table for all layers")
    rope = {"rope_type": rope.get("type", None if "factor" in rope else "default")} | rope
    table = DEFAULTS[family] | table | rope | {"model_type": family}
    for key, allowed in ALLOWED.items():
        if key in table and table[key] not in allowed:
            raise ConvertError(f"{str(path)!r}: {key} = {table[key]!r} cannot be converted, only "
                               f"{' or '.join(map(repr, allowed))}")
    for key in (*(GPT2_KEYS if family == "gpt2" else LLAMA_KEYS), *ROPE_KEYS[table["rope_type"]]):
        if key not in table and key not in OPTIONAL_KEYS:
            raise ConvertError(f"{str(path)!r} has no {key!r}; copy it again")
    for key in (*GPT2_KEYS, *LLAMA_KEYS, "sliding_window", "max_window_layers"):
        if key not in NOT_WHOLE and type(table.get(key, 0)) is not int:
            raise ConvertError(f"{str(path)!r}: {key} = {table[key]!r} should be a whole number; copy it again")
    if "quantization_config" in table:
        raise ConvertError(f"{str(path)!r}: quantization_config: the weights are quantized; use the model's original "
                           "in float32, bfloat16 or float16")
    return table


def _refuse_pickle(folder: Path) -> None:
    """Raise ConvertError if there is a pickle, where what can be read is missing."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.is_file() and path.suffix in PICKLES:
            raise ConvertError(f"{str(path)!r} is a pickle, which could execute code, and is never loaded; "
                               "docs/CONVERT.md shows how to turn it into safetensors where it was made")


def _read_json(path: Path) -> dict:
    try:
        table = files.parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}, not a table")
        return table
    except (OSError, ValueError) as error:
        raise ConvertError(f"{str(path)!r} cannot be read as JSON: {error}; copy it again") from None


def model_config(table: dict, max_seq_len: int | None = None) -> ModelConfig:
    """[model] of what read_config gives. max_seq_len: the context wanted, at most what the model knows; None = all of
    it, of a RoPE model up to DEFAULT_CONTEXT. Raises ConfigError."""
    is_gpt2 = table["model_type"] == "gpt2"
    values = {ours: table[theirs] for theirs, ours in (GPT2_KEYS if is_gpt2 else LLAMA_KEYS).items() if theirs in table}
    values |= {"mlp": GELUS[table["activation_function"]]} if is_gpt2 else _llama_values(table)
    model = configuration.apply_table(Config(), {"model": values}).model
    known = model.max_seq_len
    if max_seq_len is not None and not 1 <= max_seq_len <= known:
        raise ConfigError(f"--max-seq-len {max_seq_len} should be 1 to the {known} tokens that the model knows")
    if is_gpt2 and max_seq_len not in (None, known):
        raise ConfigError(f"--max-seq-len {max_seq_len}: GPT-2's table of positions has {known} rows; give a shorter "
                           "context where it is used (model.max_seq_len)")
    if not is_gpt2:
        model = replace(model, max_seq_len=max_seq_len or min(known, DEFAULT_CONTEXT),
                        n_kv_head=None if model.kv_heads == model.n_head else model.kv_heads,
                        head_dim=None if model.n_head * model.dim_per_head == model.n_embd else model.dim_per_head)
    if model.window is not None:
        types = table.get("layer_types") or ["sliding_attention" if layer >= table["max_window_layers"] else
                                             "full_attention" for layer in range(model.n_layer)]
        types = set(map(str, types if isinstance(types, list) else [types]))
        if types == {"full_attention"} or model.window >= model.max_seq_len:  # such a window hides nothing
            model = replace(model, window=None)
        elif types != {"sliding_attention"}:
            raise ConfigError("use_sliding_window = True in some layers only cannot be converted; a context of at most "
                              f"sliding_window = {model.window} tokens does not need it: --max-seq-len {model.window}")
    configuration.check(Config(model=model, train=TrainConfig(tokens_per_step=model.max_seq_len)))
    return model


def _llama_values(table: dict) -> dict:
    """[model]'s knobs that config.json's names do not give one by one."""
    family, rope_type = table["model_type"], table["rope_type"]
    values = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": family == "qwen3", "position": "rope",
              "rope_theta": table["rope_theta"], "bias": family != "qwen2" and table["attention_bias"]}
    mlp_bias = family == "llama" and table["mlp_bias"]
    if family == "qwen2":
        values["qkv_bias"] = True
    elif mlp_bias != values["bias"]:
        values["mlp_bias"] = mlp_bias
    if rope_type != "default":
        values["rope_scaling"] = {"kind": rope_type} | {key: table[key] for key in ROPE_KEYS[rope_type]}
    if rope_type == "llama3":
        values["rope_scaling"]["original_max_seq_len"] = table.get("original_max_position_embeddings",
                                                                   table["max_position_embeddings"])
    if family != "llama" and table["use_sliding_window"]:
        values["window"] = table["sliding_window"]
    return values


# ---- A Hugging Face folder -> our model, tokenizer and tensors -------------------------------------------------------

@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face folder in our terms. Weights are read when they are asked for."""

    dir: Path
    base: Path  # where config and weights are: dir, or what the adapters there belong to
    model: ModelConfig
    known_seq_len: int  # tokens of context that the model knows; model.max_seq_len may be fewer
    tokenizer: Tokenizer
    tokenizer_dir: Path
    chat_template: str | None
    generation: dict  # generation_config.json, or {"eos_token_id"}; the ids of tokens that end a text, as a list
    rules: list[Rule]  # of all tensors of model
    adapter: lora.PeftAdapter | None = None  # what weights() merges into them

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, float32, by our names, tables padded; in memory once. Raises ConvertError."""
        name = next(iter(self.rules[0].theirs))
        parts = _open_parts(self.base, name)
        if self.model.tie_embeddings and HEAD in parts:
            table, head = parts.setdefault(name, parts[HEAD]), parts[HEAD]  # the head may stand for both
            if table.get_dtype() != head.get_dtype() or not torch.equal(table[:], head[:]):
                raise ConvertError(f"{str(self.base)!r}: config.json ties the embeddings but {HEAD} differs from "
                                   f"{name}; set tie_word_embeddings to false if the head is its own, or remove {HEAD}")
        tensors = {}
        for rule in self.rules:
            tensors[rule.ours] = torch.zeros(rule.shape)
            for name, part in rule.split(tensors[rule.ours]).items():
                part.copy_(parts[name][:])  # in place: nothing exists twice but pages of the file
                if self.adapter is not None:
                    self.adapter.merge_into(part.T if rule.transposed else part, name)
        return tensors


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model or peft's adapters, and no run or checkpoint of ours."""
    return any((folder / name).exists() for name in ("config.json", f"{runs.ADAPTER_CONFIG}.json")) and not any(
        (folder / name).exists() for name in ("config.toml", checkpoint.MANIFEST))


def read_hf(folder: Path, *, max_seq_len: int | None = None, base: Path | None = None) -> HuggingFaceModel:
    """A Hugging Face folder without its weights, of adapters their base's with the adapters: base, else the folder that
    adapter_config.json names. Raises ConvertError, ConfigError, TokenizerError and ChatError."""
    if (folder / "config.json").exists() or not (folder / f"{runs.ADAPTER_CONFIG}.json").exists():
        if base is not None:
            raise ConvertError(f"--base {str(base)!r} is for a folder of adapters ({runs.ADAPTER_CONFIG}.json), and "
                               f"{str(folder)!r} is none; leave it out")
        return _read_model(folder, folder, max_seq_len)
    table, weights = _read_json(folder / f"{runs.ADAPTER_CONFIG}.json"), folder / f"{runs.ADAPTER}.safetensors"
    named = table.get("base_model_name_or_path")
    places = [path for path in (Path(str(named)), folder / str(named)) if named and (path / "config.json").exists()]
    if base is None and not places:
        raise ConvertError(f"{str(folder)!r} holds adapters to {named!r}, which is no folder here with a config.json; "
                           f"name a copy: python convert.py from-hf {quote(str(folder))} RUN --base DIR, then "
                           "use RUN")
    hf = _read_model(base or places[0], folder, max_seq_len)
    if not weights.exists():
        _refuse_pickle(folder)
        raise ConvertError(f"{str(folder)!r} holds no {weights.name}; copy the folder again")
    try:
        adapter = lora.PeftAdapter(_slices(weights), table)
        adapter.check({name: list(part.T.shape if rule.transposed else part.shape) for rule in hf.rules
                       for name, part in rule.split(torch.empty(rule.shape, device="meta")).items()})
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"the adapters in {str(folder)!r} cannot be merged into {str(hf.base)!r}: {error}; merge "
                           "them where peft is installed (merge_and_unload) and convert the result") from None
    return replace(hf, adapter=adapter)


def _read_model(folder: Path, named: Path, max_seq_len: int | None) -> HuggingFaceModel:
    """A folder with config.json: of safetensors the headers alone are read, and of our own exports the biases that may
    be left out. named: what the user named, itself or adapters, whose tokenizer and template count if they have one;
    max_seq_len as in model_config."""
    table = read_config(folder)
    try:
        model = model_config(table, max_seq_len)
    except ConfigError as error:
        raise ConvertError(f"{str(folder / 'config.json')!r}: {error}") from None
    tokenizer_dir = named if (named / TOKENIZER_FILE).exists() else folder
    tokenizer = _tokenizer(tokenizer_dir, table)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConvertError(f"{str(tokenizer_dir)!r}: the tokenizer has ids up to {tokenizer.vocab_size - 1} but "
                           f"vocab_size in config.json is {model.vocab_size}; remove the added tokens, or give the "
                           "model rows for them")
    wanted = list(rules(model, table["model_type"]))
    try:
        expected = {name: list(part.shape) for rule in wanted
                    for name, part in rule.split(torch.empty(rule.shape, device="meta")).items()}
    except RuntimeError as error:  # more bytes than 64 bits count
        raise ConvertError(f"{str(folder / 'config.json')!r} describes no model: {error}; copy it again") from None
    first = next(iter(expected))
    parts = _open_parts(folder, first)
    if model.tie_embeddings and HEAD in parts:
        parts.setdefault(first, parts[HEAD])  # the head may stand for both; weights() compares the two
        expected[HEAD] = expected[first]
    problems = checkpoint.misfits(expected, {name: part.get_shape() for name, part in parts.items()})
    if problems:
        raise ConvertError(f"the weights in {str(folder)!r} do not fit its config.json: {problems}; copy the folder "
                           "again")
    if isinstance(table.get(OURS), dict):
        model = _without_zero_biases(model, table[OURS], wanted, parts)
    return HuggingFaceModel(named, folder, model, table.get("max_position_embeddings", model.max_seq_len), tokenizer,
                            tokenizer_dir, _chat_template(named) or _chat_template(folder),
                            _generation(folder, table, tokenizer), [rule for rule in wanted if _has(model, rule)])


def _generation(folder: Path, table: dict, tokenizer: Tokenizer) -> dict:
    """generation_config.json with all ids that it, or else config.json, lets end a text; empty if it says no more than
    the tokenizer. Ids of plain words are left out: configs are careless with them."""
    generation = runs.load_generation(folder)
    try:
        listed = runs.listed_ends(generation if "eos_token_id" in generation else table)
    except ValueError as error:
        raise ConvertError(f"{str(folder / 'config.json')!r}: {error}; copy it again") from None
    ends = [i for i in dict.fromkeys(listed) if i in tokenizer.added_ids]
    return generation | {"eos_token_id": ends} if generation or set(ends) - {tokenizer.eot} else {}


def _tokenizer(folder: Path, table: dict) -> Tokenizer:
    """Its end-of-text is the eos_token of tokenizer_config.json, else config.json's eos_token_id, else the special
    token with a known name."""
    eos = table.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if (folder / TOKENIZER_FILE).exists():
        return load_tokenizer(str(folder / TOKENIZER_FILE), end_of_text=eos)  # a folder called gpt2 is no name
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists() and table["model_type"] == "gpt2":
        return from_vocab_and_merges(folder, end_of_text=eos)
    other = next((f"{name} but " for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()), "")
    raise ConvertError(f"{str(folder)!r} holds {other}no {TOKENIZER_FILE}; make one where transformers is installed: "
                       f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else that of tokenizer_config.json (of a list of named ones the default). Raises ChatError.
    """
    template = load_template(folder)
    if template is None and (folder / TOKENIZER_CONFIG_FILE).exists():
        template = _read_json(folder / TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}.get(
            "default")
    return check_template(template, folder / TOKENIZER_CONFIG_FILE) if isinstance(template, str) else None


def _open_parts(folder: Path, table: str) -> dict:
    """The tensors of model.safetensors, or of the shards that its index names, by the names that the model with a head
    gives them: the body saved alone (openai's gpt2, say) lacks the prefix of its table of tokens. A value knows shape
    and dtype; [:] reads it; the files are open as long as there are values. Raises ConvertError."""
    paths, index = [folder / WEIGHTS_FILE], folder / f"{WEIGHTS_FILE}.index.json"
    if not paths[0].exists():
        if not index.exists():
            _refuse_pickle(folder)
            raise ConvertError(f"{str(folder)!r} holds neither {WEIGHTS_FILE} nor {index.name}; copy the folder again")
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n
                                                  and n.endswith(".safetensors") for n in names.values()):
            raise ConvertError(f"{str(index)!r} has no weight_map of .safetensors files in its folder; copy it again")
        paths = [folder / name for name in sorted(set(names.values()))]
        missing = [path.name for path in paths if not path.exists()]
        if missing or not paths:
            raise ConvertError(f"{str(index)!r} names {len(missing)} files that are not there "
                               f"({', '.join(missing[:3])}); copy them too")
    prefix, parts = table.split(".")[0] + ".", {}
    for path in paths:
        for name, part in _slices(path).items():
            if not BUFFER.search(name):
                full_name = name if name.startswith((prefix, "lm_head.")) else prefix + name
                if full_name in parts:
                    raise ConvertError(f"{str(path)!r}: {full_name} is there twice, here and before; remove the copy")
                parts[full_name] = part
    return parts


def _slices(path: Path) -> dict:
    """The tensors of a safetensors file by name, unread. Raises ConvertError, also for dtypes that float32 cannot hold.
    """
    try:
        file = safe_open(path, framework="pt")  # reads the header and maps the file into memory
        parts = {name: file.get_slice(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{str(path)!r} cannot be read as safetensors: {error}; copy it again") from None
    for name, part in parts.items():
        if part.get_dtype() not in WEIGHT_DTYPES and not BUFFER.search(name):
            raise ConvertError(f"the weights in {str(path)!r} are not all float32, bfloat16 or float16: {name} "
                               f"{part.get_dtype()}; use the model's original")
    return parts


def _without_zero_biases(model: ModelConfig, switches: dict, wanted: list[Rule], parts: dict) -> ModelConfig:
    """[model] without the biases that to-hf added to a run of these switches, if they are still 0: training may have
    moved them."""
    smaller = replace(model, **{name: has and bool(switches.get(name)) for name, has in _biases(model).items()})
    added = [name for rule in wanted if not _has(smaller, rule) for name in rule.theirs]
    return model if any(parts[name][:].any() for name in added) else smaller


def _biases(config: ModelConfig) -> dict[str, bool]:
    """Which biases a model has, by the switch that says so."""
    return {"bias": config.bias, "qkv_bias": config.has_qkv_bias, "mlp_bias": config.has_mlp_bias}


def _has(config: ModelConfig, rule: Rule) -> bool:
    """Whether a model has this tensor of its family, which may be a bias that it lacks."""
    switch = "qkv_bias" if ".attn.qkv." in rule.ours else "mlp_bias" if ".mlp." in rule.ours else "bias"
    return not rule.ours.endswith(".bias") or _biases(config)[switch]


# ---- ModelConfig -> config.json --------------------------------------------------------------------------------------

def choose_family(config: ModelConfig) -> str:
    """The family that computes what the model computes. Raises ConvertError naming the switches in the way."""
    is_gpt2 = config.position == "learned"
    only_qkv_bias = config.has_qkv_bias and not (config.bias or config.has_mlp_bias)
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
    if family in ("gpt2", "qwen2"):
        return replace(config, bias=family == "gpt2", qkv_bias=True, mlp_bias=None)
    return replace(config, bias=config.bias or config.has_qkv_bias, qkv_bias=None, mlp_bias=config.has_mlp_bias)


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
    scaling, kind = config.rope_scaling, config.rope_scaling.kind if config.rope_scaling is not None else "default"
    rope = {"rope_type": kind} | {key: getattr(scaling, key) for key in ROPE_KEYS[kind]}
    if kind == "llama3":
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    # RoPE by transformers 5's key and by the older ones, which other programs read
    table |= {"rope_parameters": rope | {"rope_theta": config.rope_theta}, "rope_theta": config.rope_theta,
              "rope_scaling": rope if scaling is not None else None, "hidden_act": "silu", "attention_dropout": 0.0}
    if family in ("llama", "qwen3"):
        table["attention_bias"] = complete.bias
    if family == "llama":
        table["mlp_bias"] = complete.has_mlp_bias
    else:
        table["use_sliding_window"] = config.window is not None
    if config.window is not None:
        table |= {"sliding_window": config.window, "max_window_layers": 0,
                  "layer_types": ["sliding_attention"] * config.n_layer}
    return table


# ---- The two commands ------------------------------------------------------------------------------------------------

def from_hf(folder: Path, run: Path, *, max_seq_len: int | None = None, base: Path | None = None,
            note: Callable[[str], None] = lambda line: None) -> None:
    """Write the run folder of a Hugging Face folder, whole or not at all. Raises UserError and MachineError."""
    _refuse_full(run, "run folder")
    hf = read_hf(folder, max_seq_len=max_seq_len, base=base)
    if hf.adapter is not None:
        note(f"adapters: {len(hf.adapter.pairs)} of {str(folder)!r}, merged into {str(hf.base)!r}")
    if words := set(runs.listed_ends(runs.load_generation(hf.base))) - hf.tokenizer.added_ids:
        note(f"{runs.GENERATION_FILE}: eos_token_id {sorted(words)} are plain words or no ids: they end no text")
    T = hf.model.max_seq_len
    if T < hf.known_seq_len and max_seq_len is None:
        note(f"context: {T:,} of the {hf.known_seq_len:,} tokens that the model knows; --max-seq-len "
             f"{hf.known_seq_len} takes all")
    train = {"out_dir": str(run), "tokens_per_step": max(1, 524_288 // T) * T}
    config = configuration.apply_table(Config(model=hf.model), {"train": train})
    weights = hf.weights()
    with _new_folder(run) as temporary:
        checkpoint.save(temporary, 0, tensors={"model": weights}, state={"val_loss": None}, keep=1)
        hf.tokenizer.save(temporary / TOKENIZER_FILE)
        save_template(temporary, hf.chat_template)
        runs.save_generation(temporary, hf.generation)
        files.write_whole(temporary / "config.toml", configuration.to_toml(config))
    with torch.device("meta"):
        parameters = GPT(hf.model).parameter_count()
    note(f"run {str(run)!r}: {parameters:,} parameters in float32, context {T:,}, vocabulary {hf.model.vocab_size:,}, "
         f"end-of-text {hf.tokenizer.eot_token}")


def to_hf(run: Path, folder: Path, *, dtype: str = "float32", note: Callable[[str], None] = lambda line: None) -> None:
    """Write the Hugging Face folder of a run or of one checkpoint, whole or not at all. dtype: float32, bfloat16 or
    float16. Raises UserError and MachineError."""
    _refuse_full(folder, "model folder")
    saved = runs.read_run(run, note)
    config, tokenizer, bos, eos = saved.config.model, saved.tokenizer, saved.tokenizer.start, saved.tokenizer.eot
    family = choose_family(config)
    ours, wanted = saved.weights(), list(rules(family_config(config, family), family))
    problems = checkpoint.misfits({rule.ours: list(rule.shape) for rule in wanted if _has(config, rule)},
                                  checkpoint.shapes_of(ours))
    if problems:
        raise ConvertError(f"checkpoint {str(saved.checkpoint)!r} does not fit the run's config.toml: {problems}; put "
                           "back the config it was trained with")

    def parts() -> Iterator[Tensor]:
        """The values, of one tensor of ours after the other, as they are written."""
        for rule in wanted:  # biases that the family has and the model lacks are 0
            tensor = ours[rule.ours] if rule.ours in ours else torch.zeros(rule.shape)
            if dtype == "float16" and tensor.abs().max() > torch.finfo(torch.float16).max:
                raise ConvertError(f"{rule.ours} of {str(saved.checkpoint)!r} has values beyond float16's 65,504; use "
                                   "--dtype bfloat16")
            yield from (part.to(getattr(torch, dtype)) for part in rule.split(tensor).values())

    theirs = {name: part for rule in wanted for name, part in rule.split(
        torch.empty(rule.shape, dtype=getattr(torch, dtype), device="meta")).items()}
    more_ends = sorted(saved.end_ids - {eos})
    tables = {
        "config.json": hf_config(config, family, bos=bos, eos=eos, dtype=dtype),
        runs.GENERATION_FILE: {"pad_token_id": eos} | saved.generation | {
            "bos_token_id": bos, "eos_token_id": [eos, *more_ends] if more_ends else eos},
        TOKENIZER_CONFIG_FILE: {  # a template shows a bos_token if there is one
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False} | (
                {"bos_token": tokenizer.eot_token} if saved.chat_template is None else {}) | tokenizer.named}
    with _new_folder(folder) as temporary:
        checkpoint.write_tensor_file(temporary / WEIGHTS_FILE, theirs, parts())
        tokenizer.save(temporary / TOKENIZER_FILE)  # may write a tokenizer_config.json, of which ours says more
        for name, table in tables.items():
            files.write_whole(temporary / name, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        save_template(temporary, saved.chat_template)
    note(f"model {str(folder)!r}: {FAMILIES[family]}, {dtype}, of {str(saved.checkpoint)!r}")


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
    except OSError as error:
        raise ConvertError(f"folder {str(path)!r} cannot be made: {error.strerror}; name another") from None
    try:
        with files.disk_errors(path):
            yield temporary
            files.publish(temporary, path)  # an empty folder may stand there
    finally:
        files.delete_folder(temporary, ignore_errors=True)


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python convert.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{from-hf,to-hf}")
    add = commands.add_parser("from-hf", help="make a run of a Hugging Face folder").add_argument
    add("folder", type=Path, metavar="HF_DIR", help="config.json, safetensors, tokenizer.json")
    add("run", type=Path, metavar="RUN", help="new run folder: to sample from, evaluate, and for train.init_from")
    add("--max-seq-len", type=int, metavar="N",
        help=f"context of the run; left out = the model's, with RoPE at most {DEFAULT_CONTEXT}")
    add("--base", type=Path, metavar="DIR", help="of a folder of peft's adapters: the model that they belong to; left "
        "out = the folder that their adapter_config.json names")
    add = commands.add_parser("to-hf", help="make a Hugging Face folder of a run").add_argument
    add("run", type=Path, metavar="RUN", help="run folder (its newest checkpoint) or one checkpoint inside it")
    add("folder", type=Path, metavar="HF_DIR", help="new folder, for from_pretrained and what reads its like")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="of the weights; default float32, the run's own")
    args = parser.parse_args(argv)
    if args.command == "from-hf":
        from_hf(args.folder, args.run, max_seq_len=args.max_seq_len, base=args.base, note=cli.note)
    else:
        to_hf(args.run, args.folder, dtype=args.dtype, note=cli.note)


if __name__ == "__main__":
    exit_cleanly(main)
