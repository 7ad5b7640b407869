"""sample.py: cached generation equals uncached, filters equal an oracle, text streams whole, the command line."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import sample
from config import Config, ModelConfig, TrainConfig, UserError, to_toml
from data import chat
from data.prompts import fit_conversation
from data.tokenizer import load_tokenizer
from finetune.runs import SavedRun
from kernels.cpu import pack_for_decoding
from model import GPT
from sample import SampleError, Sampling
from tests.test_data_chat import loaded
from tests.test_data_prompts import with_bos

ROOT = Path(__file__).resolve().parents[1]
BYTES = load_tokenizer("bytes")
EOT = BYTES.eot
GREEDY = Sampling(temperature=0.0)


def make_model(seed: int = 0, *, std: float = 0.3, **settings) -> GPT:
    """A small model in eval mode whose weights are large enough for every token of the context to matter."""
    torch.manual_seed(seed)
    defaults = {"n_layer": 2, "n_head": 4, "n_embd": 24, "head_dim": 6, "vocab_size": 257, "max_seq_len": 32}
    model = GPT(ModelConfig(**defaults | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def save_run(folder: Path, model: GPT, *, steps: tuple[int, ...] = (1,), template: str | None = None) -> Path:
    """A run folder of a model over bytes, with a checkpoint of each of the steps."""
    folder.mkdir()
    config = replace(Config(), model=model.config, train=TrainConfig(tokens_per_step=model.config.max_seq_len))
    (folder / "config.toml").write_text(to_toml(config))
    BYTES.save(folder / "tokenizer.json")
    if template is not None:
        chat.save_template(folder, template)
    for step in steps:
        checkpoint.save(folder, step, tensors={"model": dict(model.named_parameters())}, state={}, keep=len(steps))
    return folder


def all_tokens(model: GPT, prompts: list[list[int]], **arguments) -> list[list[int]]:
    """generate()'s tokens, one list per row."""
    return [list(row) for row in zip(*sample.generate(model, prompts, **arguments), strict=True)]


def uncached_tokens(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling,
                    kept: int | None = None) -> list[list[int]]:
    """What generate() should give: every row by itself, every token from scratch, without cache or padding."""
    rows, kept = [], kept or max(1, model.config.max_seq_len // 2)
    for number, prompt in enumerate(prompts):
        context, generator, made = list(prompt), sample.row_generator(sampling.seed, number), []
        for _ in range(max_new_tokens):
            if len(context) > model.config.max_seq_len:
                context = context[-kept:]
            with torch.inference_mode():
                logits = model(torch.tensor([context]))[:, -1]
            made += sample.pick(logits, sampling, [generator]).tolist()
            context.append(made[-1])
        rows.append(made)
    return rows


# ---- Tokens: promise 8 -----------------------------------------------------------------------------------------------

def random_case(seed: int) -> tuple[GPT, list[list[int]], int, Sampling]:
    """Model, prompts of unequal lengths (some beyond the context), number of new tokens, sampling."""
    pick = random.Random(seed)
    max_seq_len = pick.choice((1, 2, 3, 7, 16, 16, 24))
    model = make_model(
        seed, max_seq_len=max_seq_len, vocab_size=pick.choice((50, 1030)),  # 1,030 is padded to 1,152 rows
        norm=pick.choice(("layernorm", "rmsnorm")), position=pick.choice(("learned", "rope")),
        mlp=pick.choice(("gelu", "gelu_exact", "swiglu", "relu2")), qk_norm=pick.random() < 0.5,
        n_kv_head=pick.choice((None, 1, 2)), window=pick.choice((None, None, 1, 5)), bias=pick.random() < 0.5,
        tie_embeddings=pick.random() < 0.5, logit_softcap=pick.choice((0.0, 5.0)), dropout=0.1)
    lengths = [pick.randint(1, max_seq_len + 3) for _ in range(pick.randint(1, 4))]
    prompts = [[pick.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]
    sampling = pick.choice((GREEDY, Sampling(seed=seed), Sampling(0.7, top_k=9, top_p=0.9, min_p=0.02, seed=seed)))
    return model, prompts, 2 * max_seq_len + 5, sampling


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("seed", range(50))
def test_cached_generation_gives_the_tokens_of_uncached(seed, packed):
    model, prompts, new_tokens, sampling = random_case(seed)
    expected = uncached_tokens(model, prompts, max_new_tokens=new_tokens, sampling=sampling)
    if packed:
        pack_for_decoding(model)
    assert all_tokens(model, prompts, max_new_tokens=new_tokens, sampling=sampling) == expected
    assert all(len(row) == new_tokens for row in expected)


def test_a_row_alone_gives_the_tokens_it_gives_in_a_batch():
    model = make_model(position="rope")
    prompts = [[5, 6, 7], list(range(30)), [9]]
    for sampling in (GREEDY, Sampling(seed=3)):
        batch = all_tokens(model, prompts, max_new_tokens=60, sampling=sampling)
        assert all_tokens(model, prompts[:1], max_new_tokens=60, sampling=sampling) == batch[:1]


@pytest.mark.parametrize("max_seq_len, kept", [(8, 4), (7, 3), (2, 1), (1, 1)])
def test_past_max_seq_len_the_last_half_is_kept_and_positions_restart(max_seq_len, kept):
    model = make_model(max_seq_len=max_seq_len)
    expected = uncached_tokens(model, [[1]], max_new_tokens=40, sampling=Sampling(), kept=kept)
    assert all_tokens(model, [[1]], max_new_tokens=40) == expected


def test_a_prompt_longer_than_the_context_keeps_its_last_half():
    model = make_model(max_seq_len=8)
    expected = all_tokens(model, [[4, 5, 6, 7]], max_new_tokens=20)
    assert all_tokens(model, [[9] * 20 + [4, 5, 6, 7]], max_new_tokens=20) == expected


def test_the_same_seed_repeats_and_rows_and_seeds_differ():
    model = make_model()
    def draw(seed: int) -> list[list[int]]:
        return all_tokens(model, [[1], [1]], max_new_tokens=20, sampling=Sampling(temperature=5.0, seed=seed))
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]


def test_the_global_random_numbers_play_no_part():
    model = make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    all_tokens(model, [[1]], max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(SampleError, match="no tokens"):
        next(sample.generate(make_model(), [[1], []], max_new_tokens=1))


def test_logits_that_are_not_finite_are_an_error():
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    for sampling in (GREEDY, Sampling(top_k=3, top_p=0.5)):
        with pytest.raises(SampleError, match="not finite; try --dtype float32"):
            next(sample.generate(model, [[1]], max_new_tokens=1, sampling=sampling))


# ---- The choice of a token -------------------------------------------------------------------------------------------

def oracle_filter(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities (V,) of one row in float64, by sorting and counting."""
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    def probabilities() -> np.ndarray:
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()
    if sampling.top_k is not None:
        smallest = sorted(scores)[::-1][:sampling.top_k][-1]
        scores = np.where(scores >= smallest, scores, -np.inf)
    if sampling.top_p < 1.0:
        mass, kept = 0.0, set()
        for p in sorted(probabilities())[::-1]:
            if kept and mass >= sampling.top_p:
                break
            mass += p
            kept.add(p)
        scores = np.where(np.isin(probabilities(), list(kept)), scores, -np.inf)
    if sampling.min_p > 0.0:
        p = probabilities()
        scores = np.where(p >= sampling.min_p * p.max(), scores, -np.inf)
    return probabilities()


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(0.3), Sampling(2.0, top_k=5), Sampling(top_k=1), Sampling(top_k=1000), Sampling(top_p=0.6),
    Sampling(top_p=0.0), Sampling(top_p=0.999), Sampling(min_p=0.1), Sampling(min_p=1.0),
    Sampling(0.8, top_k=40, top_p=0.8, min_p=0.05), Sampling(1.5, top_k=3, top_p=0.99),
    # beyond float32, which makes 0 or inf of them
    Sampling(1e-38), Sampling(1e-46), Sampling(5e-324), Sampling(1e-46, top_k=3, top_p=0.9, min_p=0.1), Sampling(1e300),
    Sampling(1e300, min_p=0.5), Sampling(top_p=1e-46), Sampling(min_p=1e-46), Sampling(min_p=5e-324)], ids=str)
def test_filters_equal_the_float64_oracle(sampling):
    logits = torch.randn(7, 63, generator=torch.Generator().manual_seed(0)) * 3
    logits[0, [5, 60]] = 12.0  # two likeliest ones
    logits[1, ::2] = -math.inf
    ours = sample.filter_logits(logits, sampling).softmax(dim=-1)
    expected = np.stack([oracle_filter(row, sampling) for row in logits.numpy()])
    assert ((ours.numpy() > 0) == (expected > 0)).all()
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-5)  # float32 exponentials of up to about 30


@pytest.mark.parametrize("sampling, kept", [
    (Sampling(top_k=2), [0, 1, 2]), (Sampling(top_k=1), [0]), (Sampling(top_p=0.6), [0, 1, 2]),
    (Sampling(top_p=0.5), [0]), (Sampling(min_p=0.5), [0, 1, 2]), (Sampling(min_p=0.51), [0])], ids=str)
def test_tokens_as_likely_as_the_last_one_kept_stay_too(sampling, kept):
    # probabilities 1/2, 1/8, 1/8, 1/16 ..., or for min_p half the largest
    top = 2.0 if sampling.min_p else 4.0
    logits = torch.tensor([[top, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]]).log() if not sampling.min_p else \
        torch.tensor([[2.0, 1.0, 1.0, 0.5]]).log()
    assert sample.filter_logits(logits, sampling).isfinite().nonzero()[:, 1].tolist() == kept


@pytest.mark.parametrize("temperature", [1e-10, 1e-40, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy_whatever_the_seed(temperature):
    logits = torch.tensor([[-40.0, 80.0, 79.99, -math.inf]] * 50)
    generators = [sample.row_generator(seed, 0) for seed in range(50)]
    assert sample.pick(logits, Sampling(temperature=temperature), generators).tolist() == [1] * 50


def test_a_row_from_which_nothing_can_be_drawn_has_no_token(monkeypatch):
    monkeypatch.setattr(sample, "filter_logits", lambda logits, sampling: logits * math.nan)  # id V in 0 .. V - 1
    assert sample.pick(torch.zeros(2, 5), Sampling(), [torch.Generator(), torch.Generator()]).tolist() == [-1, -1]


@pytest.mark.parametrize("V", [5, 50257])
def test_temperature_0_takes_the_lowest_id_of_equals(V):
    logits = torch.zeros(2, V)
    logits[0, [3, V - 1]] = 1.0
    logits[1, [2, 4]] = 7.0
    assert sample.pick(logits, GREEDY, []).tolist() == [3, 2]


def test_drawing_inverts_the_cumulated_probabilities():
    logits = torch.randn(1, 301, generator=torch.Generator().manual_seed(0)) * 2
    weights = np.exp(logits[0].double().numpy())
    uniform = np.linspace(0.0, 1.0, 999, endpoint=False)
    expected = np.searchsorted(np.cumsum(weights) / weights.sum(), uniform, side="right")
    ours = sample.draw(logits.expand(999, -1), torch.from_numpy(uniform))
    assert (ours.numpy() == expected).all()


def test_a_removed_token_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    ends = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert sample.draw(logits.expand(4, -1), ends).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -0.1}, "temperature = -0.1 should be finite and at least 0"),
    ({"temperature": math.nan}, "temperature = nan"), ({"temperature": math.inf}, "temperature = inf"),
    ({"top_k": 0}, "top_k = 0 should be at least 1; leave it out"),
    ({"top_p": 1.5}, "top_p = 1.5 should lie in 0 to 1"), ({"top_p": math.nan}, "top_p = nan"),
    ({"min_p": -1.0}, "min_p = -1.0 should lie in 0 to 1")])
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(SampleError, match=message.replace("(", r"\(")):
        Sampling(**settings)


# ---- Text ------------------------------------------------------------------------------------------------------------

def stream(data: bytes, stop: tuple[str, ...] = ()) -> list[str]:
    """What a TextStream says after each byte, and at the end."""
    text = sample.TextStream(BYTES, [EOT], stop)
    pieces = []
    for byte in data:
        pieces.append(text.add(byte))
        if text.stopped:
            break
    return [*pieces, text.end()]


def test_a_character_split_over_tokens_appears_whole():
    assert stream("a😀é".encode()) == ["a", "", "", "", "😀", "", "é", ""]


@pytest.mark.parametrize("data", [b"\xff\xfea", b"\xf0\x9f\x98a", b"a\xe2\x82", b"\xf0\x9f\x98\x80\x80", b"\xed\xa0",
                                  b"\xed\xa0\x80", bytes(range(256))], ids=repr)
def test_bytes_that_are_not_utf8_become_replacement_characters(data):
    assert "".join(stream(data)) == data.decode("utf-8", errors="replace")


def test_a_replacement_character_appears_only_once_it_is_certain():
    assert stream(b"\xe2\x82a") == ["", "", "\ufffda", ""]


@pytest.mark.parametrize("text, stop, expected", [
    ("one END two", ("END",), "one "), ("EEND", ("END",), "E"), ("aaab", ("aab",), "a"), ("a\n\nb", ("\n\n",), "a"),
    ("xaby", ("ab", "xaby"), "x"),  # the one complete first
    ("abc", ("bc", "abc"), ""),  # complete together: the longer
    ("no stop", ("END",), "no stop"), ("almost EN", ("END",), "almost EN"), ("é😀x", ("😀",), "é"),
    ("END", ("END",), "")])
def test_a_stop_text_ends_the_text_and_is_not_printed(text, stop, expected):
    assert "".join(stream(text.encode(), stop)) == expected


def test_text_is_held_back_only_while_it_may_become_a_stop_text():
    assert stream(b"aENxEND", ("END",)) == ["a", "", "", "ENx", "", "", "", ""]


def test_stop_texts_do_not_depend_on_where_tokens_end(tmp_path):
    pick = random.Random(0)
    for _ in range(300):
        text = "".join(pick.choice("ab") for _ in range(12))
        stops = tuple("".join(pick.choice("ab") for _ in range(pick.randint(1, 4))) for _ in range(2))
        whole = sample.TextStream(BYTES, [EOT], stops)
        whole._decode = lambda token, text=text: text  # one token for all
        assert whole.add(0) + whole.end() == "".join(stream(text.encode(), stops)), (text, stops)


def with_specials(*tokens: str):
    """The bytes tokenizer with more special tokens, ids from 257."""
    file = json.loads(BYTES.file_text)
    file["added_tokens"] += [file["added_tokens"][0] | {"id": 257 + i, "content": token}
                             for i, token in enumerate(tokens)]
    return loaded(file)


def stopped_text(tokenizer, context: list[int], tokens: list[int], stop: tuple[str, ...]) -> tuple[str, bool]:
    """What a TextStream says in all, and whether a stop text ended it."""
    text, said = sample.TextStream(tokenizer, context, stop), ""
    for token in tokens:
        said += text.add(token)
        if text.stopped:
            return said, True
    said += text.end()
    assert text.decoded in (len(said), len(said) - 1) or text.stopped  # half a character at the end counts as none
    return said, text.stopped


@pytest.mark.parametrize("tokens, stop, expected", [
    (["a", "<|im_end|>", "b"], ("<|im_end|>",), "a"), (["<|im_end|>", "b"], ("<|im_end|>",), ""),
    ([*"a<|im_end|>b"], ("<|im_end|>",), "a"),  # a text that spells it is one too
    (["a", "<|im_end|>", "\n", "b"], ("<|im_end|>\n",), "a"), (["a", "<|im_end|>", "b"], ("<|im_end|>\n",), None),
    (["a", "x", "<|im_end|>", "b"], ("x<|im_end|>",), "a"), (["a", "<|im_end|>", "b"], ("<", "|", "im_end"), None),
    (["a", "<|im_end|>", "<|im|>", "b"], ("<|im|>",), "a"), (["a", "<|im|>", "b"], ("<|im_end|>",), None),
    (["é", "<|im|>", "<|im_end|>", "b"], ("<|im|><|im_end|>", "never"), "é"),
    (["a", "<|endoftext|>", "b"], ("<|endoftext|>",), "a")], ids=repr)
def test_stop_texts_match_special_tokens_by_id(tokens, stop, expected):
    tokenizer = with_specials("<|im_end|>", "<|im|>")
    ids = [i for token in tokens for i in ([tokenizer.special_ids[token]] if token in tokenizer.special_ids else
                                           token.encode())]
    plain = "".join(token for token in tokens if token not in tokenizer.special_ids)
    assert stopped_text(tokenizer, [EOT], ids, stop) == (plain if expected is None else expected, expected is not None)


def test_stop_texts_with_special_tokens_equal_a_search_in_the_spelled_text():
    tokenizer, pick = with_specials("<s>", "<se>"), random.Random(0)
    for _ in range(500):
        tokens, stops = ([pick.choice(("a", "b", "<s>", "<se>")) for _ in range(n)] for n in (12, 2))
        stops = tuple(stop + pick.choice(("", "", "a", "<s>")) for stop in stops)
        ids = [tokenizer.special_ids.get(token) or ord(token) for token in tokens]
        full = ""
        for token in tokens:
            full += token
            shown = re.sub("<.*?>", "", full)
            # a stop text of characters alone is looked for in what is shown; both end with the last token
            found = [shown[:shown.index(stop)] for stop in stops if "<" not in stop and stop in shown] + \
                [re.sub("<.*?>", "", full[:full.index(stop)]) for stop in stops if "<" in stop and stop in full]
            if found:
                shown = min(found, key=len)
                break
        expected = (shown, bool(found))
        assert stopped_text(tokenizer, [EOT], ids, stops) == expected, (tokens, stops)


def llama_like_tokenizer(folder: Path):
    """A tokenizer that is not byte-level: spaces as a mark before words, unknown characters as byte tokens."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers
    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁Hi", "▁you", "!"]
    hf = HuggingFace(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(" ", 1, 0)])
    hf.add_special_tokens(["</s>"])
    hf.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), {word: i for i, word in enumerate(words)}


def test_a_tokenizer_that_is_not_byte_level_streams_spaces_and_whole_characters(tmp_path):
    tokenizer, ids = llama_like_tokenizer(tmp_path)
    assert not tokenizer.byte_level
    tokens = [ids[word] for word in ("▁you", "!", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁Hi", "<0xF0>")]
    text = sample.TextStream(tokenizer, [ids["▁Hi"]])
    assert [*(text.add(token) for token in tokens), text.end()] == [" you", "!", "", "", "", "😀", " Hi", "", "\ufffd"]


def test_stop_texts_of_a_tokenizer_that_is_not_byte_level_match_special_tokens(tmp_path):
    tokenizer, ids = llama_like_tokenizer(tmp_path)
    tokens = [ids[word] for word in ("▁you", "<0xF0>", "</s>", "▁Hi")]
    assert stopped_text(tokenizer, [ids["▁Hi"]], tokens, ("</s>",)) == (" you\ufffd", True)
    assert stopped_text(tokenizer, [ids["▁Hi"]], tokens, ("never</s>",)) == (" you\ufffd Hi", False)


@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
@pytest.mark.parametrize("text", ["aé😀é", "é😀\u4e2d😀 ", "😀"], ids=ascii)
def test_a_context_that_ends_inside_a_character_leaves_it_to_the_text(tmp_path, kind, text):
    tokenizer, ids = (BYTES, None) if kind == "bytes" else llama_like_tokenizer(tmp_path)
    data = f"!{text}!".encode()
    tokens = [*data] if ids is None else [ids[{33: "!", 32: "▁"}.get(byte, f"<0x{byte:02X}>")] for byte in data]
    for cut in range(len(tokens)):
        before = sample.TextStream(tokenizer, [])
        certain = "".join(before.add(token) for token in tokens[:cut])
        assert certain == data[:cut].decode(errors="ignore")
        assert certain + stopped_text(tokenizer, tokens[:cut], tokens[cut:], ())[0] == data.decode(), cut
    broken = tokens[:-2] + tokens[-1:]  # text ends inside its last character, unless that is a blank
    assert stopped_text(tokenizer, broken[:-1], broken[-1:], ())[0].strip("\ufffd") == "!"


def test_ids_beyond_the_tokenizer_stand_for_nothing():
    text = sample.TextStream(BYTES, [EOT])
    assert [text.add(97), text.add(5000), text.add(98)] == ["a", "", "b"]


def test_ids_beyond_a_tokenizer_that_is_not_byte_level_may_stand_in_a_context(tmp_path):
    tokenizer, ids = llama_like_tokenizer(tmp_path)
    assert sample.TextStream(tokenizer, [ids["▁Hi"], 5000]).add(ids["▁you"]) == " you"


def scripted(monkeypatch, rows: list[list[int]]) -> None:
    """Let generate() yield these tokens."""
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: (list(step) for step in zip(*rows, strict=True)))


def test_a_row_ends_at_end_of_text_and_others_go_on(monkeypatch):
    scripted(monkeypatch, [[97, EOT, 98, 98], [99, 0xF0, 100, 101]])
    pieces = list(sample.generate_text(make_model(), BYTES, ["x", "y"], max_new_tokens=4))
    assert [(p.row, p.text, p.tokens, p.finish) for p in pieces] == [
        (0, "a", 1, None), (1, "c", 1, None), (0, "", 2, "stop"), (1, "", 2, None), (1, "\ufffdd", 3, None),
        (1, "e", 4, "length")]


def test_generation_stops_once_every_row_has_ended(monkeypatch):
    def steps(*args, **kwargs):
        yield from ([97, 99], [EOT, 46], [98, 46])
        raise AssertionError("a step that nobody needs")
    monkeypatch.setattr(sample, "generate", steps)
    pieces = list(sample.generate_text(make_model(), BYTES, ["x", "y"], max_new_tokens=4, stop=("..",)))
    assert [(p.row, p.text, p.finish) for p in pieces] == [
        (0, "a", None), (1, "c", None), (0, "", "stop"), (1, "", None), (1, "", "stop")]


def test_text_held_at_the_last_token_comes_out(monkeypatch):
    scripted(monkeypatch, [[69, 78, 0xE2]])
    pieces = list(sample.generate_text(make_model(), BYTES, [""], max_new_tokens=3, stop=("END",)))
    assert pieces[-1] == sample.Piece(0, "EN\ufffd", 3, "length")


def test_text_held_at_end_of_text_comes_out(monkeypatch):
    scripted(monkeypatch, [[69, 78, 0xE2, EOT, 97]])
    pieces = list(sample.generate_text(make_model(), BYTES, [""], max_new_tokens=5, stop=("END",)))
    assert "".join(piece.text for piece in pieces) == "EN\ufffd" and pieces[-1].finish == "stop"


def test_a_stop_text_with_the_last_token_is_a_stop(monkeypatch):
    scripted(monkeypatch, [[97, 69, 78, 68]])
    pieces = list(sample.generate_text(make_model(), BYTES, [""], max_new_tokens=4, stop=("END",)))
    assert pieces[-1] == sample.Piece(0, "", 4, "stop")


def test_an_empty_prompt_starts_from_end_of_text():
    assert sample.fit_context(BYTES, "", make_model().config, max_new_tokens=1) == ([EOT], 0)


def test_a_plain_prompt_longer_than_the_context_keeps_its_last_half_behind_the_token_that_begins_every_text():
    model, begun = make_model(), with_bos(BYTES, "<|endoftext|>")
    for tokenizer, expected in ((BYTES, [120] * 15 + [121]), (begun, [EOT] + [120] * 14 + [121])):
        fitted = sample.fit_context(tokenizer, "x" * 40 + "y", model.config, max_new_tokens=3)
        assert fitted == (expected, 25 + (tokenizer is begun))
        text = "".join(map(chr, expected[tokenizer is begun:]))
        of_all, of_kept = (sample.sample_text(model, tokenizer, prompt, max_new_tokens=9)
                           for prompt in ("x" * 40 + "y", text))
        assert of_all == of_kept


@pytest.mark.parametrize("answer", ["yes", "certainly, it is"])  # with end-of-text 4 and 17 tokens: half the row of 33
def test_a_chat_longer_than_the_context_has_the_tokens_that_training_has_before_an_answer_of_max_new_tokens(answer):
    config, said = make_model(max_seq_len=32).config, "x" * 30 + "y"
    template = ("{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}a:{% endif %}")
    talk = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    [(ids, written, _)] = fit_conversation(BYTES, template, talk, config.max_seq_len + 1)
    start, new_tokens = len(ids) - len(answer) - 1, len(answer) + 1
    assert len(ids) == 33 and written.argmax() == start and written[start:].all()
    assert sample.fit_context(BYTES, said, config, max_new_tokens=new_tokens, chat_template=template) == (
        ids[:start].tolist(), 36 - start)


def test_special_tokens_in_a_prompt_are_plain_text():
    assert EOT not in sample.fit_context(BYTES, "<|endoftext|>", make_model().config, max_new_tokens=1)[0]


@pytest.mark.parametrize("text", ["<|im|>a<|im_end|>", "a<|im_end|><|im_end|>\n", "<|im_en", "", "<|endoftext|>é"])
def test_parse_special_gives_the_ids_of_the_tokenizers_library(text):
    from tokenizers import Tokenizer as HuggingFace
    tokenizer, config = with_specials("<|im_end|>", "<|im|>"), make_model(vocab_size=300).config
    expected = HuggingFace.from_str(tokenizer.file_text).encode(text).ids or [EOT]
    assert sample.fit_context(tokenizer, text, config, max_new_tokens=1, parse_special=True) == (expected, 0)
    begun = with_bos(tokenizer, "<|endoftext|>")  # a text that spells it itself gets no second one
    expected = expected if expected[0] == EOT else [EOT, *expected]
    assert sample.fit_context(begun, text, config, max_new_tokens=1, parse_special=True) == (expected, 0)


def test_text_errors_come_before_the_first_piece():
    model = make_model()
    with pytest.raises(SampleError, match="a stop text is empty"):
        sample.generate_text(model, BYTES, ["x"], max_new_tokens=1, stop=("",))
    with pytest.raises(SampleError, match="token 120 but the model knows 50 ids"):
        sample.generate_text(make_model(vocab_size=50), BYTES, ["x"], max_new_tokens=1)


@pytest.mark.parametrize("training", [True, False])
def test_sample_text_leaves_the_model_in_its_mode_and_ignores_dropout(training):
    model = make_model(dropout=0.5).train(training)
    text = sample.sample_text(model, BYTES, "ab", max_new_tokens=30, temperature=0.0)
    assert model.training == training
    model.eval()
    pieces = sample.generate_text(model, BYTES, ["ab"], max_new_tokens=30, sampling=GREEDY)
    assert text == "".join(piece.text for piece in pieces)


# ---- Command line ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with two checkpoints of one untrained model."""
    return save_run(tmp_path_factory.mktemp("sample") / "run", make_model(), steps=(1, 2))


def run_main(capsys, *argv: object) -> tuple[str, str]:
    """stdout and stderr of sample.main()."""
    sample.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return captured.out, captured.err


def expected_text(prompt: str, **arguments) -> list[str]:
    """Each row's text from the same model by generate_text."""
    prompts = [prompt] * arguments.pop("rows", 1)
    texts = [prompt] * len(prompts)
    for piece in sample.generate_text(make_model(), BYTES, prompts, **arguments):
        texts[piece.row] += piece.text
    return texts


def test_prompt_and_continuation_go_to_stdout_and_notes_to_stderr(run_dir, capsys):
    out, err = run_main(capsys, run_dir, "--prompt", "Hé", "--max-new-tokens", 9, "--temperature", 0)
    assert out == expected_text("Hé", max_new_tokens=9, sampling=GREEDY)[0] + "\n"
    assert "step_00000002" in err and "9 new tokens" in err and "tokens/s" in err


def test_samples_are_separated_by_a_line(run_dir, capsys):
    out, _ = run_main(capsys, run_dir, "--prompt", "A", "--num-samples", 3, "--max-new-tokens", 5, "--seed", 4,
                      "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.001)
    sampling = Sampling(0.7, top_k=20, top_p=0.9, min_p=0.001, seed=4)
    texts = expected_text("A", rows=3, max_new_tokens=5, sampling=sampling)
    assert out == "\n---\n".join(texts) + "\n"
    assert len(set(texts)) > 1


def test_the_first_sample_is_printed_as_it_arrives(capsys):
    def pieces():
        yield sample.Piece(0, "a", 1)
        assert capsys.readouterr().out == "promptta"
        yield sample.Piece(0, "b", 2, "length")
    sample._print_samples("promptt", pieces(), 1)
    assert capsys.readouterr().out == "b\n"


def test_a_prompt_comes_from_a_file_or_stdin_exactly_as_it_is(run_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("é\r\n\n".encode())
    expected = expected_text("é\r\n\n", max_new_tokens=4)[0] + "\n"
    assert run_main(capsys, run_dir, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 4)[0] == expected
    with open(tmp_path / "prompt.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run_main(capsys, run_dir, "-", "--max-new-tokens", 4)[0] == expected
    with open(tmp_path / "prompt.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run_main(capsys, run_dir, "--max-new-tokens", 4, "-")[0] == expected
    (tmp_path / "prompt.txt").write_bytes("é\r\n\n".encode("utf-16"))
    assert run_main(capsys, run_dir, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 4)[0] == expected


def test_without_a_prompt_the_text_starts_from_end_of_text(run_dir, capsys):
    assert run_main(capsys, run_dir, "--max-new-tokens", 4)[0] == expected_text("", max_new_tokens=4)[0] + "\n"


def test_stop_texts_end_a_sample(run_dir, capsys):
    whole = expected_text("A", max_new_tokens=30, sampling=GREEDY)[0]
    out, _ = run_main(capsys, run_dir, "--prompt", "A", "--temperature", 0, "--max-new-tokens", 30, "--stop", "never",
                      whole[5:7])
    assert out == whole[:whole.index(whole[5:7], 1)] + "\n"


def test_special_tokens_of_a_prompt_and_those_that_a_run_names_work_on_the_command_line(run_dir, capsys, monkeypatch):
    greedy = ("--temperature", 0, "--max-new-tokens", 20)
    [row] = all_tokens(make_model(), [[EOT, 65]], max_new_tokens=20, sampling=GREEDY)
    text = BYTES.decode_bytes([token for token in row if token != EOT]).decode(errors="replace")
    out, _ = run_main(capsys, run_dir, "--prompt", "<|endoftext|>A", "--parse-special", *greedy)
    assert out == f"<|endoftext|>A{text}\n" and EOT not in row
    end = next(i for i, token in enumerate(row) if i > 3 and token not in row[:i])
    monkeypatch.setattr(SavedRun, "end_ids", frozenset({EOT, row[end]}))
    out, err = run_main(capsys, run_dir, "--prompt", "<|endoftext|>A", "--parse-special", *greedy)
    expected = BYTES.decode_bytes(row[:end]).decode(errors="replace")
    assert out == f"<|endoftext|>A{expected}\n" and f"{end + 1} new tokens" in err


@pytest.mark.parametrize("given, stop, note", [
    (r"\n", "\n", r"--stop '\n': read as '\n'"), (r"\r\n\t", "\r\n\t", r"read as '\r\n\t'"),
    (r"\nabla", r"\nabla", r"--stop '\nabla': taken as it is"), ("a\n", "a\n", ""), (r"\a\\", r"\a\\", "")])
def test_a_stop_text_of_backslash_n_is_a_newline_and_a_note_tells(given, stop, note):
    notes = []
    assert sample.stop_texts([given], notes.append) == (stop,)
    assert note in "".join(notes) and len(notes) == bool(note)
    if "taken as it is" in note:  # what the note says to write gives a newline
        written = re.search(r"\$'.*'", notes[0])[0]
        told = subprocess.run(["bash", "-c", f"printf %s {written}"], capture_output=True, text=True).stdout
        assert told == "\nabla"


def test_a_newline_that_the_shell_did_not_make_ends_a_sample(run_dir, capsys, monkeypatch):
    scripted(monkeypatch, [[97, 10, 98]])
    out, err = run_main(capsys, run_dir, "--prompt", "A", "--max-new-tokens", 3, "--stop", r"\n")
    assert out == "Aa\n" and r"--stop '\n': read as '\n'" in err


def test_a_checkpoint_and_a_copied_run_folder_are_sampled_too(run_dir, tmp_path, capsys):
    copy = shutil.copytree(run_dir, tmp_path / "elsewhere")
    expected = run_main(capsys, run_dir, "--max-new-tokens", 6)[0]
    assert run_main(capsys, copy, "--max-new-tokens", 6)[0] == expected
    out, err = run_main(capsys, copy / "checkpoints" / "step_00000001", "--max-new-tokens", 6)
    assert out == expected and "step_00000001" in err


def test_a_prompt_longer_than_the_context_is_noted(run_dir, capsys):
    _, err = run_main(capsys, run_dir, "--prompt", "x" * 33, "--max-new-tokens", 1)
    assert "the prompt has 33 tokens, more than the context of 32: 17 were cut from its front" in err
    assert "were cut" not in run_main(capsys, run_dir, "--prompt", "x" * 32, "--max-new-tokens", 1)[1]


def test_bfloat16_is_a_choice(run_dir, capsys):
    assert "bfloat16" in run_main(capsys, run_dir, "--dtype", "bfloat16", "--max-new-tokens", 3)[1]


TURNS = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_a_chat_continues_the_template_and_needs_one(run_dir, tmp_path, capsys, monkeypatch):
    run = save_run(tmp_path / "chat", make_model(), template=TURNS)
    out, _ = run_main(capsys, run, "--chat", "--prompt", "Hi<|endoftext|>", "--max-new-tokens", 9, "--temperature", 0)
    [expected] = expected_text("[Hi<|endoftext|>]", max_new_tokens=9, sampling=GREEDY)
    assert out == "Hi<|endoftext|>\n" + expected.removeprefix("[Hi<|endoftext|>]") + "\n"
    out, err = run_main(capsys, run, "--chat", "--prompt", "x" * 31, "--max-new-tokens", 5, "--temperature", 0)
    assert "the conversation has 33 tokens, more than the context of 32: 5 were cut from its front" in err
    [expected] = expected_text("[" + "x" * 26 + "]", max_new_tokens=5, sampling=GREEDY)  # 28 + 5 = max_seq_len + 1
    assert out == "x" * 31 + "\n" + expected.removeprefix("[" + "x" * 26 + "]") + "\n"
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('too_long = "cut"', 'too_long = "error"'))
    monkeypatch.setattr(sample.SavedRun, "weights", lambda run: pytest.fail("gigabytes were read before the refusal"))
    with pytest.raises(SampleError, match="the conversation has 33 tokens, more than the context of 32; shorten"):
        run_main(capsys, run, "--chat", "--prompt", "x" * 31)
    with pytest.raises(SampleError, match="holds no chat_template.jinja, it was not trained on conversations"):
        run_main(capsys, run_dir, "--chat", "--prompt", "Hi")


@pytest.mark.parametrize("argv, message", [
    (["RUN", "--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
    (["RUN", "--prompt", "a", "-"], "not allowed with argument"),
    (["RUN", "--max-new-tokens", "0"], "--max-new-tokens: '0' should be a whole number, at least 1"),
    (["RUN", "--num-samples", "-1"], "--num-samples: '-1' should be a whole number"),
    (["RUN", "--max-new-tokens", "many"], "'many' should be a whole number"),
    (["RUN", "--temperature", "-1"], "temperature = -1.0 should be"),
    (["RUN", "--top-p", "2"], "top_p = 2.0 should lie in 0 to 1"),
    (["RUN", "--stop", ""], "a stop text is empty"),
    (["RUN", "--chat", "--prompt", "a", "--parse-special"], "--parse-special is for plain prompts"),
    (["RUN", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["RUN", "--promt", "a"], "unrecognized arguments: --promt"),
    (["RUN", "--chat"], "--chat needs what the user says: --prompt TEXT, --prompt-file FILE or -"),
    (["RUN", "--prompt-file", "missing.txt"], "prompt file 'missing.txt' cannot be read: No such file or directory"),
    (["RUN", "--prompt-file", "latin1.txt"], "prompt file 'latin1.txt' is not valid UTF-8 at byte 1"),
    (["RUN", "--prompt-file", "utf16.txt"], "prompt file 'utf16.txt' is no UTF-8 (9 of its first 18 bytes are NUL)"),
    (["nowhere"], "run 'nowhere' does not exist"), ([], "required: RUN")], ids=lambda v: " ".join(v) or "nothing")
def test_user_mistakes_are_named(run_dir, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(b"a\xe9")
    Path("utf16.txt").write_bytes("a prompt.".encode("utf-16-be"))
    monkeypatch.setattr(sample.SavedRun, "weights", lambda run: pytest.fail("gigabytes were read before the refusal"))
    with pytest.raises(UserError) as error:
        sample.main([str(run_dir) if word == "RUN" else word for word in argv])
    assert message in str(error.value)
    assert capsys.readouterr().out == ""


def command(*argv: object) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), *map(str, argv)]


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path):
    result = subprocess.run(command("nowhere", "--device", "cpu"), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: run 'nowhere' does not exist") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_quietly_with_what_was_printed(run_dir):
    arguments = command(run_dir, "--prompt", "Hello", "--max-new-tokens", 10**6)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          # a shell that runs the tests in the background has them ignore Ctrl-C
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        start = process.stdout.read(20)  # it is generating
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert start.startswith(b"Hello") and out.endswith(b"\n")
    assert b"Traceback" not in err
