"""Conversion against transformers, which makes models for from-hf and loads those of to-hf, in a process of its own."""

import errno
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import convert
import eval as evaluation
import files
import sample
import start
from config import (
    Config,
    ConfigError,
    MachineError,
    ModelConfig,
    RopeScaling,
    TrainConfig,
    UserError,
    exit_cleanly,
    load_run_config,
    to_toml,
)
from convert import ConvertError, from_hf, model_config, read_config, read_hf, to_hf
from data.chat import ChatError, encode_chat, load_template, save_template
from data.prompts import encode_prompt
from data.tokenizer import load_tokenizer, train_bpe
from finetune.runs import read_folder, read_run, take_over
from model import GPT

F32 = {"rtol": 0, "atol": 1e-5}  # the promise; logits are of size 1
TEXT = "Hello there, it's 12 o'clock.\n\n  naïve 日本 <|endoftext|> end"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
GPT2 = {"vocab_size": 1037, "n_layer": 2, "n_head": 3, "n_embd": 24, "n_positions": 60}
LLAMA = {"vocab_size": 301, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 60, "tie_word_embeddings": False,
         "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
HF_CASES = {  # name -> class, config; the weights' dtype and a size for shards where they are not float32 in one file
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_untied": ("GPT2LMHeadModel", GPT2 | {"activation_function": "gelu", "tie_word_embeddings": False,
                                               "n_inner": 44, "layer_norm_epsilon": 1e-3}, "float32", "20KB"),
    "gpt2_relu2": ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu2", "vocab_size": 301}),
    "llama2": ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 4}),
    "llama3": ("LlamaForCausalLM", LLAMA | {
        "vocab_size": 1037, "tie_word_embeddings": True, "hidden_size": 64,
        "rope_parameters": LLAMA3 | {"rope_theta": 500.0}}, "bfloat16", "20KB"),
    "llama_biased": ("LlamaForCausalLM", LLAMA | {
        "attention_bias": True, "mlp_bias": True, "head_dim": 10,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama_attention_bias": ("LlamaForCausalLM", LLAMA | {"attention_bias": True}),
    "llama_mlp_bias": ("LlamaForCausalLM", LLAMA | {"mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True, "vocab_size": 1037}, "float16", "5GB"),
    "qwen2_window": ("Qwen2ForCausalLM", LLAMA | {"use_sliding_window": True, "sliding_window": 7,
                                                  "max_window_layers": 0}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 10, "rms_norm_eps": 1e-3}),
    "qwen3_biased": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}),
}

SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=24, vocab_size=301, max_seq_len=60)
MODERN = replace(SMALL, n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", mlp_hidden=40, bias=False)
RUN_CASES = {  # name -> [model] and the family it should become
    "nanogpt": (replace(SMALL, mlp="gelu_exact", bias=False, vocab_size=1037), "GPT2LMHeadModel"),
    "gpt2_qkv_bias": (replace(SMALL, bias=False, qkv_bias=True, tie_embeddings=False), "GPT2LMHeadModel"),
    "gpt2_no_mlp_bias": (replace(SMALL, mlp_bias=False, mlp="relu2"), "GPT2LMHeadModel"),
    "llama": (replace(MODERN, vocab_size=1037, tie_embeddings=False, rope_scaling=RopeScaling(
        kind="llama3", factor=4.0, original_max_seq_len=32)), "LlamaForCausalLM"),
    "llama_proj_bias": (replace(MODERN, bias=True, qkv_bias=False, mlp_bias=False), "LlamaForCausalLM"),
    "qwen2": (replace(MODERN, qkv_bias=True), "Qwen2ForCausalLM"),
    "qwen2_window_no_bias": (replace(MODERN, window=7), "Qwen2ForCausalLM"),
    "demo": (replace(MODERN, qk_norm=True, n_kv_head=None, vocab_size=1037), "Qwen3ForCausalLM"),
    "qwen3_qkv_bias": (replace(MODERN, qk_norm=True, qkv_bias=True, head_dim=10), "Qwen3ForCausalLM"),
}


@dataclass
class Bench:
    """The folder NAME/ of each case: hf (made by transformers), run, exported (by us), theirs.* (loaded by them)."""

    folder: Path

    def path(self, case: str, name: str) -> Path:
        return self.folder / case / name


def random_tensors(config: ModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            rows = p[:config.vocab_size] if name in ("wte.weight", "lm_head.weight") else p
            rows.normal_(std=0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5)
            rows.add_(1.0 if name.endswith("norm.weight") else 0.0)
        model.head_weight.mul_(0.3)
    return {name: p.detach() for name, p in model.named_parameters()}


def make_run(run: Path, config: ModelConfig, tokenizer, *, template: str | None = None) -> Path:
    checkpoint.save(run, 3, tensors={"model": random_tensors(config)}, state={"val_loss": None}, keep=1)
    tokenizer.save(run / "tokenizer.json")
    (run / "config.toml").write_text(to_toml(Config(model=config, train=TrainConfig(tokens_per_step=60))))
    if template is not None:
        save_template(run, template)
    return run


def small_tokenizer():
    """299 ids, so that models have rows without a token."""
    return train_bpe(["Hello there, it's a quarter past one. Who is there? They are here, then, with dogs. "], 299)


def with_bos(file_text: str) -> str:
    """The tokenizer.json with <s> before every text, as Llama's."""
    file = json.loads(file_text)
    file["added_tokens"].append(file["added_tokens"][0] | {"id": 299, "content": "<s>"})
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    file["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {
        "<s>": {"id": "<s>", "ids": [299], "tokens": ["<s>"]}}}
    return json.dumps(file)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    """Every case through both directions; transformers is started once."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: conversion stays unchecked against it")
    folder, tokenizer = tmp_path_factory.mktemp("convert"), small_tokenizer()
    for name, (hf_class, config, *rest) in HF_CASES.items():
        (folder / name).mkdir()
        dtype, shard = rest or ("float32", "5GB")
        case = {"class": hf_class, "config": config, "dtype": dtype, "max_shard_size": shard}
        (folder / name / "case.json").write_text(json.dumps(case))
    (folder / "text.txt").write_text(TEXT)
    script = Path(__file__).with_name("convert_oracle.py")
    with subprocess.Popen([sys.executable, "-I", str(script), str(folder)], cwd=folder, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if process.stdout.readline() != "made\n":
            pytest.fail(process.communicate()[1])
        for name in HF_CASES:
            tokenizer.save(folder / name / "hf" / "tokenizer.json")
            if name == "llama2":
                (folder / name / "hf" / "tokenizer.json").write_text(with_bos(tokenizer.file_text))
            from_hf(folder / name / "hf", folder / name / "run")
            to_hf(folder / name / "run", folder / name / "exported")
            tokens = load_file(folder / name / "logits.safetensors")["tokens"]
            save_file({"tokens": tokens}, folder / name / "tokens.safetensors")
        for name, (config, _) in RUN_CASES.items():
            make_run(folder / f"run_{name}" / "run", config, tokenizer, template=TEMPLATE)
            to_hf(folder / f"run_{name}" / "run", folder / f"run_{name}" / "exported")
            tokens = torch.randint(config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
            save_file({"tokens": tokens}, folder / f"run_{name}" / "tokens.safetensors")
        make_ending_run(folder / "run_ending")
        for name in ADAPTED:
            make_adapted(folder / name / "exported", folder / f"adapted_{name}")
        _, errors = process.communicate("go\n")
    assert process.returncode == 0, errors
    return Bench(folder)


def make_ending_run(folder: Path) -> None:
    """A run whose generation_config.json ends a text with the third token that it writes greedily."""
    tokens = torch.randint(301, (2, 50), generator=torch.Generator().manual_seed(1))
    make_run(folder / "run", MODERN, small_tokenizer())
    (folder / "run" / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [298, greedy(folder / "run", tokens[:1, :5])[2]], "temperature": 0.6, "top_p": 0.9}))
    to_hf(folder / "run", folder / "exported")
    save_file({"tokens": tokens}, folder / "tokens.safetensors")


ADAPTED = {  # of HF_CASES: what its adapters are on, and keys of adapter_config.json
    "gpt2": (("attn.c_attn", "mlp.c_proj"), {"fan_in_fan_out": True, "use_rslora": True}),
    "llama3": (("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"),
               {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 10, "v_proj": 1}}),
}


def make_adapted(base: Path, folder: Path) -> None:
    """folder/adapter as peft writes it, for the model in base; exported: that model with the formula's weights, worked
    in float64 by Hugging Face's names; run: what from-hf makes of the adapter."""
    targets, config = ADAPTED[base.parent.name]
    is_gpt2, pick = "fan_in_fan_out" in config, torch.Generator().manual_seed(0)
    weights, adapters = hf_tensors(base), {}
    norm = "transformer.ln_f.weight" if is_gpt2 else "model.norm.weight"
    adapters[f"base_model.model.{norm}"] = torch.rand(weights[norm].shape, generator=pick) + 0.5  # modules_to_save
    weights[norm] = adapters[f"base_model.model.{norm}"]
    for layer in range(2):
        for target in targets:
            module = f"transformer.h.{layer}.{target}" if is_gpt2 else f"model.layers.{layer}.{target}"
            W, r = weights[f"{module}.weight"], 2 if "down" in target else 3
            outputs, inputs = W.T.shape if is_gpt2 else W.shape
            A, B = torch.randn(r, inputs, generator=pick) / 4, torch.randn(outputs, r, generator=pick) / 4
            adapters |= {f"base_model.model.{module}.lora_{x}.weight": t for x, t in (("A", A), ("B", B))}
            alpha = 10 if module == "model.layers.1.mlp.down_proj" else 1 if "v_proj" in target else 6
            delta = alpha / (r ** 0.5 if is_gpt2 else r) * (B.double() @ A.double())
            weights[f"{module}.weight"] = (W.double() + (delta.T if is_gpt2 else delta)).float()
    shutil.copytree(base, folder / "exported")
    save_file(weights, folder / "exported" / "model.safetensors", {"format": "pt"})
    (folder / "adapter").mkdir()
    save_file(adapters, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": str(base), "bias": "none",
         "target_modules": list(targets), "use_dora": False, "init_lora_weights": True, "lora_dropout": 0.1,
         "task_type": "CAUSAL_LM", "inference_mode": True, "megatron_core": "megatron.core", "peft_version": "0.19.1",
         "qalora_group_size": 16, "alora_invocation_tokens": None, "loftq_config": {}, "use_bdlora": None,
         "auto_mapping": {"parent_library": "transformers"}} | config))  # as peft 0.19 writes it
    from_hf(folder / "adapter", folder / "run")
    save_file({"tokens": load_file(base.parent / "tokens.safetensors")["tokens"]}, folder / "tokens.safetensors")


def greedy(run: Path, prompt: Tensor) -> list[int]:
    """The tokens that follow a prompt (1, T), 8 of them."""
    model, _ = sample.load_model(run, device=torch.device("cpu"), dtype="float32", note=lambda line: None)
    steps = sample.generate(model, prompt.tolist(), max_new_tokens=8, sampling=sample.Sampling(temperature=0))
    return [token for token, in steps]


def our_logits(run: Path, tokens: Tensor) -> Tensor:
    model, _ = sample.load_model(run, device=torch.device("cpu"), dtype="float32", note=lambda line: None)
    with torch.no_grad():
        return model(tokens)


def run_tensors(run: Path) -> dict[str, Tensor]:
    return checkpoint.load_tensors(checkpoint.resolve(run, lambda line: None), "model")


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name].dtype))]
    assert wrong == []


# ---- Against transformers --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", HF_CASES)
def test_a_converted_model_gives_transformers_logits(name, bench):
    made = load_file(bench.path(name, "logits.safetensors"))
    torch.testing.assert_close(our_logits(bench.path(name, "run"), made["tokens"]), made["logits"], **F32)
    assert made["logits"].std() > 0.3  # a model of zeros would be equal too


@pytest.mark.parametrize("name", HF_CASES)
def test_there_and_back_gives_the_same_tensors_and_logits_in_transformers(name, bench):
    assert_same(hf_tensors(bench.path(name, "exported")), hf_tensors(bench.path(name, "hf")))
    theirs = load_file(bench.path(name, "theirs.safetensors"))["logits"]
    assert torch.equal(theirs, load_file(bench.path(name, "logits.safetensors"))["logits"])


@pytest.mark.parametrize("name", RUN_CASES)
def test_transformers_gives_an_exported_runs_logits(name, bench):
    config, hf_class = RUN_CASES[name]
    theirs = json.loads(bench.path(f"run_{name}", "theirs.json").read_text())
    assert (theirs["class"], theirs["dtype"]) == (hf_class, "torch.float32")
    tokens = load_file(bench.path(f"run_{name}", "tokens.safetensors"))["tokens"]
    logits = load_file(bench.path(f"run_{name}", "theirs.safetensors"))["logits"]
    assert logits.shape == (2, 50, config.vocab_size)  # the padding is cut
    torch.testing.assert_close(our_logits(bench.path(f"run_{name}", "run"), tokens), logits, **F32)


@pytest.mark.parametrize("name", RUN_CASES)
def test_a_run_exported_and_converted_again_is_equal_to_the_bit(name, bench, tmp_path):
    from_hf(bench.path(f"run_{name}", "exported"), tmp_path / "again")
    assert_same(run_tensors(tmp_path / "again"), run_tensors(bench.path(f"run_{name}", "run")))
    again = load_run_config(tmp_path / "again").model
    ours = RUN_CASES[name][0]
    for switch in ("n_head", "kv_heads", "dim_per_head", "mlp_width", "vocab_size", "max_seq_len", "norm", "norm_eps",
                   "position", "rope_theta", "rope_scaling", "mlp", "qk_norm", "bias", "has_qkv_bias", "has_mlp_bias",
                   "tie_embeddings", "window"):
        assert getattr(again, switch) == getattr(ours, switch), switch
    assert load_template(tmp_path / "again") == TEMPLATE


def test_transformers_tokenizer_of_an_export_gives_our_ids_and_end_of_text(bench):
    theirs = json.loads(bench.path("run_demo", "theirs.json").read_text())
    tokenizer = small_tokenizer()
    assert theirs["ids"] == tokenizer.encode(TEXT).tolist()
    assert theirs["decoded"] == TEXT
    assert theirs["eos"] == theirs["eos_of_generation"] == theirs["eos_of_config"] == tokenizer.eot == 298
    assert (theirs["template"], theirs["chat"]) == (TEMPLATE, "<user>hi")


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_a_prompt_begins_as_transformers_begins_it(name, bench):
    theirs = json.loads(bench.path(name, "theirs.json").read_text())
    tokenizer = load_tokenizer(bench.path(name, "run"))
    assert theirs["ids_of_prompt"] == encode_prompt(tokenizer, TEXT).tolist()
    assert encode_prompt(tokenizer, "").tolist() == [tokenizer.start] == [{"gpt2": 298, "llama2": 299}[name]]
    assert theirs["bos"] == {"gpt2": "<|endoftext|>", "llama2": "<s>"}[name]


def test_greedy_generation_is_transformers(bench):
    for name in ("gpt2", "llama3", "run_demo"):
        prompt = load_file(bench.path(name, "tokens.safetensors"))["tokens"][:1, :5]
        assert prompt[0].tolist() + greedy(bench.path(name, "run"), prompt) == \
            load_file(bench.path(name, "theirs.safetensors"))["generated"][0].tolist()


def test_transformers_stops_an_export_where_the_run_stops(bench):
    ours, ends = [], read_run(bench.path("run_ending", "run"), pytest.fail).end_ids
    prompt = load_file(bench.path("run_ending", "tokens.safetensors"))["tokens"][:1, :5]
    for token in greedy(bench.path("run_ending", "run"), prompt):
        ours.append(token)
        if token in ends:
            break
    theirs = load_file(bench.path("run_ending", "theirs.safetensors"))["generated"][0].tolist()
    assert theirs == prompt[0].tolist() + ours and len(ours) <= 3


@pytest.mark.parametrize("name", ADAPTED)
def test_merged_adapters_give_the_formulas_weights_and_transformers_logits(name, bench):
    tokens = load_file(bench.path(name, "tokens.safetensors"))["tokens"]
    theirs = load_file(bench.path(f"adapted_{name}", "theirs.safetensors"))["logits"]
    torch.testing.assert_close(our_logits(bench.path(f"adapted_{name}", "run"), tokens), theirs, **F32)
    assert (theirs - our_logits(bench.path(name, "run"), tokens)).std() > 0.1
    exported = read_hf(bench.path(f"adapted_{name}", "exported")).weights()
    for weight, ours in run_tensors(bench.path(f"adapted_{name}", "run")).items():
        torch.testing.assert_close(ours, exported[weight], rtol=1e-6, atol=1e-6)  # float32 products


def test_the_sharded_case_has_shards(bench):
    assert len(list(bench.path("llama3", "hf").glob("model-*.safetensors"))) > 2
    assert not bench.path("llama3", "hf").joinpath("model.safetensors").exists()


# ---- Folders as they are found in the world, made from one of ours by hand -------------------------------------------

def make_hf(folder: Path, config: ModelConfig = replace(SMALL, vocab_size=1037), **changes: object) -> Path:  # noqa: B008
    """An exported folder; changes: keys of its config.json, None = removed."""
    to_hf(make_run(folder.with_name(folder.name + "_of"), config, small_tokenizer()), folder)
    return change_config(folder, **changes)


def change_config(folder: Path, **changes: object) -> Path:
    table = json.loads((folder / "config.json").read_text()) | changes
    table = {key: value for key, value in table.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def config_of(folder: Path, *, max_seq_len: int | None = None) -> ModelConfig:
    return model_config(read_config(folder), max_seq_len)


def change_weights(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def tensors_read(monkeypatch) -> list[str]:
    """The names of the tensors that are read from safetensors files, as they are."""
    names = []

    @dataclass
    class Part:
        part: object
        name: str

        def __getattr__(self, attribute: str):
            return getattr(self.part, attribute)

        def __getitem__(self, index: object) -> Tensor:
            names.append(self.name)
            return self.part[index]

    class File:
        def __init__(self, path: Path, framework: str):
            self.file = safe_open(path, framework)
            self.keys = self.file.keys

        def get_slice(self, name: str) -> Part:
            return Part(self.file.get_slice(name), name)

    monkeypatch.setattr(convert, "safe_open", File)
    return names


def test_a_folder_is_known_from_its_headers_and_its_weights_are_read_once_when_asked_for(tmp_path, tensors_read):
    folder = make_hf(tmp_path / "hf")
    hf = read_hf(folder)
    assert (hf.dir, hf.model.n_embd, hf.known_seq_len, hf.tokenizer.vocab_size) == (folder, 24, 60, 299)
    assert tensors_read == []
    assert_same(hf.weights(), run_tensors(tmp_path / "hf_of"))
    assert sorted(tensors_read) == sorted(hf_tensors(folder))


def test_of_our_own_exports_the_biases_that_may_be_left_out_are_looked_at(tmp_path, tensors_read):
    folder = make_hf(tmp_path / "hf", replace(SMALL, bias=False))
    assert read_hf(folder).model.bias is False
    assert sorted(tensors_read) == sorted(name for name in hf_tensors(folder) if name.endswith(".bias"))


def test_weights_saved_without_prefix_with_masks_and_the_tied_head_are_read(tmp_path):
    """As openai's own gpt2 folder and older transformers have them."""
    folder = make_hf(tmp_path / "hf")
    expected = read_hf(folder).weights()

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 60, 60)
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    assert_same(read_hf(change_weights(folder, change)).weights(), expected)
    change_weights(folder, lambda tensors: tensors.pop("wte.weight"))  # the head alone stands for both
    assert_same(read_hf(folder).weights(), expected)


def test_a_head_that_differs_from_the_table_it_is_tied_to_is_refused(tmp_path):
    folder = make_hf(tmp_path / "hf")
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    with pytest.raises(ConvertError, match="lm_head.weight differs.*tie_word_embeddings"):
        from_hf(folder, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "hf_of"]


@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0), RopeScaling(kind="llama3", factor=8.0)], ids=str)
def test_configs_of_older_transformers_mean_the_same(tmp_path, scaling):
    config = replace(MODERN, rope_theta=5e5, rope_scaling=scaling, tie_embeddings=False, n_kv_head=None)
    folder = make_hf(tmp_path / "hf", config)
    new = config_of(change_config(folder, rope_scaling=None))
    assert new == config_of(change_config(folder, rope_parameters=None, rope_scaling=scaling and {
        "type" if scaling.kind == "linear" else "rope_type": scaling.kind, "factor": scaling.factor,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}))
    assert (new.rope_theta, new.rope_scaling, new.kv_heads) == (5e5, scaling, 4)
    old = change_config(folder, num_key_value_heads=None, head_dim=None, attention_bias=None, mlp_bias=None)
    assert config_of(change_config(old, tie_word_embeddings=None)) == new


def test_a_folder_may_be_called_as_a_tokenizer_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_hf(Path("gpt2"))
    from_hf(Path("gpt2"), Path("bytes"))
    to_hf(Path("bytes"), Path("cl100k_base"))
    assert read_hf(Path("cl100k_base")).tokenizer.vocab_size == 299


def test_a_long_context_is_cut_with_a_note_unless_it_is_asked_for(tmp_path):
    folder, notes = make_hf(tmp_path / "hf", MODERN, max_position_embeddings=131_072), []
    from_hf(folder, tmp_path / "run", note=notes.append)
    assert load_run_config(tmp_path / "run").model.max_seq_len == 8192
    assert "8,192 of the 131,072" in notes[0] and "--max-seq-len 131072" in notes[0]
    from_hf(folder, tmp_path / "long", max_seq_len=20_000, note=notes.append)
    assert load_run_config(tmp_path / "long").model.max_seq_len == 20_000
    with pytest.raises(ConvertError, match="config.json.*--max-seq-len 131073.*131072"):
        read_hf(folder, max_seq_len=131_073)


def test_a_sliding_window_is_taken_where_all_layers_have_it_or_none_needs_it(tmp_path):
    folder = make_hf(tmp_path / "hf", replace(MODERN, qkv_bias=True))
    window = {"use_sliding_window": True, "sliding_window": 17}
    assert config_of(change_config(folder, use_sliding_window=False, sliding_window=17)).window is None
    assert config_of(change_config(folder, **window, max_window_layers=0)).window == 17
    assert config_of(change_config(folder, **window, max_window_layers=2)).window is None
    llama = make_hf(tmp_path / "llama", MODERN)  # transformers' Llama has no window, whatever its config says
    assert config_of(change_config(llama, **window, max_window_layers=0)).window is None
    change_config(folder, max_window_layers=1)
    assert config_of(folder, max_seq_len=17).window is None
    with pytest.raises(ConfigError, match="some layers only.*--max-seq-len 17"):
        config_of(folder)
    with pytest.raises(ConvertError, match="config.json.*max_window_layers = 'x' should be a whole number"):
        read_hf(change_config(folder, max_window_layers="x"))


def test_end_of_text_is_what_the_folder_says(tmp_path):
    """tokenizer_config.json before config.json before the known names; the run and its shards keep it."""
    folder = make_hf(tmp_path / "hf")
    file = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for i, token in ((299, "<|im_start|>"), (300, "<|im_end|>")):
        file["added_tokens"].append({"id": i, "content": token, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(file))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    from_hf(folder, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").eot == 300
    to_hf(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 300
    (folder / "tokenizer_config.json").unlink()
    change_config(folder, eos_token_id=[300, 298])
    assert read_hf(folder).tokenizer.eot == 300
    assert read_hf(change_config(folder, eos_token_id=None)).tokenizer.eot == 298
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="eos_token '</s>'.*none of its special tokens"):
        read_hf(folder)


def add_specials(folder: Path, *tokens: str) -> None:
    """Special tokens from id 299 on."""
    file = json.loads((folder / "tokenizer.json").read_text())
    file["added_tokens"] += [file["added_tokens"][0] | {"id": 299 + n, "content": t} for n, t in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(file))


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize(("config", "generation", "expected"), [
    (298, {"eos_token_id": [299, 298, 5], "top_k": 20}, [298, 299]),  # 5 is a word: configs are careless
    ([298, 299], None, [298, 299]), (299, {"eos_token_id": 298}, 298), (None, {"eos_token_id": None}, 298),
    (50256, None, 298), ([298, 299], {"temperature": 0.6}, [298, 299])])
def test_all_ends_of_generation_of_a_model_survive_there_and_back(tmp_path, config, generation, expected):
    folder = change_config(make_hf(tmp_path / "hf"), eos_token_id=config)
    add_specials(folder, "<|eot_id|>")
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation | {"_from_model_config": True}))
    notes = []
    from_hf(folder, tmp_path / "run", note=notes.append)
    assert ("eos_token_id [5] are plain words" in notes[0]) == (generation is not None and "top_k" in generation)
    assert read_run(tmp_path / "run", pytest.fail).end_ids == set(expected if isinstance(expected, list) else [298])
    to_hf(tmp_path / "run", tmp_path / "again")
    table = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert table == {"pad_token_id": 298, **(generation or {}), "bos_token_id": 298, "eos_token_id": expected}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 298


def test_what_ends_a_turn_in_the_template_ends_the_generation_of_an_export(tmp_path):
    folder = make_hf(tmp_path / "hf")
    add_specials(folder, "<|im_start|>", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML)
    from_hf(folder, tmp_path / "run")
    assert read_run(tmp_path / "run", pytest.fail).end_ids == {298, 300}
    to_hf(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [298, 300]


def test_vocab_and_merges_alone_make_gpt2s_tokenizer(tmp_path):
    folder = make_hf(tmp_path / "hf")
    expected = read_hf(folder).tokenizer
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]) + "\n")
    with pytest.raises(ConfigError, match="has no tokenizer.json to prepare text with; convert it first.*from-hf"):
        take_over(Config(train=TrainConfig(init_from=str(folder))), set(), read_hf(folder))
    from_hf(folder, tmp_path / "run")  # what the line says
    config = take_over(Config(train=TrainConfig(init_from="run")), set(), read_folder(tmp_path / "run"))
    assert load_tokenizer(config.data.tokenizer).eot == 298
    ours = read_hf(folder).tokenizer
    assert (ours.encode(TEXT) == expected.encode(TEXT)).all() and (ours.eot, ours.vocab_size) == (298, 299)


@pytest.mark.parametrize(("template", "expected"), [
    ("a{{ x }}", "a{{ x }}"), (None, None),
    ([{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}], "yes")])
def test_the_chat_template_of_tokenizer_config_is_kept(tmp_path, template, expected):
    folder = make_hf(tmp_path / "hf")
    table = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    from_hf(folder, tmp_path / "run")
    assert load_template(tmp_path / "run") == expected


def test_the_named_tokens_of_tokenizer_config_go_through_a_run_and_its_export(tmp_path):
    folder = make_hf(tmp_path / "hf")
    file = json.loads((folder / "tokenizer.json").read_text())
    for number, token in enumerate(("<s>", "<pad>")):
        file["added_tokens"].append(file["added_tokens"][0] | {"id": 299 + number, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(file))
    table = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(table | named))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ pad_token }}")
    from_hf(folder, tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "out")
    for saved in (tmp_path / "run", tmp_path / "out"):
        tokenizer = load_tokenizer(saved)
        assert tokenizer.named == named and tokenizer.start == 299
        assert encode_chat(tokenizer, load_template(saved), []).tolist() == [299, 300]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 299


def test_an_export_with_a_template_names_no_token_that_the_template_would_show_and_the_run_would_not(tmp_path):
    folder = make_hf(tmp_path / "hf")
    table = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}x")
    from_hf(folder, tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "out")
    assert "bos_token" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_is_no_jinja_is_found_at_conversion_and_names_its_file(name, tmp_path):
    folder, bad = make_hf(tmp_path / "hf"), "{% for m in messages %}{{ m.content | nofilter }}{% endfor %}"
    if name.endswith(".json"):
        bad = json.dumps(json.loads((folder / name).read_text()) | {"chat_template": bad})
    (folder / name).write_text(bad)
    with pytest.raises(ChatError, match=f"hf/{name}': the chat template is not valid Jinja at line 1: No filter named"):
        from_hf(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_zero_biases_added_by_an_export_stay_if_training_moved_them(tmp_path):
    folder = make_hf(tmp_path / "hf", replace(SMALL, bias=False))
    assert read_hf(folder).model.bias is False
    change_weights(folder, lambda tensors: tensors["transformer.h.1.mlp.c_fc.bias"].add_(1e-3))
    hf = read_hf(folder)
    assert hf.model.bias is True and (hf.weights()["blocks.1.mlp.fc.bias"] == 1e-3).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_exports_are_the_rounded_weights_say_so_and_are_read_back_equal(tmp_path, dtype):
    run = make_run(tmp_path / "run", MODERN, small_tokenizer())
    to_hf(run, tmp_path / "hf", dtype=dtype)
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert table["dtype"] == table["torch_dtype"] == dtype
    theirs = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert theirs.dtype == getattr(torch, dtype)
    from_hf(tmp_path / "hf", tmp_path / "again")
    assert_same(run_tensors(tmp_path / "again"), {name: tensor.to(theirs.dtype).float()
                                                  for name, tensor in run_tensors(run).items()})


def test_weights_beyond_float16_are_refused_in_it(tmp_path, capsys):
    tensors = random_tensors(MODERN)
    tensors["blocks.1.mlp.fc.weight"][0, 0] = 7e4
    run = make_run(tmp_path / "run", MODERN, small_tokenizer())
    checkpoint.save(run, 4, tensors={"model": tensors}, state={"val_loss": None}, keep=1)
    error = refused(capsys, "to-hf", run, tmp_path / "hf", "--dtype", "float16")
    assert "blocks.1.mlp.fc.weight" in error and "use --dtype bfloat16" in error
    to_hf(run, tmp_path / "hf", dtype="bfloat16")


# ---- What cannot be converted ----------------------------------------------------------------------------------------

def refused(capsys, *argv: object) -> str:
    """The line of a command that must end with exit 2, on stderr alone."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["convert.py", *map(str, argv)])
        exit_cleanly(convert.main)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("gpt2", {"model_type": "mistral"}, "model_type 'mistral'.*none of gpt2, llama, qwen2, qwen3"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type"),
    ("gpt2", {"activation_function": "silu"}, "activation_function = 'silu'.*'gelu_new'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_head": 5}, "n_embd = 24 does not divide by model.n_head = 5"),
    ("gpt2", {"n_layer": "two"}, "n_layer = 'two'"),
    ("gpt2", {"n_layer": 0}, "n_layer = 0"),
    ("gpt2", {"n_embd": None}, "has no 'n_embd'"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config.*quantized"),
    ("gpt2", {"n_positions": 61}, r"wpe.weight \[60, 24\] for \[61, 24\]"),
    ("gpt2", {"n_layer": 3}, "missing transformer.h.2.ln_1.weight"),
    ("gpt2", {"n_layer": 1}, "unknown transformer.h.1"),
    ("gpt2", {"tie_word_embeddings": False}, "missing lm_head.weight"),
    ("gpt2", {"vocab_size": 200}, "ids up to 298 but vocab_size in config.json is 200"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'.*'default' or 'linear'"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
    ("llama", {"rope_scaling": {"factor": 8.0}}, "rope_type = None.*'default' or 'linear'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_type = 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_type = 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor = 0.5 should be at least 1"),
    ("llama", {"rope_scaling": "linear"}, "'linear' cannot be converted"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat table"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
    ("llama", {"use_mrope": True}, "use_mrope = True"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"num_key_value_heads": 3}, "n_head = 4 does not divide by model.n_kv_head = 3"),
    ("llama", {"attention_bias": True}, "missing model.layers.0.self_attn.q_proj.bias"),
    ("llama", {"head_dim": 5}, "even head_dim"),
    ("llama", {"model_type": "qwen3"}, "missing model.layers.0.self_attn.q_norm.weight"),
    ("llama", {"rope_theta": "big", "rope_parameters": None}, "rope_theta = 'big' should be a number")])
def test_a_config_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path, capsys, family, changes, message):
    folder = make_hf(tmp_path / "hf", SMALL if family == "gpt2" else MODERN, **changes)
    error = refused(capsys, "from-hf", folder, tmp_path / "run")
    assert re.search(message, error), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "hf_of"]


def drop(name: str):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(("change", "message"), [
    (drop("transformer.ln_f.bias"), "missing transformer.ln_f.bias"),
    (lambda t: t.update(extra=torch.ones(1)), "unknown transformer.extra"),
    (lambda t: t.update({"transformer.ln_f.bias": torch.ones(25)}), r"ln_f.bias \[25\] for \[24\]"),
    (lambda t: t.update({"transformer.ln_f.bias": torch.ones(24, dtype=torch.int8)}), "not all float32.*ln_f.bias I8")])
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, capsys, change, message):
    folder = change_weights(make_hf(tmp_path / "hf"), change)
    error = refused(capsys, "from-hf", folder, tmp_path / "run")
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def make_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def with_header(header: object) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + b"\0"


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "config.json").write_text("{"), "config.json' cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "cannot be read as safetensors"),
    (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin' is a pickle.*CONVERT.md"),
    (lambda f: (only(f), (f / "ckpt.pt").write_bytes(b"")), "ckpt.pt' is a pickle.*CONVERT.md"),
    (lambda f: make_index(f, {"a": "model-00002-of-00002.safetensors"}), "1 files.*model-00002"),
    (lambda f: make_index(f, {"a": "../hf_of/checkpoints/step_00000003/model.safetensors"}), "no weight_map of .safet"),
    (lambda f: make_index(f, {"a": ".."}), "no weight_map of .safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]), "safetensors: .*"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\0" + b"{"), "safetensors: .*eader"),
    (lambda f: (f / "model.safetensors").write_bytes(with_header({"a": {"dtype": "F3", "shape": [], "data_offsets": [
        0, 1]}})), "safetensors: .*F3"),
    (lambda f: (f / "model.safetensors").write_bytes(with_header("[" * 100_000)), "cannot be read as safetensors"),
    (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json' cannot be read as JSON: it is nested too"),
    (lambda f: (f / "tokenizer.json").write_text("[" * 100_000), "tokenizer.json' .*nested too deeply"),
    (lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000), "tokenizer_config.json' .*nested too deeply"),
    (lambda f: (f / "generation_config.json").write_text("[" * 100_000), "generation_config.json' .*nested too"),
    (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [298, "x"]}'), "eos_token_id = .298, 'x'"),
    (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json' cannot be read"),
    (lambda f: (only(f, "config.json", "tokenizer.json", "model.safetensors"), change_config(f, eos_token_id=1.5)),
     "config.json': eos_token_id = 1.5 should be an id"),
    (lambda f: (make_index(f, {"a": "model-00001-of-00002.safetensors", "b": "b.safetensors"}), save_file(
        {"transformer.ln_f.bias": torch.ones(24)}, f / "b.safetensors")), "transformer.ln_f.bias is there twice"),
    (lambda f: (make_index(f, {}), (f / "model.safetensors.index.json").write_text("[" * 100_000)), "nested too deep"),
    (lambda f: (f / "config.json").write_text('{"n_embd": 24, ' + (f / "config.json").read_text()[1:].replace(
        '"n_embd": 24', '"n_embd": 48')), "gives 'n_embd' two values"),
    (lambda f: make_index(f, None), "no weight_map"),
    (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json.*save_pretrained"),
    (lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "holds tokenizer.model but no.*save_pretrained"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer")])
def test_a_damaged_folder_is_refused_and_nothing_is_written(tmp_path, capsys, damage, message):
    folder = make_hf(tmp_path / "hf")
    damage(folder)
    error = refused(capsys, "from-hf", folder, tmp_path / "run")
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def make_adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **config: object) -> Path:
    """A folder as peft's, by default of rank 2 on one matrix of make_hf's."""
    stem = "base_model.model.transformer.h.0.attn.c_proj"
    folder.mkdir()
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 24), f"{stem}.lora_B.weight": torch.ones(24, 2)}
              | (tensors or {}), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "hf"} | config))
    return folder


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "IA3"}, "peft_type = 'IA3' is not plain LoRA; merge them where peft is installed"),
    ({"use_dora": True}, "use_dora = True"), ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens = \[5, 6\] is not plain LoRA; merge them where"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config = .* is not plain LoRA"), ({"newer": 1}, "newer = 1 is not plain"),
    ({"tensors": {"base_model.model.lm_head.weight": torch.ones(1037, 24)}}, r"lm_head.weight \[1037, 24\] has no "),
    ({"tensors": {"base_model.model.transformer.h.2.attn.c_proj.lora_A.weight": torch.ones(2, 24)}}, "h.2.*lora_B"),
    ({"tensors": {"base_model.model.transformer.h.0.attn.c_proj.lora_A.weight": torch.ones(2, 25)}}, r"\[24, 25\]"),
    ({"tensors": {"base_model.model.transformer.h.0.attn.c_proj.lora_A.weight": torch.ones(3, 24)}}, "no place there"),
    ({"tensors": {"x": torch.ones(1, dtype=torch.int8)}}, "not all float32, bfloat16 or float16: x I8"),
    ({"lora_alpha": None}, "cannot be merged"), ({"base_model_name_or_path": "meta/ll"}, "adapters to 'meta/ll', "),
    ({"base_model_name_or_path": None}, "adapters to None, which is no folder here.*--base DIR")])
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    make_hf(Path("hf"))
    make_adapter(Path("adapter"), **change)
    error = refused(capsys, "from-hf", "adapter", "run")
    assert re.search(message, error), error
    assert not Path("run").exists()


def test_an_adapters_base_may_be_named_and_its_own_tokenizer_and_template_count(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, notes = make_adapter(tmp_path / "adapter", base_model_name_or_path="openai-community/gpt2"), []
    make_hf(Path("hf"))
    assert "from-hf adapter RUN --base DIR" in refused(capsys, "from-hf", "adapter", "run")
    assert "is for a folder of adapters" in refused(capsys, "from-hf", "hf", "run", "--base", "hf")
    shutil.copy("hf/tokenizer.json", folder)
    add_specials(folder, "<|im_start|>", "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML)
    from_hf(Path("adapter"), Path("run"), base=Path("hf"), note=notes.append)
    assert notes[0] == "adapters: 1 of 'adapter', merged into 'hf'"
    assert read_run("run", pytest.fail).end_ids == {298, 300} and load_template(Path("run")) == CHATML
    ours, base = run_tensors(Path("run")), run_tensors(Path("hf_of"))
    assert torch.equal(ours["blocks.0.attn.proj.weight"], base["blocks.0.attn.proj.weight"] + 4)  # 4/2 x (1 + 1)
    shutil.move("adapter/adapter_model.safetensors", "adapter/adapter_model.bin")
    assert "adapter_model.bin' is a pickle" in refused(capsys, "from-hf", "adapter", "new", "--base", "hf")


def test_what_is_no_model_folder_and_what_is_no_new_folder_is_refused(tmp_path, capsys):
    folder, run = make_hf(tmp_path / "hf"), tmp_path / "hf_of"
    (tmp_path / "ckpt.pt").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    assert "is a pickle" in refused(capsys, "from-hf", tmp_path / "ckpt.pt", tmp_path / "new")
    assert "does not exist" in refused(capsys, "from-hf", tmp_path / "nowhere", tmp_path / "new")
    assert "is a run already" in refused(capsys, "from-hf", run, tmp_path / "new")
    assert "holds a run; name a new" in refused(capsys, "from-hf", folder, run)
    assert "is not empty" in refused(capsys, "from-hf", folder, folder)
    assert "is not empty" in refused(capsys, "to-hf", run, folder)
    assert "is a Hugging Face folder, not a run" in refused(capsys, "to-hf", folder, tmp_path / "new")
    adapter = make_adapter(tmp_path / "adapter")
    assert f"python convert.py from-hf {adapter} RUN" in refused(capsys, "to-hf", adapter, tmp_path / "new")
    shutil.rmtree(adapter)
    assert "convert.py to-hf --help" in refused(capsys, "to-hf", run)
    assert "--max-seq-len 12" in refused(capsys, "from-hf", folder, tmp_path / "new", "--max-seq-len", 12)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("config", "switch"), [
    (replace(SMALL, norm="rmsnorm"), "norm"), (replace(SMALL, mlp="swiglu"), "mlp"),
    (replace(SMALL, qk_norm=True), "qk_norm"), (replace(SMALL, n_kv_head=2), "n_kv_head"),
    (replace(SMALL, head_dim=8), "head_dim"), (replace(SMALL, window=9), "window"),
    (replace(SMALL, logit_softcap=30.0), "logit_softcap"), (replace(MODERN, logit_softcap=30.0), "logit_softcap"),
    (replace(MODERN, norm="layernorm"), "norm"), (replace(MODERN, mlp="relu2"), "mlp"),
    (replace(MODERN, qk_norm=True, mlp_bias=True), "mlp_bias"), (replace(MODERN, window=9, bias=True), "bias"),
    (replace(MODERN, n_head=5, n_kv_head=None, head_dim=6), "n_embd")])
def test_a_model_of_no_family_is_refused_by_the_switchs_name(tmp_path, capsys, config, switch):
    run = make_run(tmp_path / "run", config, small_tokenizer())
    error = refused(capsys, "to-hf", run, tmp_path / "hf")
    assert re.search(rf"maps to no Hugging Face family.*model\.{switch} = ", error), error
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_config_was_changed_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", SMALL, small_tokenizer())
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("n_layer = 2", "n_layer = 1"))
    assert "does not fit the run's config.toml: unknown blocks.1" in refused(capsys, "to-hf", run, tmp_path / "hf")


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, direction):
    folder = make_hf(tmp_path / "hf")

    def write(path, parts):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", write)
    source = folder if direction == "from-hf" else tmp_path / "hf_of"
    with pytest.raises(MachineError, match="disk full|No space left"):
        convert.main([direction, str(source), str(tmp_path / "new")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "hf_of"]


# ---- The run that from-hf makes --------------------------------------------------------------------------------------

def test_a_converted_run_is_sampled_and_evaluated_by_their_command_lines(tmp_path, capsys):
    from_hf(make_hf(tmp_path / "hf"), tmp_path / "run")
    sample.main([str(tmp_path / "run"), "--prompt", "Hello", "--max-new-tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("Hello")
    (tmp_path / "text.txt").write_text(TEXT)
    evaluation.main([str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["tokens"] == len(small_tokenizer().encode(TEXT))
    with pytest.raises(UserError, match="no data of its own.*--data"):
        evaluation.main([str(tmp_path / "run"), "--device", "cpu"])


def test_a_converted_run_starts_another_but_cannot_go_on(tmp_path):
    from_hf(make_hf(tmp_path / "hf"), tmp_path / "run")
    run, new = str(tmp_path / "run"), str(tmp_path / "new")
    found = start._choose_start(Config(train=TrainConfig(out_dir=new, init_from=run)), None, None, print)
    assert found == start.Init(f"{run}/checkpoints/step_00000000")
    for knobs in ({"out_dir": new, "fork_from": run}, {"out_dir": run}):
        with pytest.raises(checkpoint.CheckpointError, match="without optimizer state.*train.init_from="):
            start._choose_start(Config(train=TrainConfig(**knobs)), None, None, print)


def test_fine_tuning_starts_from_the_converted_weights(tmp_path):
    folder = make_hf(tmp_path / "hf")
    add_specials(folder, "<|eot_id|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [298, 299], "temperature": 0.6}')
    from_hf(folder, tmp_path / "gpt2")  # also the name of a tokenizer
    (tmp_path / "text.txt").write_text("Hello there, it's a quarter past one. " * 300)
    words = ["train.init_from=gpt2", f"data.source={tmp_path / 'text.txt'}", "data.val_fraction=0.2",
             f"data.dir={tmp_path / 'shards'}", f"train.out_dir={tmp_path / 'tuned'}", "train.tokens_per_step=120",
             "train.max_steps=1", "optim.warmup_steps=0", "optim.lr=1e-9", "train.device=cpu", "train.dtype=float32",
             "train.compile=false"]
    root = Path(convert.__file__).parent
    done = subprocess.run([sys.executable, str(root / "train.py"), str(root / "configs" / "finetune.toml"), *words],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, tuned = run_tensors(tmp_path / "gpt2"), run_tensors(tmp_path / "tuned")
    for name in ours:
        torch.testing.assert_close(tuned[name], ours[name], rtol=0, atol=1e-7)  # one step of 1e-9
    to_hf(tmp_path / "tuned", tmp_path / "tuned_hf")
    generation = json.loads((tmp_path / "tuned_hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [298, 299] and generation["temperature"] == 0.6


NANOGPT = """
import torch

def random(*shape):
    return torch.randn(*shape) * 0.3

torch.manual_seed(0)
B, T, C, V, H = BIAS, 20, 24, 304, 3
sizes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
state = {"transformer.wte.weight": random(V, C), "transformer.wpe.weight": random(T, C)}
for name in ("transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"):
    state[name + ".weight"] = 1 + random(C)
    if B: state[name + ".bias"] = random(C)
for name, shape in sizes.items():
    state["transformer.h.0." + name + ".weight"] = random(*shape)
    if B: state["transformer.h.0." + name + ".bias"] = random(shape[0])
state["transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()
state["lm_head.weight"] = state["transformer.wte.weight"]
args = dict(n_layer=1, n_head=H, n_embd=C, block_size=T, bias=B, vocab_size=V, dropout=0.0)
torch.save({"model": {"_orig_mod." + k: v for k, v in state.items()}, "model_args": args, "iter_num": 3}, "ckpt.pt")

# nanoGPT's forward, written out
x = torch.arange(2 * T).view(2, T)
norm = lambda x, n: torch.nn.functional.layer_norm(x, (C,), state[n + ".weight"], state.get(n + ".bias"), 1e-5)
linear = lambda x, n: torch.nn.functional.linear(x, state["transformer.h.0." + n + ".weight"],
                                                 state.get("transformer.h.0." + n + ".bias"))
h = state["transformer.wte.weight"][x] + state["transformer.wpe.weight"]
qkv = linear(norm(h, "transformer.h.0.ln_1"), "attn.c_attn")
q, k, v = (t.view(2, T, H, C // H).transpose(1, 2) for t in qkv.split(C, 2))
att = (q @ k.mT / (C // H) ** 0.5).masked_fill(torch.ones(T, T).tril() == 0, float("-inf")).softmax(-1)
h = h + linear((att @ v).transpose(1, 2).reshape(2, T, C), "attn.c_proj")
h = h + linear(torch.nn.functional.gelu(linear(norm(h, "transformer.h.0.ln_2"), "mlp.c_fc")), "mlp.c_proj")
logits = norm(h, "transformer.ln_f") @ state["lm_head.weight"].T
from safetensors.torch import save_file
save_file({"tokens": x, "logits": logits}, "logits.safetensors")
"""


BOTH = """
import os
for folder, programs in PROGRAMS.items():
    os.mkdir(folder)
    os.chdir(folder)
    for program in programs:
        exec(program, {})
    os.chdir("..")
"""


def test_the_documented_script_turns_a_nanogpt_checkpoint_into_a_model(tmp_path):
    document = Path(convert.__file__).parent / "docs" / "CONVERT.md"
    script = re.search(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)[1]
    programs = {str(bias): [NANOGPT.replace("BIAS", str(bias)), script] for bias in (True, False)}
    done = subprocess.run([sys.executable, "-I", "-c", BOTH.replace("PROGRAMS", repr(programs)), "ckpt.pt", "hf"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for bias in (True, False):
        folder = tmp_path / str(bias)
        small_tokenizer().save(folder / "hf" / "tokenizer.json")
        from_hf(folder / "hf", folder / "run")
        assert load_run_config(folder / "run").model.bias is bias
        expected = load_file(folder / "logits.safetensors")
        torch.testing.assert_close(our_logits(folder / "run", expected["tokens"]), expected["logits"], **F32)


def test_wrong_values_go_by_config_jsons_key_and_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    folder = make_hf(tmp_path / "hf")
    path = folder / "config.json"
    good = path.read_text()
    for key, value in (("n_embd", 64.0), ("n_layer", "2"), ("n_head", True)):
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        assert f"{key} = {value!r} should be a whole number; copy it again" in refused(
            capsys, "from-hf", folder, tmp_path / "new")
    path.write_text(json.dumps({key: value for key, value in json.loads(good).items() if key != "model_type"}
                               | {"architectures": 5}))
    assert "other models cannot be converted" in refused(capsys, "from-hf", folder, tmp_path / "new")
    path.write_text(good)
    (tmp_path / "file").touch()
    assert "cannot be made: Not a directory; name another" in refused(capsys, "from-hf", folder, tmp_path / "file/run")
