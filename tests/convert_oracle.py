"""Hugging Face's side of test_convert.py: a script, run away from the checkout, in two halves with one import.

    python -I convert_oracle.py FOLDER

First it makes FOLDER/NAME/hf with save_pretrained for each FOLDER/NAME/case.json ({"class", "config", "dtype",
"max_shard_size"}), random in every weight, and FOLDER/NAME/logits.safetensors ("tokens", "logits" in float32). It says
"made" and waits for a line on stdin. Then it loads each FOLDER/NAME/exported as users do and writes its logits of
FOLDER/NAME/tokens.safetensors, its tokenizer's ids of FOLDER/text.txt and what a greedy generate() gives.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def make(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    model_class = getattr(transformers, case["class"])
    model = model_class(model_class.config_class(**case["config"], attn_implementation="eager")).eval()
    for name, p in model.named_parameters():
        is_norm = p.dim() == 1 and "norm" in name or "ln_" in name
        p.data.normal_(std=0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5)
        p.data.add_(1.0 if is_norm and name.endswith("weight") else 0.0)
    model.get_output_embeddings().weight.data.mul_(0.3)  # logits of about 1
    dtype = getattr(torch, case["dtype"])
    for p in model.parameters():
        p.data = p.data.to(dtype).float()
    tokens = torch.randint(case["config"]["vocab_size"], (2, 50))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"tokens": tokens, "logits": logits}, folder / "logits.safetensors")
    model.to(dtype).save_pretrained(folder / "hf", max_shard_size=case["max_shard_size"])


def load(folder: Path) -> None:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported", output_loading_info=True,
                                                                       attn_implementation="eager")
    assert not loading["missing_keys"] and not loading["unexpected_keys"], f"{folder.name}: {loading}"
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        generated = model.generate(tokens[:1, :5], max_new_tokens=8, do_sample=False)
    save_file({"logits": logits.float(), "generated": generated}, folder / "theirs.safetensors")
    special = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    template = tokenizer.chat_template
    text = (folder.parent / "text.txt").read_text(encoding="utf-8")
    messages = [{"role": "user", "content": "hi"}]
    (folder / "theirs.json").write_text(json.dumps({
        "class": type(model).__name__, "dtype": str(model.dtype), "bos": tokenizer.bos_token,
        "ids": tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), "eos": special,
        "ids_of_prompt": tokenizer.encode(text, split_special_tokens=True),
        "decoded": tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)), "template": template,
        "eos_of_generation": model.generation_config.eos_token_id, "eos_of_config": model.config.eos_token_id,
        "chat": tokenizer.apply_chat_template(messages, tokenize=False) if template else None}))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case in sorted(folder.glob("*/case.json")):
        make(case.parent)
    print("made", flush=True)
    sys.stdin.readline()
    for exported in sorted(folder.glob("*/exported")):
        load(exported.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
