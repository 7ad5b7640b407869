"""Low-rank adapters (LoRA, arXiv:2106.09685): W stays as it is, (alpha / rank) B A is learnt beside it.

add_adapters() puts them into a GPT; merge() adds their products to the base's tensors in float32, which is what every
reader of such a run gets. Adapter files have adapter_config.json and peft's names, those of Hugging Face's modules:
peft loads a GPT-2's and a Llama's adapters onto the exported base; any other model's have our own names. Where Hugging
Face has q, k and v (gate and up) apart and we have one matrix, they share A, and each has its rows of B.

Dims: r rank, M outputs and C inputs of a layer.
"""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import checkpoint
import kernels
from config import LORA_TARGETS, LoraConfig, ModelConfig
from distributed import whole
from model import GPT, Linear

# family -> (what precedes the block's number, our layer -> its modules there, in the order of our rows)
FAMILIES = {
    "gpt2": ("transformer.h.", {"attn.qkv": ("attn.c_attn",), "attn.proj": ("attn.c_proj",), "mlp.fc": ("mlp.c_fc",),
                                "mlp.proj": ("mlp.c_proj",)}),
    "llama": ("model.layers.", {"attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                                "attn.proj": ("self_attn.o_proj",), "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
                                "mlp.proj": ("mlp.down_proj",)}),
    "flatgpt": ("blocks.", {target: (target,) for target in LORA_TARGETS}),
}
PEFT_PREFIX = "base_model.model."
# Values of adapter_config.json under which the weights are the base's plus scale x B A. Names in PLAIN change nothing
# of that, or the tensors' names and shapes show it; any other that is set is refused: DoRA and peft's newer methods
# (activated LoRA, routers, ...) say by one that their adapters are no constant sum.
KNOWN = {"peft_type": ("LORA",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
PLAIN = set("""alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout
lora_ga_config megatron_config megatron_core modules_to_save peft_version qalora_group_size r rank_pattern revision
runtime_config target_modules target_parameters task_type trainable_token_indices use_rslora""".split())


class LoRALinear(Linear):
    """x W^T + b + (alpha / rank) dropout(x) A^T B^T. A is Kaiming-uniform and B zero, so that it starts as the base."""

    def __init__(self, base: Linear, lora: LoraConfig):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)
        self.lora_A = nn.Parameter(torch.empty(lora.rank, base.in_features))  # (r, C)
        self.lora_B = nn.Parameter(torch.empty(base.out_features, lora.rank))  # (M, r)

    def forward(self, x: Tensor) -> Tensor:
        low = kernels.linear(self.dropout(x), self.lora_A, None)  # (..., r)
        return super().forward(x) + self.scale * kernels.linear(low, self.lora_B, None)


def add_adapters(model: GPT, lora: LoraConfig) -> None:
    """Freeze a model and give its lora.targets adapters, drawn from the global RNG. Frozen matrices go to the dtype
    they are computed in: they would be rounded to it at each use, and now take half the memory."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data = parameter.data.to(model.compute_dtype)
    for block in model.blocks:
        for target in lora.targets:
            block.set_submodule(target, LoRALinear(block.get_submodule(target), lora))
    if not model.wte.weight.is_meta:
        for name, value in initial_adapters(model):
            model.get_parameter(name).data.copy_(value)


def initial_adapters(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each of the adapters' parameters, whole, on the CPU, drawn from the global RNG."""
    for name, layer in adapters(model).items():
        yield f"{name}.lora_A", nn.init.kaiming_uniform_(torch.empty(layer.lora_A.shape), a=math.sqrt(5))
        yield f"{name}.lora_B", torch.zeros(layer.lora_B.shape)


def adapters(model: GPT) -> dict[str, LoRALinear]:
    """Our layers with adapters: 'blocks.0.attn.qkv' -> layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---- Files: peft's names ---------------------------------------------------------------------------------------------

def family_of(model: ModelConfig) -> str:
    """Whose module names the adapters' names are made of."""
    if (model.norm, model.position) == ("layernorm", "learned") and model.mlp != "swiglu":
        return "gpt2"
    return "llama" if (model.norm, model.position, model.mlp) == ("rmsnorm", "rope", "swiglu") else "flatgpt"


def peft_tensors(model: GPT) -> dict[str, Tensor]:
    """The adapters' tensors, whole, by peft's names; a collective if the model is sharded."""
    config, (prefix, modules) = model.config, FAMILIES[family_of(model.config)]
    D = config.dim_per_head
    rows = {"attn.qkv": [config.n_head * D, config.kv_heads * D, config.kv_heads * D], "mlp.fc": 2 * [config.mlp_width]}
    tensors = {}
    for name, layer in adapters(model).items():
        _, number, target = name.split(".", 2)
        A, B = whole(layer.lora_A), whole(layer.lora_B)
        parts = [B] if len(modules[target]) == 1 else B.split(rows[target])
        for module, part in zip(modules[target], parts, strict=True):
            stem = f"{PEFT_PREFIX}{prefix}{number}.{module}"
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": part}
    return tensors


def peft_config(model: ModelConfig, lora: LoraConfig) -> dict:
    """adapter_config.json, from which peft and merge() know rank, alpha and layers."""
    family = family_of(model)
    modules = [module for target in lora.targets for module in FAMILIES[family][1][target]]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": lora.rank,
            "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": modules, "bias": "none",
            "fan_in_fan_out": family == "gpt2", "inference_mode": True}  # GPT-2's Conv1D holds W transposed


def pairs_of(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """peft's names -> 'blocks.0.attn.qkv' -> (A, B). Raises ValueError for a name that none of the families has."""
    pairs = {}
    for prefix, modules in FAMILIES.values():
        for target, parts in modules.items():
            first = re.compile(re.escape(PEFT_PREFIX + prefix) + r"(\d+)\." + re.escape(parts[0]) + r"\.lora_A\.weight")
            for number in (match[1] for name in tensors if (match := first.fullmatch(name))):
                stems = [f"{PEFT_PREFIX}{prefix}{number}.{module}" for module in parts]
                B = torch.cat([tensors[f"{stem}.lora_B.weight"] for stem in stems])
                pairs[f"blocks.{number}.{target}"] = tensors[f"{stems[0]}.lora_A.weight"], B
    if not pairs:
        raise ValueError(f"no adapter among {', '.join(sorted(tensors)[:3])}")
    return pairs


def load_adapters(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Copy what peft_tensors gave into a model with adapters. Raises ValueError if layers or shapes differ."""
    layers, pairs = adapters(model), pairs_of(tensors)
    different = sorted(layers.keys() ^ pairs.keys()) or [
        name for name, layer in layers.items()
        if (layer.lora_A.shape, layer.lora_B.shape) != tuple(t.shape for t in pairs[name])]
    if different:
        raise ValueError(f"adapters do not fit the model: {', '.join(different[:4])}")
    for name, layer in layers.items():
        checkpoint.fill({"A": layer.lora_A, "B": layer.lora_B}, dict(zip("AB", pairs[name], strict=True)))


def merge(base: dict[str, Tensor], tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """base with (alpha / rank) B A added to each adapted weight, in float32. config: adapter_config.json. Raises
    ValueError or KeyError if they do not belong together."""
    scale = config["lora_alpha"] / config["r"]
    return base | {f"{name}.weight": torch.addmm(base[f"{name}.weight"].float(), B.float(), A.float(), alpha=scale)
                   for name, (A, B) in pairs_of(tensors).items()}


# ---- Adapters that peft made -----------------------------------------------------------------------------------------

class PeftAdapter:
    """peft's adapter_model.safetensors and adapter_config.json, to be merged into the weights of a Hugging Face model:
    plain LoRA, also with ranks and alphas by layer, rslora, trained biases and whole matrices (modules_to_save).

    tensors: name -> tensor, or what gives one with [:] and knows get_shape(). pairs: weight's name -> (A, B, scale).
    replaced: weight's name -> its new value. Raises ValueError for another method, KeyError for half a pair.
    """

    def __init__(self, tensors: dict, config: dict):
        for key, value in config.items():
            if value not in KNOWN[key] if key in KNOWN else value and key not in PLAIN:
                raise ValueError(f"{key} = {value!r} is not plain LoRA")
        self.pairs, self.replaced = {}, {}
        for name, tensor in tensors.items():
            stem = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
            if name.endswith(".lora_A.weight"):
                module, B = stem.removesuffix(".lora_A.weight"), tensors[name.replace(".lora_A.", ".lora_B.")]
                rank = tensor.get_shape()[0]
                alpha = next((value for pattern, value in (config.get("alpha_pattern") or {}).items()
                              if re.fullmatch(rf"(.*\.)?({pattern})", module)), config["lora_alpha"])
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                self.pairs[f"{module}.weight"] = tensor, B, scale
            elif not name.endswith(".lora_B.weight"):
                self.replaced[stem] = tensor

    def check(self, shapes: dict[str, list[int]]) -> None:
        """Raises ValueError if not all belongs to weights of these names and shapes, as (outputs, inputs)."""
        found = {name: [B.get_shape()[0], A.get_shape()[1]] for name, (A, B, _) in self.pairs.items()
                 if A.get_shape()[0] == B.get_shape()[1]}
        found |= {name: tensor.get_shape() for name, tensor in self.replaced.items()}
        wrong = [f"{name} {shape}" for name, shape in found.items() if shapes.get(name) != shape]
        if wrong or not self.pairs or len(found) < len(self.pairs.keys() | self.replaced.keys()):
            raise ValueError(f"{', '.join(wrong[:3]) or 'no pair of matrices'} has no place there")

    def merge_into(self, weight: Tensor, name: str) -> None:
        """Add what the adapters have for a weight, float32 (outputs, inputs), in place, in float32."""
        if name in self.replaced:
            weight.copy_(self.replaced[name][:])
        if name in self.pairs:
            A, B, scale = self.pairs[name]
            weight.addmm_(B[:].float(), A[:].float(), alpha=scale)
