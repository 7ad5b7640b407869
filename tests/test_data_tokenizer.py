"""tokenizer.py and tokenizer_file.py against tiktoken and `tokenizers`: a small BPE trained here, GPT-2's if there."""

import argparse
import hashlib
import inspect
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public as openai_public
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFace

import files
from data import tokenizer as module
from data.tokenizer import (
    CUT,
    END_OF_TEXT,
    TIKTOKEN_FILES,
    TokenizerError,
    load_tokenizer,
    pieces,
    tokenizer_identity,
    train_bpe,
)
from data.tokenizer_file import (
    CL100K_PATTERN,
    FILE_REGEXES,
    GPT2_PATTERN,
    O200K_PATTERN,
    bytes_of_word,
    recovered_merges,
    token_before_text,
    word_of_bytes,
)

ROOT = Path(__file__).resolve().parents[1]
HARD = ("it's WE'LL don't 12 1234567 3.14 x_1\r\n\r\n\ttab  two   three    \n \n  x!?... --> naïve e\u0301a\u0301 "
        "日本語。中文\n한국어 русский العربية हिन्दी 😀👨‍👩‍👧 "
        "\u00a0nbsp\u2003em \x00\x1f\u200b camelCaseHTML ''s /// <|endoftext|>   end  ")
SOURCE = inspect.getsource(argparse)  # 100 kB of code and English that every machine has
CORPUS = [*SOURCE.split("\n\n\n"), *[HARD] * 3, "    " * 200, "\n" * 300, "-" * 400, "1234567890" * 30, "aaaa" * 100,
          "日本語中文" * 30, "😀" * 100, "e\u0301" * 50]


def gpt2_files() -> list[Path]:
    """Where tiktoken keeps GPT-2's two files: called by the sha1 of their URLs."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", str(Path(tempfile.gettempdir(), "data-gym-cache")))
    return [Path(cache, hashlib.sha1(url.encode()).hexdigest()) for url in TIKTOKEN_FILES["gpt2"]]


needs_gpt2 = pytest.mark.skipif(not all(path.exists() for path in gpt2_files()),
                                reason="GPT-2's two files are not in TIKTOKEN_CACHE_DIR; a small BPE is checked")


def openai_pattern(name: str) -> str:
    """The pattern of a tiktoken encoding, without its vocabulary, which would be downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
        return getattr(openai_public, name)()["pat_str"]


def small_ranks(pattern: str, vocab_size: int = 700) -> dict[bytes, int]:
    """A BPE trained by the library with another split: what cl100k and o200k look like, without their download."""
    hf = HuggingFace(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern.replace("}+", "}")), "isolated")
    hf.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    hf.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                                       initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return {bytes_of_word(word): i for word, i in hf.get_vocab().items()}


def encoding_of(tokenizer: module.Tokenizer) -> tiktoken.Encoding:
    """The oracle: tiktoken itself over the same vocabulary."""
    return tiktoken.Encoding("oracle", pat_str=tokenizer._pattern, mergeable_ranks=tokenizer._ranks,
                             special_tokens=tokenizer.special_ids)


def fuzz(count: int, seed: int = 0) -> list[str]:
    parts = ["a", "b", "Z", "é", "中", "😀", "e\u0301", " ", "  ", "     ", "\n", "\r\n", "\t", "\x00", "1", "12345",
             "!", "'s", "'LL", "'", "-", "---", "word", " the", "\u00a0", "\u3000", "\x1c", "ß", "ǅ", "ſ", "'ſ", "K",
             "'Ve", "'re", "ﬀ", "२", "²", "Ⅷ", "ʰ", "\u0085", "\u200b", "\u2028", "/", "/\n", END_OF_TEXT, "_"]
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe() -> module.Tokenizer:
    return train_bpe(CORPUS, 700)


@pytest.fixture(scope="module")
def openai_like() -> dict[str, module.Tokenizer]:
    found = {}
    for name in ("cl100k_base", "o200k_base"):
        pattern = openai_pattern(name)
        found[name] = module.Tokenizer(name, {END_OF_TEXT: 705, "<|fim|>": 702}, ranks=small_ranks(pattern),
                                       pattern=pattern)
    return found


# ---- bytes -----------------------------------------------------------------------------------------------------------

def test_bytes_are_the_utf8_bytes_and_end_of_text_comes_last():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    ids = tokenizer.encode(HARD)
    assert ids.dtype == np.uint32 and ids.tolist() == list(HARD.encode())
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


def test_loading_bytes_imports_no_tokenizer_library():
    code = ("import sys; from data.tokenizer import load_tokenizer; load_tokenizer('bytes').encode('x'); "
            "print([m for m in ('torch', 'tiktoken', 'tokenizers', 'requests') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


# ---- A trained BPE ---------------------------------------------------------------------------------------------------

def test_a_trained_bpe_has_exactly_the_ids_asked_for_with_end_of_text_last(bpe):
    assert (bpe.vocab_size, bpe.eot, bpe.name) == (700, 699, "bpe:700")
    assert len(bpe.token_bytes()) == 700 and bpe.token_bytes()[699] == 0 and (bpe.token_bytes()[:699] > 0).all()


def test_training_twice_gives_the_same_file_in_another_process_too(bpe):
    code = ("import json, sys; from data.tokenizer import train_bpe; "
            "print(train_bpe(json.load(sys.stdin), 700).fingerprint)")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           input=json.dumps(CORPUS), check=True).stdout.strip()
    assert other == bpe.fingerprint


def test_training_on_too_little_text_names_the_largest_vocabulary():
    with pytest.raises(TokenizerError, match=r"the training text yields only (\d+) ids; use bpe:\1 or fewer"):
        train_bpe(["hello hello"], 5000)


@pytest.mark.parametrize("size", [0, 256])
def test_a_bpe_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(TokenizerError, match=f"'bpe:{size}' should be bpe:N with N from 257"):
        train_bpe(CORPUS, size)


def test_unbroken_text_is_thinned_out_for_training_and_all_other_text_is_not(monkeypatch):
    rng = random.Random(0)
    chinese = "".join(chr(0x4E00 + min(rng.randrange(3000), rng.randrange(3000))) for _ in range(200_000))
    runs = [chinese, "3141592653" * 20_000, "😀😂_-" * 50_000, " \t\u3000" * 66_000]
    words = list(module._training_pieces(["Some words. " * 9 + run + " and others" for run in runs]))
    assert "".join(words).count("Some words. " * 8 + "Some words.") == "".join(words).count("and others") == 4
    assert sum(map(len, words)) < 1.1 * 2**16 * (1 + math.log(800_000 / 2**16))
    characters = set(chinese)
    assert max(len(word) for word in words if len(characters.intersection(word)) > 20) == 84
    for run in runs:  # some of each, from all over it
        assert sum(word in run for word in words if len(word) == 84) > 100
    monkeypatch.setattr(module, "UNBROKEN_SAMPLE_CHARS", 10)
    lines = ["=" * 255 + "\n" + "中" * 255 + " " * 255 + "x", inspect.getsource(argparse)]
    assert "".join(module._training_pieces(lines)) == "".join(lines)


def test_a_bpe_trained_on_unbroken_text_encodes_it_as_tiktoken_does():
    rng = random.Random(0)
    text = "".join(chr(0x4E00 + min(rng.randrange(900), rng.randrange(900))) for _ in range(300_000))
    trained = train_bpe([text], 2000)
    oracle = tiktoken.Encoding("oracle", pat_str=GPT2_PATTERN, mergeable_ranks=trained._ranks, special_tokens={})
    assert len(trained._ranks) == 1999 and max(map(len, trained._ranks)) >= 6  # more than a character
    assert trained.encode(text).tolist() == oracle.encode_ordinary(text)


def test_a_trained_bpe_equals_tiktoken_and_the_library_on_hard_texts(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    hf = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    hf.encode_special_tokens = True
    oracle = encoding_of(bpe)
    for text in [HARD, *CORPUS, *fuzz(2000)]:
        ids = bpe.encode(text).tolist()
        assert ids == oracle.encode_ordinary(text), text
        assert ids == hf.encode(text).ids, text


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_openai_patterns_survive_saving_with_the_ids_of_the_library_and_of_tiktoken(name, openai_like, tmp_path):
    tokenizer = openai_like[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    again, hf = load_tokenizer(str(tmp_path)), HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    assert again._hf is None and (again.vocab_size, again.eot) == (706, 705) == (tokenizer.vocab_size, tokenizer.eot)
    hf.encode_special_tokens = True
    oracle = encoding_of(tokenizer)
    for text in [HARD, *CORPUS, *fuzz(1000, seed=1)]:
        expected = oracle.encode_ordinary(text)
        assert tokenizer.encode(text).tolist() == again.encode(text).tolist() == expected, text
        assert hf.encode(text).ids == expected, text


def test_merges_recovered_from_ranks_are_those_of_training(bpe):
    trained = json.loads(bpe.file_text)["model"]["merges"]
    recovered = recovered_merges(bpe._ranks)
    assert [f"{word_of_bytes(a)} {word_of_bytes(b)}" for a, b in recovered] == trained


def test_lone_surrogates_count_as_the_replacement_character(bpe):
    for tokenizer in (bpe, load_tokenizer("bytes")):
        assert tokenizer.encode("a\ud800b").tolist() == tokenizer.encode("a\ufffdb").tolist()
        assert tokenizer.encode("\ud83d\ude00").tolist() == tokenizer.encode("😀").tolist()


def test_text_that_spells_end_of_text_is_plain_text(bpe):
    ids = bpe.encode(f"a{END_OF_TEXT}b")
    assert bpe.eot not in ids and bpe.decode(ids) == f"a{END_OF_TEXT}b"


def test_decoded_bytes_are_those_of_the_text_and_leave_special_tokens_out(bpe):
    for text in fuzz(300, seed=2):
        ids = bpe.encode(text)
        assert bpe.decode_bytes(ids) == text.encode() and bpe.token_bytes()[ids].sum() == len(text.encode())
    assert bpe.decode_bytes([bpe.eot, *bpe.encode("x")]) == b"x"
    assert bpe.decode([*bpe.encode("x"), bpe.eot]) == f"x{END_OF_TEXT}"


def test_decoding_part_of_a_character_gives_the_replacement_character():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([0xE4, 0xB8]) == "\ufffd" and tokenizer.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"


@pytest.mark.parametrize("wrong", [700, -1])
def test_an_id_outside_the_vocabulary_is_named(bpe, wrong):
    with pytest.raises(TokenizerError, match=f"id {wrong} lies outside the 700 ids"):
        bpe.decode([5, wrong])


def test_unused_ids_below_the_special_ones_decode_to_nothing(openai_like):
    assert openai_like["cl100k_base"].decode([703, 704, 702]) == "<|fim|>"


def test_a_failed_save_leaves_the_old_file_and_nothing_else(bpe, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("old")
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "rename", full)
    with pytest.raises(OSError, match="No space"):
        bpe.save(tmp_path / "tokenizer.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("tokenizer.json", "old")]


# ---- Cuts and long texts ---------------------------------------------------------------------------------------------

PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN}
CUT_PROBES_LEFT = ("a", "A", "aB", "Ab", "é", "中", "don't", "x's", "'l", " a", "\n\na", "1a", "!a", "ß", "ǅ", "-\ta")
CUT_PROBES_RIGHT = (" b", " B", " bC", " é", " 中", " b's", " b ", " b1", " b\n", " b  c")
LINE_PROBES_LEFT = ("a\n", ".\n", "中\n", "1\n", ".'\n", "x'\n", "=\n", "\n\na\n", "\r\na\n")
LINE_PROBES_RIGHT = ("b", "1", "中", "b c", "1\n", "12\n\n")


def allows_cuts(pattern: str) -> bool:
    """Whether a match of the pattern ends at every CUT, tried on a few letters, digits and blanks around one."""
    compiled = regex.compile(pattern)
    probes = [(left, right) for left in CUT_PROBES_LEFT for right in CUT_PROBES_RIGHT]
    probes += [(left, right) for left in LINE_PROBES_LEFT for right in LINE_PROBES_RIGHT]
    return all(compiled.findall(left) + compiled.findall(right) == compiled.findall(left + right)
               for left, right in probes)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_words_end_at_every_cut_of_each_pattern(pattern):
    assert allows_cuts(pattern) and not allows_cuts(r" ?\p{L}+(?:\s\p{L}+)*|[\s\S]")
    compiled, cuts = regex.compile(pattern), 0
    for text in fuzz(2000, seed=3):
        ends = {match.end() for match in compiled.finditer(text)}
        for cut in CUT.finditer(text):
            cuts += 1
            assert cut.start() in ends, (text, cut.start())
            assert compiled.findall(text[:cut.start()]) + compiled.findall(text[cut.start():]) == compiled.findall(text)
    assert cuts > 500


def test_pieces_join_to_the_text_and_are_cut_soon_after_their_size():
    text = "".join(fuzz(500, seed=5))
    parts = list(pieces(text, 100))
    assert "".join(parts) == text and len(parts) > 20
    assert all(len(part) >= 100 for part in parts[:-1])
    assert all(CUT.match(before[-2:] + after[:2], 2) for before, after in zip(parts, parts[1:], strict=False))
    assert list(pieces("some words here", 1)) == ["some", " words", " here"]
    assert list(pieces("!!! ??? ...", 1)) == ["!!! ??? ..."]


def test_a_long_text_has_the_ids_of_the_whole(bpe, openai_like, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 50)
    monkeypatch.setattr(module, "WINDOW_CHARS", 200)
    for tokenizer in (bpe, *openai_like.values()):
        oracle = encoding_of(tokenizer)
        text = " and then ".join(fuzz(400, seed=6))
        assert tokenizer.encode(text).tolist() == oracle.encode_ordinary(text)


RUNS = [" ", "\n", "a", "0", "!", "-", "😀", "e\u0301", "\u0301", "中", "\r\n", "\t", " !", "ab", "\u00a0"]


@pytest.mark.parametrize("unit", RUNS, ids=[repr(unit) for unit in RUNS])
def test_a_run_without_a_cut_has_the_ids_of_the_whole(unit, bpe, openai_like, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 500)
    monkeypatch.setattr(module, "WINDOW_CHARS", 700)
    for tokenizer in (bpe, *openai_like.values()):
        oracle = encoding_of(tokenizer)
        for count in (1999, 2000, 5003):
            text = "Hello" + unit * count + "x y"
            assert tokenizer.encode(text).tolist() == oracle.encode_ordinary(text), tokenizer.name


def test_text_without_any_cut_has_the_ids_of_the_whole(bpe, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 500)
    monkeypatch.setattr(module, "WINDOW_CHARS", 700)
    letters = random.Random(7)
    for alphabet in ("abcdefgh", "0123456789abcdef", "日本語中文,。", " \n\t", "!?.-"):
        text = "".join(letters.choices(alphabet, k=6000))
        assert bpe.encode(text).tolist() == encoding_of(bpe).encode_ordinary(text)


def test_blanks_beyond_the_regex_engines_stack_are_encoded_all_the_same(bpe):
    text = " " * 1_100_000 + "x"
    with pytest.raises(BaseException, match="[Ss]tack"):  # tiktoken's own limit: a ValueError or a Rust panic
        encoding_of(bpe).encode_to_numpy(text)
    assert bpe.decode_bytes(bpe.encode(text)) == text.encode()


def test_the_time_of_a_run_grows_in_proportion_to_its_length(bpe):
    def seconds(count: int) -> float:
        started = time.process_time()
        bpe.encode("-" * count)
        return time.process_time() - started
    short = min(seconds(600_000) for _ in range(3))
    assert min(seconds(2_400_000) for _ in range(2)) < 8 * short + 0.1  # 4 if exactly proportional; other load adds


# ---- Files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_with_the_same_ids_and_writes_the_same_file(name, bpe, tmp_path):
    tokenizer = bpe if name == "bpe" else load_tokenizer(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(str(tmp_path))
    assert (again.vocab_size, again.eot, again._hf) == (tokenizer.vocab_size, tokenizer.eot, None)
    assert again.fingerprint == tokenizer.fingerprint
    for text in fuzz(200, seed=8):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert HuggingFace.from_file(str(tmp_path / "tokenizer.json")).encode(HARD[:60]).ids == \
        tokenizer.encode(HARD[:60]).tolist()


def test_a_retrained_tokenizer_under_the_same_path_is_the_new_one(tmp_path):
    for text in ("hello world " * 50, "foo bar baz " * 50):
        tokenizer = train_bpe([text], 262)
        tokenizer.save(tmp_path / "tokenizer.json")
        assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text).tolist() == tokenizer.encode(text).tolist()


def library_file(path: Path, **parts) -> HuggingFace:
    """A tokenizer.json as others write them, trained on the small corpus; parts are set on the library's object."""
    hf = HuggingFace(models.BPE(byte_fallback=parts.pop("byte_fallback", False), unk_token=None))
    for name, part in parts.items():
        setattr(hf, name, part)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*CORPUS, *["1234567890" * 30] * 20]
    hf.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=[END_OF_TEXT],
                                                      initial_alphabet=alphabet, show_progress=False))
    hf.save(str(path))
    hf.encode_special_tokens = True
    return hf


def byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert),
                                    pre_tokenizers.ByteLevel(False, use_regex=False)])


# Every pre_tokenizer that is encoded by tiktoken, as files of others spell it; tokenizer.py's table holds no other.
SPLITS = {"gpt2": byte_level(), "gpt2-in-a-sequence": pre_tokenizers.Sequence([byte_level()])} | {
    f"{name}-{number}-{behavior}": split(spelling, behavior, invert)
    for name, pattern in PATTERNS.items()
    for number, spelling in enumerate(spelling for spelling, found in FILE_REGEXES.items() if found == pattern)
    for behavior, invert in (("isolated", False), ("removed", True))}
EVERY_CHARACTER = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def assert_same_ids(tokenizer: module.Tokenizer, hf: HuggingFace, texts: list[str]) -> None:
    for text in texts:
        assert tokenizer.encode(text).tolist() == hf.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_of_the_table_gives_the_librarys_ids(name, tmp_path):
    hf = library_file(tmp_path / "tokenizer.json", pre_tokenizer=SPLITS[name])
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.byte_level and tokenizer.cuttable
    assert_same_ids(tokenizer, hf, [HARD, "1234567 12345678", *CORPUS, *fuzz(1500, seed=9)])


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_character_of_unicode_is_split_as_the_library_does(pattern, tmp_path):
    """The library's regex engine and tiktoken's each have their own tables of Unicode."""
    splits = byte_level() if pattern == GPT2_PATTERN else split(
        next(spelling for spelling, found in FILE_REGEXES.items() if found == pattern))
    hf = library_file(tmp_path / "tokenizer.json", pre_tokenizer=splits)
    tokenizer = load_tokenizer(str(tmp_path))
    for start in range(0, len(EVERY_CHARACTER), 4096):
        assert_same_ids(tokenizer, hf, ["".join(f"{char}a1'{char}!" for char in EVERY_CHARACTER[start:start + 4096:7])])


QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
         r"\s+")  # digits one by one


@pytest.mark.parametrize("parts", [
    {"pre_tokenizer": byte_level(), "normalizer": normalizers.NFC()},
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])},
    {"pre_tokenizer": split(QWEN2)},
    {"pre_tokenizer": split(next(iter(FILE_REGEXES)), "merged_with_next")},
    # tiktoken reads the + after {1,3} as possessive, the library as "one or more times"
    {"pre_tokenizer": split(r"\p{N}{1,3}+|[^\p{N}]+")},
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
    {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()},
    {},
], ids=["normalizer", "prefix space", "two splits", "qwen2", "merged split", "regex read differently", "no split",
        "metaspace", "none"])
def test_any_other_tokenizer_file_is_left_to_the_library(parts, tmp_path):
    hf = library_file(tmp_path / "tokenizer.json", **parts)
    tokenizer = load_tokenizer(str(tmp_path))
    assert not tokenizer.cuttable
    assert_same_ids(tokenizer, hf, [HARD, "1234567 12345678", *fuzz(300, seed=9)])
    tokenizer.save(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def every_pair(model: dict) -> list[list[str]]:
    """All pairs of words that make a word, as Llama 3's file lists them: by the id made, then by those that make it."""
    vocab = model["vocab"]
    pairs = [[word[:cut], word[cut:]] for word in vocab for cut in range(1, len(word))]
    found = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab and "".join(pair) != END_OF_TEXT]
    return sorted(found, key=lambda pair: (vocab["".join(pair)], vocab[pair[0]], vocab[pair[1]]))


def without(vocab: dict[str, int], *words: str) -> dict[str, int]:
    return {word: i for word, i in vocab.items() if word not in words}


def swapped(vocab: dict[str, int]) -> dict[str, int]:
    first, second = (word for word, i in vocab.items() if i in (400, 401))
    return vocab | {first: 401, second: 400}


@pytest.mark.parametrize(("change", "by_tiktoken"), [
    (lambda model: {"merges": [" ".join(pair) for pair in model["merges"]]}, True),  # up to tokenizers 0.19
    (lambda model: {"merges": every_pair(model)}, True),
    (lambda model: {"ignore_merges": True, "vocab": without(model["vocab"], END_OF_TEXT)}, True),
    (lambda model: {"ignore_merges": True}, False),
    (lambda model: {"vocab": swapped(model["vocab"])}, False),
    (lambda model: {"merges": model["merges"][:-1]}, False),  # a token that no merge makes
    (lambda model: {"merges": model["merges"][1:] + model["merges"][:1]}, False),
    (lambda model: {"unk_token": "a"}, False),
    (lambda model: {"byte_fallback": True}, False),
], ids=["old merges", "every pair", "ignore_merges", "ignore_merges and a special word", "order of ids", "no merge",
        "order of merges", "unknown", "fallback"])
def test_a_model_goes_to_tiktoken_only_if_its_merges_are_in_the_order_of_ids(change, by_tiktoken, tmp_path):
    library_file(tmp_path / "tokenizer.json", pre_tokenizer=byte_level())
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"] |= change(file["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    hf = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.cuttable == by_tiktoken
    hf.encode_special_tokens = True
    assert_same_ids(tokenizer, hf, [HARD, *CORPUS, *fuzz(300, seed=11)])


def test_a_model_without_a_type_is_taken_as_the_library_takes_it(tmp_path):
    """GPT-2's own file is so."""
    hf = library_file(tmp_path / "tokenizer.json", pre_tokenizer=byte_level())
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    del file["model"]["type"], file["pre_tokenizer"]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.byte_level
    again = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    again.encode_special_tokens = True
    assert_same_ids(tokenizer, hf, [HARD, *fuzz(100)])
    assert_same_ids(tokenizer, again, [HARD, *fuzz(100)])


def test_dropout_and_added_words_are_the_librarys(tmp_path):
    library_file(tmp_path / "tokenizer.json", pre_tokenizer=byte_level())
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    for key, value in (("model", file["model"] | {"dropout": 0.1}),
                       ("added_tokens", [*file["added_tokens"], file["added_tokens"][0] | {
                           "id": 600, "content": "fuse", "special": False}])):
        (tmp_path / "tokenizer.json").write_text(json.dumps(file | {key: value}))
        assert not load_tokenizer(str(tmp_path)).cuttable
    assert load_tokenizer(str(tmp_path)).encode("a fuse").tolist()[-1] == 600


def with_file(path: Path, change) -> module.Tokenizer:
    """The tokenizer of a file after a change to its JSON."""
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    return load_tokenizer(str(path))


def like_qwen(file: dict) -> None:
    """A byte that no text has is no word, and one added token is not special: as in Qwen's files."""
    file["model"]["vocab"]["unused"] = file["model"]["vocab"].pop("\u0102")
    file["added_tokens"].append(file["added_tokens"][0] | {"id": 600, "content": "<tool é>", "special": False})


@pytest.mark.parametrize("parts", [
    {"normalizer": normalizers.NFC(), "decoder": decoders.ByteLevel()}, {"decoder": decoders.ByteLevel()},
    {"decoder": decoders.Sequence([decoders.ByteLevel()])}, {"normalizer": normalizers.NFC()}],
    ids=["NFC", "added token alone", "sequence", "no decoder"])
def test_bytes_are_those_of_the_text_whatever_stands_beside_a_byte_level_decoder(parts, tmp_path):
    library_file(tmp_path / "tokenizer.json", pre_tokenizer=split(QWEN2), **parts)
    tokenizer = with_file(tmp_path / "tokenizer.json", like_qwen)
    assert tokenizer.byte_level and not tokenizer.cuttable
    for text in [HARD, "then <tool é> the house", "## <0x41> \u2581", *fuzz(100, seed=12)]:
        ids, text = tokenizer.encode(text), unicodedata.normalize("NFC", text) if "normalizer" in parts else text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) == tokenizer.scored_bytes()[ids].sum()
        assert b"".join(map(tokenizer.spelling, ids)) == text.encode() == tokenizer.decode_bytes(ids)
        assert tokenizer.decode(ids) == text and tokenizer.spells(ids, text)
    assert b" the" in map(tokenizer.spelling, tokenizer.encode("then the house"))
    assert tokenizer.added_ids == {tokenizer.eot, 600}


def test_an_added_token_that_the_library_would_give_another_id_is_refused(tmp_path):
    library_file(tmp_path / "tokenizer.json", pre_tokenizer=split(QWEN2), decoder=decoders.ByteLevel())
    with pytest.raises(TokenizerError, match="added token '<new>' has id 777, but the library makes it 600"):
        with_file(tmp_path / "tokenizer.json", lambda file: file["added_tokens"].append(
            file["added_tokens"][0] | {"id": 777, "content": "<new>", "special": False}))


METASPACE = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
LLAMA2 = {"normalizer": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
          "decoder": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])}


@pytest.mark.parametrize("parts", [METASPACE, LLAMA2], ids=["metaspace", "llama2"])
def test_a_tokenizer_that_is_not_byte_level_decodes_and_counts_its_text(parts, tmp_path):
    library_file(tmp_path / "tokenizer.json", **parts)
    tokenizer = load_tokenizer(str(tmp_path))
    for text in ("The house is a tree", "# The ## house"):  # Markdown's marks are no WordPiece's
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.token_bytes()[ids].sum() == len(text) + 1  # the mark before the first word counts
        assert tokenizer.spells(ids, text)
    assert tokenizer.token_bytes()[tokenizer.eot] == 0 and not tokenizer.cuttable and not tokenizer.byte_level


def test_byte_fallback_spells_bytes_and_only_where_the_file_has_it(tmp_path):
    library_file(tmp_path / "tokenizer.json", **LLAMA2)

    def with_bytes(file: dict) -> None:
        file["model"]["vocab"] |= {f"<0x{byte:02X}>": 600 + byte for byte in range(256)}
        file["model"]["byte_fallback"] = True

    tokenizer = with_file(tmp_path / "tokenizer.json", with_bytes)
    ids = tokenizer.encode("a 日é\n")
    assert b"".join(map(tokenizer.spelling, ids)) == " a 日é\n".encode() and tokenizer.decode(ids) == "a 日é\n"
    assert tokenizer.spelling(600 + 0xE6) == b"\xe6" and (tokenizer.scored_bytes()[ids] > 0).all()

    def without(file: dict) -> None:
        file["model"]["byte_fallback"] = False
        file["decoder"]["decoders"].pop(1)

    tokenizer = with_file(tmp_path / "tokenizer.json", without)
    assert tokenizer.spelling(600 + 0xE6) == b"<0xE6>"
    assert tokenizer.scored_bytes().max() == 0  # characters that it does not know vanish


def word_pieces(path: Path) -> None:
    hf = HuggingFace(models.WordPiece(unk_token="[UNK]"))
    hf.normalizer, hf.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    hf.decoder = decoders.WordPiece()
    hf.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"],
                                                             show_progress=False))
    hf.save(str(path))


def words_alone(path: Path) -> None:
    hf = HuggingFace(models.WordLevel(unk_token="[UNK]"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[SEP]"], show_progress=False))
    hf.save(str(path))


@pytest.mark.parametrize("make", [word_pieces, words_alone, lambda path: library_file(
    path, pre_tokenizer=byte_level(), decoder=decoders.ByteLevel(), normalizer=normalizers.Lowercase()) and None,
    lambda path: library_file(path, pre_tokenizer=byte_level(), decoder=decoders.ByteLevel(),
                              normalizer=normalizers.NFKC()) and None], ids=["WordPiece", "WordLevel", "lower", "NFKC"])
def test_a_tokenizer_that_loses_text_has_no_bytes_to_score(make, tmp_path):
    make(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path))
    unknown = tokenizer.unknown
    assert set(np.delete(tokenizer.scored_bytes(), [] if unknown is None else unknown).tolist()) == {0}
    text = "The House\uff0c  and 日本"
    ids = tokenizer.encode(text)
    assert not tokenizer.spells(ids, text)
    if unknown is not None:
        assert unknown in ids and tokenizer.scored_bytes()[unknown] == -1 and tokenizer.spelling(unknown) == b"[UNK]"


def test_a_word_piece_that_continues_is_spelled_without_its_mark(tmp_path):
    word_pieces(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path))
    assert b"".join(map(tokenizer.spelling, tokenizer.encode("thexe"))) == b"thexe"


@pytest.mark.parametrize(("content", "message"), [
    ("not json", "is not a Hugging Face tokenizer.json"),
    pytest.param("[" * 100_000, "is not a Hugging Face tokenizer.json: ValueError it is nested too deeply", id="deep"),
    ('{"model": 1, "model": 2}', "it gives 'model' two values"),
    ("{}", "is not a Hugging Face tokenizer.json: KeyError"),
    ('{"added_tokens": [], "normalizer": null, "pre_tokenizer": null, "model": {"type": "Odd"}}', "is not a Hugging"),
])
def test_a_file_that_is_no_tokenizer_is_named(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_of_text_is_refused(bpe, tmp_path):
    file = json.loads(bpe.file_text.replace(END_OF_TEXT, "<|stop|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(TokenizerError, match=r"has no end-of-text token among its special tokens \(<\|stop\|>\)"):
        load_tokenizer(str(tmp_path))


# ---- Names -----------------------------------------------------------------------------------------------------------

def test_a_name_that_is_nothing_lists_what_there_is(tmp_path):
    with pytest.raises(TokenizerError, match="'gpt3' is neither a name nor a file; there are bytes, bpe:N, gpt2"):
        load_tokenizer("gpt3")
    with pytest.raises(TokenizerError, match="holds no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="'bpe:4096' must be trained on text first"):
        load_tokenizer("bpe:4096")


def test_the_identity_of_a_file_is_that_of_its_content(bpe, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        bpe.save(tmp_path / folder / "tokenizer.json")
    identity = tokenizer_identity(str(tmp_path / "a"))
    assert identity == tokenizer_identity(str(tmp_path / "b" / "tokenizer.json"))
    assert identity == load_tokenizer(str(tmp_path / "a")).name
    assert identity.split(":")[1] == bpe.fingerprint[:12] and tokenizer_identity("bpe:0700") == "bpe:700"


@pytest.mark.parametrize("name", TIKTOKEN_FILES)
def test_a_download_that_fails_says_how_to_work_offline(name, tmp_path, monkeypatch):
    import requests

    def unreachable(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "head", unreachable)
    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(name)
    message = str(caught.value)
    assert "\n" not in message and "TIKTOKEN_CACHE_DIR" in message and "bpe:N" in message and "bytes" in message
    for url in TIKTOKEN_FILES[name]:
        assert hashlib.sha1(url.encode()).hexdigest() in message


def test_the_files_named_for_a_download_are_those_that_tiktoken_asks_for(monkeypatch):
    asked = []
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda url, **kwargs: asked.append((url,)) or {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks",
                        lambda **files: asked.append((files["vocab_bpe_file"], files["encoder_json_file"])) or {})
    for name, urls in TIKTOKEN_FILES.items():
        getattr(openai_public, name)()
        assert asked.pop() == urls


@needs_gpt2
def test_gpt2_survives_saving_with_gpt2s_ids(tmp_path):
    tokenizer, oracle = load_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    tokenizer.save(tmp_path / "tokenizer.json")
    again, hf = load_tokenizer(str(tmp_path)), HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    assert (again.vocab_size, again.eot, again._hf) == (50257, 50256, None)
    hf.encode_special_tokens = True
    for text in [HARD, *CORPUS, *fuzz(500, seed=10)]:
        expected = oracle.encode_ordinary(text)
        assert tokenizer.encode(text).tolist() == again.encode(text).tolist() == hf.encode(text).ids == expected, text


@needs_gpt2
def test_gpt2s_merges_are_those_that_openai_published():
    merges = json.loads(load_tokenizer("gpt2").file_text)["model"]["merges"]
    assert merges == gpt2_files()[0].read_text(encoding="utf-8").split("\n")[1:-1]


# ---- End-of-text of tokenizers that call it by another name ----------------------------------------------------------

def renamed(folder: Path, **names: str) -> Path:
    """A folder with the tokenizer.json of train_bpe and two more special tokens, <|im_end|> and <eos>."""
    file = json.loads(train_bpe(["the cat sat on the mat"], 260).file_text)
    (special,) = file["added_tokens"]
    file["added_tokens"] += [special | {"id": 260, "content": "<|im_end|>"}, special | {"id": 261, "content": "<eos>"}]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    if names:
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_tokenizer_config_names_the_end_of_text_and_copies_keep_it(tmp_path):
    (tmp_path / "copy").mkdir()
    tokenizer = load_tokenizer(renamed(tmp_path, eos_token="<|im_end|>"))
    assert (tokenizer.eot, tokenizer.eot_token) == (260, "<|im_end|>")
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    assert load_tokenizer(tmp_path / "copy").eot == load_tokenizer(tmp_path / "copy" / "tokenizer.json").eot == 260


@pytest.mark.parametrize("named", [{"eos_token": "<|im_end|>"}, {"eos_token": "</s>", "pad_token": "<|im_end|>"}])
@pytest.mark.parametrize("splits", [True, False])  # encoded by tiktoken, or by the library
def test_a_named_token_is_special_whatever_tokenizer_json_calls_it(splits, named, tmp_path):
    """As in transformers 5, which adds what tokenizer_config.json names to the library's special tokens."""
    renamed(tmp_path, **named)
    file = json.loads((tmp_path / "tokenizer.json").read_text().replace("<eos>", "</s>"))
    file["added_tokens"] = [t | {"special": t["content"] not in named.values()} for t in file["added_tokens"]]
    file["pre_tokenizer"] |= {"add_prefix_space": not splits}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    hf = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    hf.add_special_tokens(list(named.values()))
    tokenizer, ids = load_tokenizer(tmp_path), [*hf.encode("cat").ids, 260, *hf.encode("mat").ids, 261, 259]
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    for one in (tokenizer, load_tokenizer(tmp_path / "copy")):
        assert one.eot_token == named["eos_token"] and (one._hf is None) == splits
        assert one.special_ids.keys() >= set(named.values())
        assert one.decode_bytes(ids).decode() == hf.decode(ids)
        assert 260 not in one.encode("cat<|im_end|>")  # what a text spells is text


def test_saving_a_tokenizer_with_a_known_end_of_text_removes_the_name_of_another(tmp_path):
    """Else a folder used again would end texts with the token of the tokenizer before."""
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    train_bpe(["the cat sat on the mat"], 260).save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).eot == 259
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_given_end_of_text_counts_after_tokenizer_config_and_before_known_names(tmp_path):
    assert load_tokenizer(renamed(tmp_path)).eot == 259
    assert load_tokenizer(tmp_path, end_of_text=261).eot == 261
    assert load_tokenizer(tmp_path, end_of_text=3).eot == 259  # no special token
    assert load_tokenizer(renamed(tmp_path, eos_token="<|im_end|>"), end_of_text=261).eot == 260


def test_tokenizers_that_differ_in_end_of_text_alone_are_told_apart(tmp_path):
    """Else shards whose documents end with one would be taken for those of the other."""
    plain = tokenizer_identity(renamed(tmp_path))
    assert tokenizer_identity(renamed(tmp_path, eos_token="<|im_end|>")) == plain + "+<|im_end|>"
    assert tokenizer_identity(renamed(tmp_path, eos_token="<|endoftext|>")) == plain
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config.json' cannot be read"):
        tokenizer_identity(tmp_path)


def test_an_end_of_text_that_is_no_special_token_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="eos_token '</s>'.*special tokens .*<eos>"):
        load_tokenizer(renamed(tmp_path, eos_token="</s>"))


@pytest.mark.parametrize(("processor", "expected"), [
    (None, None), ({"type": "ByteLevel"}, None),
    ({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}, None),
    ({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<eos>"}}, {"Sequence": {"id": "A"}}]}, "<eos>"),
    ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<eos>"}}]}]}, "<eos>"),
    ({"type": "BertProcessing", "sep": ["<|im_end|>", 260], "cls": ["<eos>", 261]}, "<eos>"),
    ({"type": "RobertaProcessing", "sep": ["<|im_end|>", 260], "cls": ["<eos>", 261], "trim_offsets": True,
      "add_prefix_space": False}, "<eos>")], ids=str)
def test_the_token_before_every_text_is_that_of_the_post_processor(processor, expected, tmp_path):
    assert token_before_text(processor) == expected
    if "single" not in str(processor):  # else they are shortened
        file = json.loads((renamed(tmp_path) / "tokenizer.json").read_text()) | {"post_processor": processor}
        if processor and processor["type"] == "ByteLevel":
            file["post_processor"] |= {"add_prefix_space": False, "trim_offsets": True}
        first = HuggingFace.from_str(json.dumps(file)).encode("cat").tokens[0]
        assert (first if expected else None) == expected
