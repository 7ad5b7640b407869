"""Scoring of train.py train: nanoGPT's weights in our model, and the loss per character, against the equations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import train
from config import ModelConfig
from model import GPT


def nanogpt_like_weights(*, n_layer: int, C: int, V: int, T: int, bias: bool) -> dict[str, Tensor]:
    """Random weights, all of a size that matters, by the names and shapes of nanoGPT's state_dict."""
    linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,)}
    for layer in range(n_layer):
        for name, shape in {"ln_1": (C,), "ln_2": (C,), **linear}.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()
                   if not name.startswith(("wte", "wpe"))}
    generator = torch.Generator().manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def nanogpt_like_logits(weights: dict[str, Tensor], tokens: Tensor, *, n_layer: int, n_head: int) -> Tensor:
    """GPT-2's forward pass with the erf GELU, from the paper's equations, in float64. tokens (B, T) -> (B, T, V)."""
    w = {name.removeprefix("transformer."): t.double() for name, t in weights.items()}
    B, T = tokens.shape
    C = w["wte.weight"].shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(n_layer):
        h = f"h.{layer}"
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1))
        scores = q @ k.mT / math.sqrt(C // n_head)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(out, f"{h}.attn.c_proj")
        hidden = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize(("V", "bias"), [(65, False), (1030, True)])  # from 1,024 up our table is padded
def test_nanogpts_weights_give_its_logits_in_our_model(V, bias):
    weights = nanogpt_like_weights(n_layer=2, C=24, V=V, T=15, bias=bias)
    model = train.gpt_from_nanogpt(weights, n_head=3)
    tokens = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = nanogpt_like_logits(weights, tokens, n_layer=2, n_head=3)
    assert not model.training
    with torch.no_grad():
        logits = model(tokens).double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)  # float32, values up to about 10


def test_loss_per_character_is_that_of_all_characters_but_the_first():
    text = "to be or not to be, " * 11
    alphabet = sorted(set(text))
    ids, token_bytes = train.encode_characters(text, alphabet)
    assert "".join(alphabet[i] for i in ids) == text and token_bytes.tolist() == [1] * len(alphabet)
    weights = nanogpt_like_weights(n_layer=1, C=16, V=len(alphabet), T=64, bias=False)
    nats = []
    for start in range(0, len(ids) - 1, 64):  # windows of 64 that do not overlap, the last one short
        window = torch.from_numpy(ids[start:start + 65])
        logits = nanogpt_like_logits(weights, window[None, :-1], n_layer=1, n_head=2)
        nats.append(F.cross_entropy(logits[0], window[1:], reduction="sum").item())
    loss = train.nats_per_character(train.gpt_from_nanogpt(weights, n_head=2), ids, token_bytes, text)
    assert loss == pytest.approx(sum(nats) / (len(text) - 1), rel=1e-5)  # float32


def test_a_text_is_read_as_nanogpt_reads_it(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert train.read_text(str(tmp_path / "dos.txt")) == "one\ntwo\n"


def test_a_character_of_two_bytes_counts_once():
    text = "é" * 200
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=256, max_seq_len=16))
    torch.nn.init.zeros_(model.wte.weight)  # every byte is as likely as any other: ln 256 nats, two bytes a character
    loss = train.nats_per_character(model, np.frombuffer(text.encode(), dtype=np.uint8), np.ones(256, np.int32), text)
    assert loss == pytest.approx(2 * math.log(256), rel=1e-5)
