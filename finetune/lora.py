"""Low-rank adapters (LoRA, arXiv:2106.09685): W stays as it is, (alpha / rank) B A is learnt beside it.

add_adapters() puts them into a GPT; merge() adds their products to the base's tensors in float32, which is what every
reader of such a run gets. Adapter files have adapter_config.json and peft's names, those of Hugging Face's modules:
peft loads a GPT-2's and a Llama's adapters onto the exported base; any other model's have our own names. Where Hugging
Face has q, k and v (gate and up) apart and we have one matrix, they share A, and each has its rows of B.

Dims: r rank, M outputs and C inputs of a layer.
"""

import math
import re

import torch
from torch import Tensor, nn

import kernels
from config import LORA_TARGETS, LoraConfig, ModelConfig
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


class LoRALinear(Linear):
    """x W^T + b + (alpha / rank) dropout(x) A^T B^T. A is Kaiming-uniform and B zero, so that it starts as the base."""

    def __init__(self, base: Linear, lora: LoraConfig):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)
        self.lora_A = nn.Parameter(torch.empty(lora.rank, base.in_features))  # (r, C)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, lora.rank))  # (M, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

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


def adapters(model: GPT) -> dict[str, LoRALinear]:
    """Our layers with adapters: 'blocks.0.attn.qkv' -> layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---- Files: peft's names ---------------------------------------------------------------------------------------------

def family_of(model: ModelConfig) -> str:
    """Whose module names the adapters' names are made of."""
    return {("layernorm", "learned", "gelu"): "gpt2", ("layernorm", "learned", "gelu_exact"): "gpt2",
            ("rmsnorm", "rope", "swiglu"): "llama"}.get((model.norm, model.position, model.mlp), "flatgpt")


def peft_tensors(model: GPT) -> dict[str, Tensor]:
    """The adapters' tensors by peft's names."""
    config, (prefix, modules) = model.config, FAMILIES[family_of(model.config)]
    D = config.dim_per_head
    rows = {"attn.qkv": [config.n_head * D, config.kv_heads * D, config.kv_heads * D], "mlp.fc": 2 * [config.mlp_width]}
    tensors = {}
    for name, layer in adapters(model).items():
        _, number, target = name.split(".", 2)
        parts = [layer.lora_B] if len(modules[target]) == 1 else layer.lora_B.split(rows[target])
        for module, part in zip(modules[target], parts, strict=True):
            stem = f"{PEFT_PREFIX}{prefix}{number}.{module}"
            tensors |= {f"{stem}.lora_A.weight": layer.lora_A, f"{stem}.lora_B.weight": part}
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
        layer.lora_A.data.copy_(pairs[name][0])
        layer.lora_B.data.copy_(pairs[name][1])


def merge(base: dict[str, Tensor], tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """base with (alpha / rank) B A added to each adapted weight, in float32. config: adapter_config.json. Raises
    ValueError or KeyError if they do not belong together."""
    scale = config["lora_alpha"] / config["r"]
    return base | {f"{name}.weight": torch.addmm(base[f"{name}.weight"].float(), B.float(), A.float(), alpha=scale)
                   for name, (A, B) in pairs_of(tensors).items()}
