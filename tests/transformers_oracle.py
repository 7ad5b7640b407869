"""Hugging Face's logits, loss and gradients for given weights: a script, run away from the checkout.

    python -I transformers_oracle.py FOLDER

FOLDER/NAME.json holds {"class": ..., "config": {...}}, FOLDER/NAME.safetensors the weights by Hugging Face's names and
"tokens" (B, T); FOLDER/NAME.out.safetensors gets "logits", "loss" and each weight's gradient by its name. Our package
kernels would shadow one that transformers imports, so the two never share a process.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for case in sorted(folder.glob("*.json")):
        description = json.loads(case.read_text(encoding="utf-8"))
        model_class = getattr(transformers, description["class"])
        model = model_class(model_class.config_class(**description["config"], attn_implementation="eager")).eval()
        weights = load_file(case.with_suffix(".safetensors"))
        tokens = weights.pop("tokens")
        model.load_state_dict(weights, strict=False)
        unknown = weights.keys() - model.state_dict().keys()
        missing = {name for name, _ in model.named_parameters()} - weights.keys()
        assert not unknown and not missing, f"{case.stem}: unknown {unknown}, missing {missing}"
        out = model(tokens, labels=tokens)  # the loss is of tokens[:, 1:]
        out.loss.backward()
        results = {"logits": out.logits.detach(), "loss": out.loss.detach()}
        results |= {name: p.grad for name, p in model.named_parameters()}
        save_file({name: t.contiguous() for name, t in results.items()}, case.with_suffix(".out.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
