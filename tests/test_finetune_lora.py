"""Adapters against the low-rank product in float64, against hand-written autograd, and against peft's names."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import train
from config import LORA_TARGETS, LoraConfig, ModelConfig, OptimConfig
from data.loader import MicroBatch
from finetune import lora
from model import GPT
from optim import LossScale, Optimizer

GPT2 = ModelConfig(n_layer=2, n_head=3, n_embd=24, vocab_size=61, max_seq_len=19)
LLAMA = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=24, head_dim=10, mlp_hidden=33, vocab_size=61,
                    max_seq_len=19, norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tie_embeddings=False)
OWN = dataclasses.replace(GPT2, position="rope", mlp="relu2")
LORA = LoraConfig(rank=3, alpha=6.0)


def make(config: ModelConfig, settings: LoraConfig = LORA, **options) -> tuple[GPT, GPT]:
    """A model, and the same with adapters that are not zero any more."""
    torch.manual_seed(0)
    base = GPT(config, **options)
    adapted = copy.deepcopy(base)
    lora.add_adapters(adapted, settings)
    for layer in lora.adapters(adapted).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return base, adapted


def tokens_for(config: ModelConfig, batch: int = 3) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, config.max_seq_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [GPT2, LLAMA, OWN], ids=["gpt2", "llama", "own"])
def test_a_fresh_adapter_changes_nothing(config):
    torch.manual_seed(0)
    base = GPT(config)
    adapted = copy.deepcopy(base)
    lora.add_adapters(adapted, LORA)
    assert torch.equal(base(tokens_for(config)), adapted(tokens_for(config)))


@pytest.mark.parametrize("config", [GPT2, LLAMA, OWN], ids=["gpt2", "llama", "own"])
@pytest.mark.parametrize("targets", [LORA_TARGETS, ("mlp.fc",), ("attn.proj", "attn.qkv")])
def test_logits_are_those_of_the_base_plus_the_low_rank_product(config, targets):
    settings = dataclasses.replace(LORA, targets=targets)
    base, adapted = make(config, settings)
    with torch.no_grad():
        for name, layer in lora.adapters(adapted).items():
            product = layer.lora_B.double() @ layer.lora_A.double() * (settings.alpha / settings.rank)
            weight = base.get_submodule(name).weight
            weight.copy_((weight.double() + product).float())
        expected = base(tokens_for(config))
        assert (expected - adapted(tokens_for(config))).abs().max() < 2e-5  # float32, logits up to 5
    assert {name.split(".", 2)[2] for name in lora.adapters(adapted)} == set(targets)


@pytest.mark.parametrize("config", [GPT2, LLAMA, OWN], ids=["gpt2", "llama", "own"])
def test_merging_the_files_adds_the_product_in_float32_and_leaves_the_rest(config):
    base, adapted = make(config)
    merged = lora.merge(base.state_dict(), lora.peft_tensors(adapted), lora.peft_config(config, LORA))
    assert merged.keys() == base.state_dict().keys()
    for name, tensor in base.state_dict().items():
        layer = lora.adapters(adapted).get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(merged[name], tensor), name
        else:
            expected = tensor.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
            assert merged[name].dtype == torch.float32 and (merged[name] - expected).abs().max() < 1e-6


def test_a_bfloat16_base_is_merged_in_float32():
    base, adapted = make(GPT2)
    rounded = {name: tensor.bfloat16() for name, tensor in base.state_dict().items()}
    merged = lora.merge(rounded, lora.peft_tensors(adapted), lora.peft_config(GPT2, LORA))
    layer = lora.adapters(adapted)["blocks.1.mlp.proj"]
    expected = rounded["blocks.1.mlp.proj.weight"].double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    assert (merged["blocks.1.mlp.proj.weight"] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("config", [GPT2, LLAMA, OWN], ids=["gpt2", "llama", "own"])
def test_a_training_step_equals_hand_written_autograd(config):
    base, adapted = make(config)
    tokens = tokens_for(config, 4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :9] = -100
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    pairs = {name: (layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_())
             for name, layer in lora.adapters(adapted).items()}
    weights = frozen | {f"{name}.weight": frozen[f"{name}.weight"] + 2.0 * B @ A for name, (A, B) in pairs.items()}
    logits = torch.func.functional_call(base, weights, (inputs,))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    leaves = [leaf for pair in pairs.values() for leaf in pair]
    torch.nn.utils.clip_grad_norm_(leaves, 0.2)
    torch.optim.AdamW(leaves, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()

    optim = OptimConfig(lr=1e-2, weight_decay=0.1, decay_steps=10)
    batches = [MicroBatch(inputs[i:i + 3], targets[i:i + 3], None, i, int((targets[i:i + 3] != -100).sum()))
               for i in (0, 3)]
    result = train.train_step(adapted, Optimizer(adapted, optim), batches, lr=1e-2, tokens_per_step=inputs.numel(),
                              grad_clip=0.2, scale=LossScale(), step=0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, layer in lora.adapters(adapted).items():
        for ours, theirs in zip((layer.lora_A, layer.lora_B), pairs[name], strict=True):
            assert (ours - theirs).abs().max() < 2e-4, name  # AdamW's first step is lr x sign(g): tiny g may flip
            assert (ours - theirs).abs().mean() < 1e-6, name
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name]) and parameter.grad is None, name


def test_only_adapters_have_gradients_and_moments():
    _, adapted = make(GPT2)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.{ab}" for name in lora.adapters(adapted) for ab in ("lora_A", "lora_B")}
    moments = Optimizer(adapted, OptimConfig(decay_steps=9)).state_tensors()
    assert {name.split(".", 1)[1] for name in moments} == learning
    # r (C + M) of each: qkv 24 + 72, proj 24 + 24, fc 24 + 96, proj 96 + 24
    assert sum(t.numel() for t in moments.values()) == 2 * 2 * 3 * (96 + 48 + 120 + 120)


def test_frozen_matrices_are_held_in_the_dtype_they_are_computed_in_and_give_the_same_numbers():
    torch.manual_seed(0)
    base = GPT(GPT2, compute_dtype=torch.bfloat16)
    adapted = copy.deepcopy(base)
    lora.add_adapters(adapted, LORA)
    dtypes = {(p.dim() >= 2, p.requires_grad): p.dtype for p in adapted.parameters()}
    assert dtypes == {(True, False): torch.bfloat16, (False, False): torch.float32, (True, True): torch.float32}
    assert torch.equal(base(tokens_for(GPT2)), adapted(tokens_for(GPT2)))
    adapted(tokens_for(GPT2), tokens_for(GPT2)).backward()
    assert all(layer.lora_B.grad.dtype == torch.float32 for layer in lora.adapters(adapted).values())


def test_checkpointed_blocks_give_the_same_gradients():
    _, plain = make(LLAMA)
    recomputing = copy.deepcopy(plain)
    recomputing.activation_checkpointing = True
    for model in (plain, recomputing):
        model(tokens_for(LLAMA), tokens_for(LLAMA)).backward()
    for name, layer in lora.adapters(plain).items():
        assert torch.equal(layer.lora_A.grad, lora.adapters(recomputing)[name].lora_A.grad)


def test_compiled_it_computes_the_same():
    _, adapted = make(GPT2)
    expected = adapted(tokens_for(GPT2), tokens_for(GPT2))
    compiled = torch.compile(adapted, backend="aot_eager")
    loss = compiled(tokens_for(GPT2), tokens_for(GPT2))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(layer.lora_A.grad.abs().sum() > 0 for layer in lora.adapters(adapted).values())


def test_dropout_comes_from_the_seed_of_the_step_and_is_off_in_evaluation():
    _, adapted = make(GPT2, dataclasses.replace(LORA, dropout=0.5))
    losses = []
    for seed in (1, 1, 2):
        batches = [MicroBatch(tokens_for(GPT2), tokens_for(GPT2), None, 0)]
        losses.append(train.train_step(adapted, Optimizer(adapted, OptimConfig(decay_steps=9)), batches, lr=1e-30,
                                       tokens_per_step=3 * 19, grad_clip=1.0, scale=LossScale(), step=0, seed=seed,
                                       dropout=0.5).loss)
    assert losses[0] == losses[1] != losses[2]
    adapted.eval()
    assert torch.equal(adapted(tokens_for(GPT2)), adapted(tokens_for(GPT2)))


def test_a_starts_kaiming_uniform():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(GPT2, n_embd=300, n_head=3))
    lora.add_adapters(model, dataclasses.replace(LORA, rank=50))
    A = lora.adapters(model)["blocks.0.attn.qkv"].lora_A.detach().numpy()
    bound = 1 / np.sqrt(300)  # sqrt(6 / ((1 + 5) fan_in))
    assert 0.99 * bound < np.abs(A).max() <= bound and A.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


# ---- Files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("config", "names", "targets"), [
    (GPT2, ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_fc",
            "transformer.h.1.mlp.c_proj"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    (LLAMA, [f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"] + [f"model.layers.1.mlp.{x}_proj" for x in
            ("gate", "up", "down")], [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj",
                                                                              "mlp.down_proj"]),
    (OWN, [f"blocks.1.{target}" for target in LORA_TARGETS], list(LORA_TARGETS)),
], ids=["gpt2", "llama", "own"])
def test_names_are_those_that_peft_gives_to_the_family(config, names, targets):
    _, adapted = make(config)
    tensors = lora.peft_tensors(adapted)
    assert [name for name in tensors if ".1." in name] == [f"base_model.model.{name}.{ab}.weight" for name in names
                                                           for ab in ("lora_A", "lora_B")]
    settings = lora.peft_config(config, LORA)
    assert settings["target_modules"] == targets
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 6.0, "LORA")


def test_q_k_and_v_share_a_and_have_their_rows_of_b():
    _, adapted = make(LLAMA)
    tensors, layer = lora.peft_tensors(adapted), lora.adapters(adapted)["blocks.0.attn.qkv"]
    stem = "base_model.model.model.layers.0.self_attn"
    parts = [tensors[f"{stem}.{x}_proj.lora_B.weight"] for x in "qkv"]
    assert [len(part) for part in parts] == [40, 20, 20] and torch.equal(torch.cat(parts), layer.lora_B)
    assert all(torch.equal(tensors[f"{stem}.{x}_proj.lora_A.weight"], layer.lora_A) for x in "qkv")


@pytest.mark.parametrize("config", [GPT2, LLAMA, OWN], ids=["gpt2", "llama", "own"])
def test_what_is_written_is_read_back(config):
    _, adapted = make(config)
    other = copy.deepcopy(adapted)
    for layer in lora.adapters(other).values():
        torch.nn.init.zeros_(layer.lora_A)
        torch.nn.init.zeros_(layer.lora_B)
    lora.load_adapters(other, lora.peft_tensors(adapted))
    for one, two in zip(adapted.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_adapters_of_another_shape_or_place_are_refused():
    _, adapted = make(GPT2)
    tensors = lora.peft_tensors(adapted)
    for settings, words in ((dataclasses.replace(LORA, rank=4), "blocks.0.attn.qkv"),
                            (dataclasses.replace(LORA, targets=("mlp.fc",)), "blocks.0.attn.proj")):
        _, other = make(GPT2, settings)
        with pytest.raises(ValueError, match=f"adapters do not fit the model: {words}"):
            lora.load_adapters(other, tensors)
    with pytest.raises(ValueError, match="no adapter among wte.weight"):
        lora.merge({}, {"wte.weight": torch.zeros(1)}, lora.peft_config(GPT2, LORA))
