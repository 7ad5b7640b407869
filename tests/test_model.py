"""The model against Hugging Face's, float64 formulas and itself run another way (cache, documents, checkpointing)."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from config import ModelConfig, RopeScaling, parse_arguments
from model import GPT, KVCache, flops_per_token, padded_vocab_size

SMALL = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=24, vocab_size=61, max_seq_len=80)
MODERN = replace(SMALL, norm="rmsnorm", position="rope", mlp="swiglu", mlp_hidden=40, qk_norm=True, bias=False,
                 tie_embeddings=False)
BOTH = pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "modern"])
F32 = {"rtol": 1e-4, "atol": 5e-5}  # float32: 24 bits, sums of some hundred values up to 10, two layers deep


def make_model(config: ModelConfig, *, gain: float = 1.5, **options) -> GPT:
    """All parameters random, norm weights and biases too, so that none may be left out or mixed up unseen; of a size
    that makes activations of size 1 and attention weights far from equal."""
    torch.manual_seed(0)
    model = GPT(config, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=gain * config.n_embd ** -0.5).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def make_tokens(config: ModelConfig, B: int, T: int, *, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


# ---- Parameters ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_layer, n_head, n_embd, published", [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200)])
def test_gpt2_has_its_published_number_of_parameters(n_layer, n_head, n_embd, published):
    with torch.device("meta"):
        model = GPT(ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257))
    assert model.parameter_count() == published
    assert model.wte.num_embeddings == 50304  # the padding exists but does not count


def test_padding_of_both_tables_is_left_out_of_the_count():
    tied = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=1025, max_seq_len=4)
    untied = GPT(replace(tied, tie_embeddings=False))
    assert untied.parameter_count() - GPT(tied).parameter_count() == 1025 * 8
    assert sum(p.numel() for p in untied.parameters()) - untied.parameter_count() == 2 * (1152 - 1025) * 8


def test_switches_decide_which_parameters_exist():
    names = lambda **switches: set(dict(GPT(replace(SMALL, **switches)).named_parameters()))  # noqa: E731
    assert not [name for name in names(bias=False) if name.endswith("bias")]
    assert [name for name in names(bias=False, qkv_bias=True) if name.endswith("bias")] == [
        name for name in names(bias=False, qkv_bias=True) if name.endswith("attn.qkv.bias")] != []
    assert not [name for name in names(qkv_bias=False) if name.endswith("attn.qkv.bias")]
    assert names(mlp_bias=False) == {name for name in names() if not (".mlp." in name and name.endswith("bias"))}
    assert names(bias=False, mlp_bias=True) == names(bias=False) | {
        f"blocks.{layer}.mlp.{part}.bias" for layer in (0, 1) for part in ("fc", "proj")}
    assert not [name for name in names(norm="rmsnorm") if name.endswith("norm.bias")]
    assert "wpe.weight" in names() and "wpe.weight" not in names(position="rope")
    assert "lm_head.weight" in names(tie_embeddings=False) and "lm_head.weight" not in names()
    assert "blocks.1.attn.q_norm.weight" in names(qk_norm=True) and "blocks.1.attn.q_norm.weight" not in names()


def test_no_buffer_goes_into_a_checkpoint():
    assert MODERN.position == "rope"
    assert GPT(MODERN).state_dict().keys() == dict(GPT(MODERN).named_parameters()).keys()


# ---- Initialisation --------------------------------------------------------------------------------------------------

INITIAL = replace(SMALL, n_layer=3, n_embd=64, vocab_size=512, max_seq_len=128)


def standard_deviations(model: GPT) -> dict[str, float]:
    return {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}


def assert_vectors_are_born_neutral(model: GPT) -> None:
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name


@pytest.mark.parametrize("switches", [{}, {"tie_embeddings": False, "mlp": "swiglu", "qk_norm": True}], ids=str)
def test_gpt2_initialisation_scales_residual_projections_with_depth(switches):
    torch.manual_seed(0)
    model = GPT(replace(INITIAL, **switches))
    for name, std in standard_deviations(model).items():
        wanted = 0.02 / math.sqrt(2 * 3) if name.endswith(".proj.weight") else 0.02
        # the std of 4,096 samples or more is known to 1/sqrt(2 x 4096) = 1.1%; four times that
        assert std == pytest.approx(wanted, rel=0.045), name
    assert_vectors_are_born_neutral(model)


@pytest.mark.parametrize("tied", [True, False])
def test_zero_residual_initialisation_starts_blocks_as_the_identity(tied):
    torch.manual_seed(0)
    model = GPT(replace(INITIAL, init="zero_residual", tie_embeddings=tied))
    for name, std in standard_deviations(model).items():
        wanted = 64 ** -0.5  # fan_in of qkv and fc
        if name in ("wte.weight", "wpe.weight"):
            wanted = 0.02 if tied else 1.0
        elif name.endswith(".proj.weight") or name == "lm_head.weight":
            wanted = 0.0
        assert std == pytest.approx(wanted, rel=0.045), name
    assert_vectors_are_born_neutral(model)
    tokens = make_tokens(INITIAL, 2, 9)
    embedded = model.wte(tokens) + model.wpe(torch.arange(9))
    assert torch.equal(model.hidden(tokens), model.final_norm(embedded))
    if not tied:  # all logits 0: the loss of guessing
        assert model(tokens, tokens).item() == pytest.approx(math.log(512), rel=1e-6)


@pytest.mark.parametrize("switches", [
    {}, {"tie_embeddings": False}, {"tie_embeddings": False, "init": "zero_residual"}], ids=str)
def test_rows_without_a_token_are_born_zero_and_get_no_gradient(switches):
    """So that they stay zero in training, and a model exported without them comes back equal."""
    model = GPT(replace(SMALL, vocab_size=1037, **switches))
    tokens = make_tokens(model.config, 2, 9)
    model(tokens, tokens).backward()
    for table in (model.wte, model.lm_head):
        if table is not None:
            assert len(table.weight) == 1152
            assert not table.weight[1037:].any() and not table.weight.grad[1037:].any()
    assert model.wte.weight[:1037].any(dim=1).all()


def test_initialisation_is_a_function_of_the_global_seed():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.cat([p.flatten() for p in GPT(SMALL).parameters()]))
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


# ---- Equal to Hugging Face's models ----------------------------------------------------------------------------------

def gpt2_names(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """tensors by our parameters' names -> the same by GPT2LMHeadModel's; Conv1D holds (in, out)."""
    V = model.config.vocab_size
    out = {"transformer.wte.weight": tensors["wte.weight"][:V], "transformer.wpe.weight": tensors["wpe.weight"]}
    modules = {"attn_norm": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp_norm": "ln_2",
               "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        out[f"transformer.ln_f.{kind}"] = tensors[f"final_norm.{kind}"]
        for layer in range(model.config.n_layer):
            for ours, theirs in modules.items():
                t = tensors[f"blocks.{layer}.{ours}.{kind}"]
                out[f"transformer.h.{layer}.{theirs}.{kind}"] = t.T if t.dim() == 2 else t
    return out


def llama_names(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """tensors by our parameters' names -> the same by those of Llama, Qwen2 and Qwen3, where q, k, v and gate, up are
    apart."""
    config = model.config
    out = {"model.embed_tokens.weight": tensors["wte.weight"][:config.vocab_size],
           "model.norm.weight": tensors["final_norm.weight"]}
    if not config.tie_embeddings:
        out["lm_head.weight"] = tensors["lm_head.weight"][:config.vocab_size]
    widths = [heads * config.dim_per_head for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    modules = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
               "mlp.proj": "mlp.down_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for our, their in modules.items():
            if f"{ours}.{our}.weight" in tensors:
                out[f"{theirs}.{their}.weight"] = tensors[f"{ours}.{our}.weight"]
        for kind in ("weight", "bias"):
            if f"{ours}.attn.qkv.{kind}" in tensors:
                for name, rows in zip("qkv", tensors[f"{ours}.attn.qkv.{kind}"].split(widths), strict=True):
                    out[f"{theirs}.self_attn.{name}_proj.{kind}"] = rows
        for name, rows in zip(("gate", "up"), tensors[f"{ours}.mlp.fc.weight"].chunk(2), strict=True):
            out[f"{theirs}.mlp.{name}_proj.weight"] = rows
    return out


GPT2 = replace(SMALL, n_kv_head=None, vocab_size=1037)  # padded to 1,152 rows
LLAMA = replace(MODERN, qk_norm=False, n_embd=64, rope_theta=500.0)  # 8 frequencies per head
# wavelengths 6, 14, 30, 65, 140, ... of an original context of 64: whole, between 16 and 64 blended, stretched
LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_seq_len=64)
HF_CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2, {"activation_function": "gelu_new"}),
    "gpt2_gelu_exact": ("GPT2LMHeadModel", replace(GPT2, mlp="gelu_exact"), {"activation_function": "gelu"}),
    "llama": ("LlamaForCausalLM", LLAMA, {}),
    "llama_linear": ("LlamaForCausalLM", replace(LLAMA, rope_scaling=RopeScaling(factor=4.0)),
                     {"rope_type": "linear", "factor": 4.0}),
    "llama_llama3": ("LlamaForCausalLM", replace(LLAMA, rope_scaling=LLAMA3_SCALING),
                     {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}),
    "qwen2": ("Qwen2ForCausalLM", replace(LLAMA, qkv_bias=True), {}),
    "qwen3": ("Qwen3ForCausalLM", replace(MODERN, head_dim=10, tie_embeddings=True, norm_eps=1e-3), {}),
}


def hf_config(config: ModelConfig, extra: dict) -> dict:
    """The keyword arguments of Hugging Face's config class; extra: GPT-2's activation, or how RoPE is scaled."""
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings, "bos_token_id": 0,
              "eos_token_id": 0}
    if config.position == "learned":
        return common | extra | {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_inner": config.mlp_width,
            "n_positions": config.max_seq_len, "layer_norm_epsilon": config.norm_eps, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return common | {
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "hidden_size": config.n_embd,
        "num_key_value_heads": config.kv_heads, "head_dim": config.dim_per_head, "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | extra}


@pytest.fixture(scope="module")
def hf_results(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """What transformers computes for each case: logits, loss, gradients. One process for all, away from our kernels."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: equality with Hugging Face's models stays unchecked")
    folder = tmp_path_factory.mktemp("transformers")
    for name, (hf_class, config, extra) in HF_CASES.items():
        (folder / f"{name}.json").write_text(json.dumps({"class": hf_class, "config": hf_config(config, extra)}))
        model = make_model(config)
        weights = to_hf_names(model, {key: p.detach() for key, p in model.named_parameters()})
        weights["tokens"] = make_tokens(config, 2, 70)
        save_file({key: t.contiguous() for key, t in weights.items()}, folder / f"{name}.safetensors")
    script = Path(__file__).with_name("transformers_oracle.py")
    done = subprocess.run([sys.executable, "-I", str(script), str(folder)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: load_file(folder / f"{name}.out.safetensors") for name in HF_CASES}


def to_hf_names(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return (gpt2_names if model.config.position == "learned" else llama_names)(model, tensors)


@pytest.mark.parametrize("name", HF_CASES)
def test_logits_loss_and_gradients_equal_hugging_faces(name, hf_results):
    _, config, _ = HF_CASES[name]
    theirs = dict(hf_results[name])
    model, tokens = make_model(config), make_tokens(config, 2, 70)
    torch.testing.assert_close(model(tokens), theirs.pop("logits"), **F32)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    loss = model(tokens, targets)
    torch.testing.assert_close(loss.detach(), theirs.pop("loss"), **F32)
    loss.backward()
    ours = to_hf_names(model, gradients(model))
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        size = theirs[key].abs().max()  # the tolerance is relative to each gradient's largest value
        torch.testing.assert_close(gradient / size, theirs[key] / size, **F32, msg=lambda text, key=key: key + text)


def test_relu2_mlp_equals_its_formula():
    mlp = make_model(replace(SMALL, mlp="relu2")).blocks[0].mlp.double()
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = (x @ mlp.fc.weight.T + mlp.fc.bias).clamp(min=0) ** 2
    torch.testing.assert_close(mlp(x), hidden @ mlp.proj.weight.T + mlp.proj.bias)


# ---- Head and loss ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab_size, rows", [(61, 61), (1023, 1023), (1024, 1024), (1025, 1152), (1152, 1152),
                                              (50257, 50304), (65536, 65536)])
def test_tables_are_padded_to_a_multiple_of_128_from_1024_up(vocab_size, rows):
    assert padded_vocab_size(vocab_size) == rows


@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_have_no_logits_no_probability_and_no_gradient(tied):
    config = replace(SMALL, vocab_size=1037, tie_embeddings=tied)
    model, tokens = make_model(config), make_tokens(config, 2, 9)
    logits, loss = model(tokens), model(tokens, tokens)
    assert logits.shape == (2, 9, 1037) and model.head_weight.shape == (1152, 24)
    loss.backward()
    for table in {model.wte.weight, model.head_weight}:
        assert table.grad[1037:].count_nonzero() == 0 and table.grad[:1037].count_nonzero() > 0
    with torch.no_grad():
        model.head_weight[1037:] = 100.0
    assert torch.equal(model(tokens), logits) and torch.equal(model(tokens, tokens), loss)


@BOTH
def test_loss_is_the_cross_entropy_of_the_logits(config):
    model, tokens = make_model(config), make_tokens(config, 2, 9)
    targets = make_tokens(config, 2, 9, seed=2)
    targets[0, 3], targets[1, :5] = -100, -100
    logits = model(tokens)
    assert logits.dtype == torch.float32
    for reduction in ("mean", "sum"):
        wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        torch.testing.assert_close(model(tokens, targets, reduction=reduction), wanted, **F32)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").detach()
    torch.testing.assert_close(model(tokens, targets, reduction="none"), each, **F32)


@pytest.mark.parametrize("tied", [True, False])
def test_softcap_bends_logits_and_loss_alike(tied):
    plain = make_model(replace(MODERN, tie_embeddings=tied), gain=4.0)
    capped = make_model(replace(MODERN, tie_embeddings=tied, logit_softcap=2.5), gain=4.0)
    tokens = make_tokens(MODERN, 2, 9)
    raw = plain(tokens).double()
    assert raw.abs().max() > 5.0  # far into the bend
    torch.testing.assert_close(capped(tokens).double(), 2.5 * torch.tanh(raw / 2.5), **F32)
    torch.testing.assert_close(capped(tokens, tokens), F.cross_entropy(capped(tokens).flatten(0, 1), tokens.flatten()),
                               **F32)


# ---- Dropout, activation checkpointing, compute dtype ----------------------------------------------------------------

@BOTH
def test_dropout_works_in_training_only(config):
    model, plain, tokens = make_model(replace(config, dropout=0.4)), make_model(config), make_tokens(config, 2, 9)
    assert torch.equal(model.eval()(tokens), plain(tokens))
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(tokens, tokens).item())
    assert losses[0] == losses[1] != losses[2]


def test_dropout_is_on_the_embedding_and_on_both_residual_branches():
    model, tokens = make_model(replace(SMALL, dropout=0.4)), make_tokens(SMALL, 2, 9)
    for block in model.blocks:
        block.dropout.p = 1.0  # both branches gone: what is left is the embedding
    model.dropout.p = 0.0
    embedded = model.wte(tokens) + model.wpe(torch.arange(9))
    assert torch.equal(model.hidden(tokens), model.final_norm(embedded))
    model.dropout.p = 1.0
    assert torch.equal(model.hidden(tokens), model.final_norm(torch.zeros_like(embedded)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@BOTH
def test_activation_checkpointing_changes_no_bit_of_loss_or_gradients(config, dropout):
    config, tokens = replace(config, dropout=dropout), make_tokens(config, 2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    results, calls = [], []
    for checkpointing in (False, True):
        model = make_model(config, activation_checkpointing=checkpointing)
        count = [0]
        model.blocks[1].attn.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        torch.manual_seed(3)
        loss = model(tokens, tokens, document_ids=documents)
        loss.backward()
        results.append({"loss": loss.detach()} | gradients(model))
        calls.append(count[0])
    assert calls == [1, 2]  # the second time the block is computed again in the backward pass
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


class CountAttention(TorchDispatchMode):
    """Counts the calls of attention's forward operators, whichever backend's."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += is_attention_forward(func)
        return func(*args, **(kwargs or {}))


def is_attention_forward(op) -> bool:
    return "attention" in str(op) and "backward" not in str(op)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@BOTH
def test_activation_checkpointing_does_not_compute_attention_again(config, backend, request):
    if backend == "triton":
        request.getfixturevalue("triton_backends")
    tokens, results = make_tokens(config, 1, 20), []
    for checkpointing in (False, True):
        model = make_model(config, activation_checkpointing=checkpointing)
        with CountAttention() as attention:
            loss = model(tokens, tokens)
            loss.backward()
        assert attention.calls == config.n_layer
        results.append({"loss": loss.detach()} | gradients(model))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@BOTH
def test_compiled_activation_checkpointing_keeps_attention_and_computes_the_rest_again(config, backend, request):
    if backend == "triton":
        request.getfixturevalue("triton_backends")
    tokens, saved = make_tokens(config, 2, 70), []
    for checkpointing in (False, True):
        graphs = compiled_graphs(make_model(config, activation_checkpointing=checkpointing), tokens)
        assert len(graphs) == 2
        assert sum(is_attention_forward(node.target) for graph in graphs for node in graph.nodes
                   if node.op == "call_function") == config.n_layer
        saved.append(sum(x.meta["val"].nbytes for x in graphs[0].output_node().args[0] if x is not None))
    assert saved[1] < 0.6 * saved[0]


@BOTH
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights_and_gradients(config):
    exact, model = make_model(config), make_model(config, compute_dtype=torch.bfloat16)
    tokens = make_tokens(config, 2, 9)
    assert model.hidden(tokens).dtype == torch.bfloat16
    assert model(tokens).dtype == torch.float32
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    loss.backward()
    exact(tokens, tokens).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        error = ((p.grad - q.grad).norm() / q.grad.norm()).item()
        # 8 bits and some tens of roundings on the way; 0 would mean that nothing ran in bfloat16
        assert 0.0 < error < 0.1, f"{name}: {error}"


# ---- What torch.compile is given -------------------------------------------------------------------------------------

def compiled_graphs(model: GPT, tokens: Tensor) -> list[torch.fx.Graph]:
    """The graphs that torch.compile hands to Inductor for a training step, without running them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode
    graphs = []
    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)
    backend = aot_autograd(fw_compiler=keep)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(tokens.shape, dtype=torch.int64)
        torch.compile(model, backend=backend, fullgraph=True)(fake, fake.clone()).backward()
    return graphs


@BOTH
def test_a_compiled_step_is_two_graphs_and_copies_nothing_for_its_kernels(config, triton_backends):
    """Residual adds are the norms', and what a kernel reads or writes is where the layers before and behind have it."""
    model = make_model(config, compute_dtype=torch.bfloat16)
    graphs = compiled_graphs(model, make_tokens(config, 2, 70))
    assert len(graphs) == 2  # forward and backward
    calls = [node for graph in graphs for node in graph.nodes if str(node.target).startswith("flatgpt.")]
    norms = [node for node in calls if "norm_forward" in str(node.target)]
    assert len(norms) == 2 * config.n_layer + 1
    assert [node.args[3] is None for node in norms] == [True] + [False] * (2 * config.n_layer)  # the residual
    if config.position == "learned":  # q, k and v stay together, and so does their gradient
        assert not [node for graph in graphs for node in graph.nodes if node.target == torch.ops.aten.cat.default]
    for node in calls:
        for given in node.all_input_nodes:
            x = given.meta["val"]
            if given.target == torch.ops.aten.clone.default:  # of dropout 0, which Inductor takes away
                assert given.args[0].meta["val"].stride() == x.stride(), f"{given} for {node}"
            if "norm" in str(node.target) and x.dim() == 3:  # what stands in no rows is copied inside
                assert x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1), f"{given} for {node}"
            elif "attention" in str(node.target) and x.dim() == 4:
                assert x.stride(3) == 1, f"{given} for {node}"


# ---- Who sees whom ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [23, 70])  # up to 64 attention is two matmuls, above that SDPA
@BOTH
def test_no_logit_depends_on_a_later_token(config, T):
    model, tokens = make_model(config), make_tokens(config, 2, T)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.isclose(before[:, 15:], after[:, 15:]).all(-1).any()


@pytest.mark.parametrize("T", [23, 70])
@BOTH
def test_documents_do_not_see_each_other_and_equal_documents_run_alone(config, T):
    model, tokens = make_model(config), make_tokens(config, 2, T)
    ends = [[9, 14, T], [1, 20, T]]  # of each row's documents
    documents = torch.tensor([[sum(t >= end for end in row) for t in range(T)] for row in ends])
    logits = model(tokens, document_ids=documents)
    changed = tokens.clone()
    changed[0, :9] = (changed[0, :9] + 1) % config.vocab_size
    after = model(changed, document_ids=documents)
    assert torch.equal(after[0, 9:], logits[0, 9:]) and torch.equal(after[1], logits[1])
    assert not torch.equal(after[0, :9], logits[0, :9])
    for b in range(2):
        for start, end in zip([0, *ends[b]], ends[b], strict=False):
            torch.testing.assert_close(logits[b, start:end], model(tokens[b:b + 1, start:end])[0], **F32)


@pytest.mark.parametrize("T, window", [(23, 5), (70, 11), (23, 1), (23, 100)])
@BOTH
def test_a_window_equals_a_dense_mask(config, T, window, monkeypatch):
    tokens = make_tokens(config, 2, T)
    documents = torch.tensor([[0] * 8 + [1] * (T - 8), [0] * T])
    t = torch.arange(T)
    mask = (t[None, :] <= t[:, None]) & (t[None, :] > t[:, None] - window)  # (query, key)
    mask = mask & (documents[:, :, None] == documents[:, None, :])
    windowed = make_model(replace(config, window=window))(tokens, document_ids=documents)

    def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
        weights = torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    monkeypatch.setattr(kernels, "attention", dense_attention)
    torch.testing.assert_close(windowed, make_model(config)(tokens, document_ids=documents), **F32)


def test_a_window_of_one_layer_sees_exactly_that_many_tokens():
    """With RoPE only distances count: the last token of a window run alone, from position 0, gives the same logits."""
    config = replace(MODERN, n_layer=1)
    tokens, alone = make_tokens(config, 1, 23), make_model(config)
    logits = make_model(replace(config, window=6))(tokens)
    for t in range(23):
        torch.testing.assert_close(logits[0, t], alone(tokens[:, max(0, t - 5):t + 1])[0, -1], **F32)


# ---- KV cache --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pieces", [[1] * 12, [7, 1, 1, 1, 1, 1], [5, 4, 3], [12]], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@BOTH
def test_cached_logits_equal_uncached_ones(config, window, pieces):
    model, tokens = make_model(replace(config, window=window)), make_tokens(config, 2, 12)
    cache = KVCache(model.config, batch=2, dtype=torch.float32, device=tokens.device, slots=12)
    with torch.no_grad():
        cached = [model.logits(model.hidden(part, cache=cache)) for part in tokens.split(pieces, dim=1)]
        assert cache.length == 12
        torch.testing.assert_close(torch.cat(cached, dim=1), model(tokens), **F32)


@pytest.mark.parametrize("pieces", [[9, 1, 1, 1], [4, 5, 3]], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@BOTH
def test_padded_rows_of_a_cached_batch_equal_rows_run_alone(config, window, pieces):
    """Prompts of 12, 9 and 7 tokens, right-aligned: as each prompt without padding and without cache."""
    model, tokens, padding = make_model(replace(config, window=window)), make_tokens(config, 3, 12), [0, 3, 5]
    cache = KVCache(model.config, batch=3, dtype=torch.float32, device=tokens.device, padding=torch.tensor(padding))
    with torch.no_grad():
        cached = [model.logits(model.hidden(part, cache=cache)) for part in tokens.split(pieces, dim=1)]
        logits = torch.cat(cached, dim=1)
        for b, skipped in enumerate(padding):
            torch.testing.assert_close(logits[b, skipped:], model(tokens[b:b + 1, skipped:])[0], **F32)


def test_a_float32_cache_beside_bfloat16_matmuls_changes_neither_dtype_nor_logits_much():
    model = make_model(MODERN, compute_dtype=torch.bfloat16)
    tokens = make_tokens(MODERN, 2, 12)
    cache = KVCache(MODERN, batch=2, dtype=torch.float32, device=tokens.device)
    with torch.no_grad():
        parts = [model.hidden(part, cache=cache) for part in tokens.split([9, 1, 1, 1], dim=1)]
        wanted = model(tokens)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    error = (model.logits(torch.cat(parts, dim=1)) - wanted).norm() / wanted.norm()
    assert error < 0.03  # bfloat16: 8 bits, some tens of roundings in another order


def test_a_cache_holds_key_heads_only_and_starts_empty():
    cache = KVCache(MODERN, batch=3, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.length == 0 and len(cache.keys) == len(cache.values) == 2
    for buffer in cache.keys + cache.values:
        assert buffer.shape == (3, 80, 2, 6) and buffer.dtype == torch.bfloat16


# ---- What a token costs ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [
    SMALL, MODERN, replace(MODERN, window=7, head_dim=10), replace(SMALL, n_kv_head=1, mlp="relu2", mlp_hidden=50),
], ids=["gpt2", "modern", "window", "one key head"])
def test_flops_per_token_equal_those_that_pytorch_counts(config):
    """Both count matmuls only. Ours counts the pairs of query and key that the mask lets through; PyTorch's counter
    sees attention's batched matmuls over all T x T pairs, so they are scaled by the share of visible pairs."""
    kernels.choose_backends({"attention": "cpu"})  # PyTorch counts its matmuls, not those of oneDNN
    B, T = 2, 63  # up to 64 attention is batched matmuls; everything else is plain ones
    model, tokens = make_model(config), make_tokens(config, B, T)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert counts.keys() <= {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}
    first_key = kernels.first_visible_key(None, config.window, T=T, device=tokens.device)
    visible = kernels.reference.visible_keys(T, T, first_key, device=tokens.device).double().mean().item()
    attention = counts["aten.bmm"] + counts["aten.baddbmm"]
    counted = counts["aten.mm"] + counts.get("aten.addmm", 0) + attention * visible
    assert flops_per_token(config, seq_len=T) == pytest.approx(counted / (B * T), rel=1e-9)


CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_states_the_parameters_that_its_model_has(path):
    text = path.read_text()
    stated = re.search(r"([\d,]{7,}) parameters", text)
    if stated is None:
        assert path.stem.startswith("finetune")  # its model is its parent's
        return
    read, _ = parse_arguments([str(path)])
    sizes = {"bytes": 257, "bpe:4096": 4096, None: 50257}
    with torch.device("meta"):
        model = GPT(replace(read.model, vocab_size=read.model.vocab_size or sizes[read.data.tokenizer]))
    assert int(stated[1].replace(",", "")) == model.parameter_count()
    assert len(text.splitlines()) < 30


def test_flops_do_not_count_the_padding_of_the_table():
    per_row = flops_per_token(replace(SMALL, vocab_size=1037)) - flops_per_token(replace(SMALL, vocab_size=1036))
    assert per_row == 6 * 24  # a multiply-add per width, forward and twice backward


def test_flops_are_those_of_max_seq_len_unless_told():
    assert flops_per_token(SMALL) == flops_per_token(SMALL, seq_len=80) > flops_per_token(SMALL, seq_len=79)
    assert flops_per_token(replace(SMALL, window=80)) == flops_per_token(replace(SMALL, window=1000))
