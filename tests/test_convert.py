"""Conversion against transformers, which makes models for from-hf and loads those of to-hf, in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import convert
import sample
from config import Config, ModelConfig, RopeScaling, TrainConfig, exit_cleanly, load_config, to_toml
from convert import ConvertError, from_hf, load_hf, load_hf_config, to_hf
from data.chat import load_template, save_template
from data.tokenizer import load_tokenizer, train_bpe
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
    checkpoint.save(run, 3, model=random_tensors(config), optimizer={}, state={"val_loss": None}, keep=1)
    tokenizer.save(run / "tokenizer.json")
    (run / "config.toml").write_text(to_toml(Config(model=config, train=TrainConfig(tokens_per_step=60))))
    if template is not None:
        save_template(run, template)
    return run


def small_tokenizer():
    """299 ids, so that models have rows without a token."""
    return train_bpe(["Hello there, it's a quarter past one. Who is there? They are here, then, with dogs. "], 299)


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
            from_hf(folder / name / "hf", folder / name / "run")
            to_hf(folder / name / "run", folder / name / "exported")
            tokens = load_file(folder / name / "logits.safetensors")["tokens"]
            save_file({"tokens": tokens}, folder / name / "tokens.safetensors")
        for name, (config, _) in RUN_CASES.items():
            make_run(folder / f"run_{name}" / "run", config, tokenizer, template=TEMPLATE)
            to_hf(folder / f"run_{name}" / "run", folder / f"run_{name}" / "exported")
            tokens = torch.randint(config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
            save_file({"tokens": tokens}, folder / f"run_{name}" / "tokens.safetensors")
        _, errors = process.communicate("go\n")
    assert process.returncode == 0, errors
    return Bench(folder)


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


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers

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
    again = load_config(tmp_path / "again" / "config.toml").model
    ours = RUN_CASES[name][0]
    for switch in ("n_head", "kv_heads", "dim_per_head", "hidden", "vocab_size", "max_seq_len", "norm", "norm_eps",
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


def test_greedy_generation_is_transformers(bench):
    for name in ("gpt2", "llama3", "run_demo"):
        prompt = load_file(bench.path(name, "tokens.safetensors"))["tokens"][:1, :5]
        model, _ = sample.load_model(bench.path(name, "run"), device=torch.device("cpu"), dtype="float32",
                                     note=lambda line: None)
        steps = sample.generate(model, prompt.tolist(), max_new_tokens=8, sampling=sample.Sampling(temperature=0))
        assert prompt[0].tolist() + [token for token, in steps] == \
            load_file(bench.path(name, "theirs.safetensors"))["generated"][0].tolist()
