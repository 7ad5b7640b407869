"""Text of all kinds, damaged or hostile, by the thousand: JSONL, tokenizer.json, chat templates, HTTP requests, and
Hugging Face folders. As test_faults_files.py.
"""

import contextlib
import difflib
import functools
import json
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import convert
from data import chat
from data.dataset import open_dataset, open_split
from data.prepare import prepare
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests import fuzzing
from tests.fuzzing import JSON, WORDS, Refused, changed, fuzz, json_text, mutations, other_json, outcome, scratch, st
from tests.test_faults_files import read_independently
from tests.test_sample import make_model, save_run

TEXT = "The cat sat, it's on 12 mats.\n\n naïve 日本 <|endoftext|> end"

# ---- tokenizer.json --------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer_texts() -> dict[str, str]:
    """A tokenizer.json of each road: tiktoken's, and the library's models."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, normalizers, pre_tokenizers
    texts = {"bpe": train_bpe([TEXT * 5], 270).file_text, "bytes": load_tokenizer("bytes").file_text}
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in "abcdehiknost,.12'")]
    pieces = models.WordPiece({"[UNK]": 0, "</s>": 1, "the": 2, "##s": 3}, unk_token="[UNK]")
    for name, model in (("unigram", models.Unigram(vocab, 0, False)), ("wordpiece", pieces)):
        hf = HuggingFace(model)
        hf.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "y")])
        hf.pre_tokenizer = pre_tokenizers.Metaspace() if name == "unigram" else pre_tokenizers.Whitespace()
        hf.add_special_tokens(["</s>"])
        texts[name] = hf.to_str()
    split = json.loads(texts["bpe"])
    split["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+|."}, "behavior": "Isolated", "invert": False},
        split["pre_tokenizer"] | {"use_regex": False}]}
    texts["split"] = json.dumps(split)
    return texts


def use(folder: Path) -> tuple[Tokenizer, list[int], str]:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(TEXT).tolist()
    tokenizer.encode(TEXT, behind="text")
    tokenizer.token_bytes()
    tokenizer.scored_bytes()
    return tokenizer, ids, tokenizer.decode(ids)


@fuzz(300, kind=st.sampled_from(["bpe", "bytes", "unigram", "wordpiece", "split"]), data=st.data())
def test_tokenizer_files(kind, data):
    good = tokenizer_texts()[kind]
    text = data.draw(st.one_of(mutations(good.encode()), other_json(json.loads(good)).map(json_text)))
    folder = scratch() / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(text)
    found = outcome(lambda: use(folder), "tokenizer.json")
    if not isinstance(found, Refused):
        tokenizer, ids, decoded = found
        assert 0 <= min(ids, default=0) <= max(ids, default=0) < tokenizer.vocab_size < 10 ** 7
        if (theirs := library_ids(text)) is not None:
            assert ids == theirs, changes(good, text)


def library_ids(text: bytes) -> list[int] | None:
    """The `tokenizers` library's ids of TEXT, special tokens in it as plain text; None if it does not read the file."""
    from tokenizers import Tokenizer as HuggingFace
    try:
        hf = HuggingFace.from_str(text.decode())
        hf.encode_special_tokens = True
        return hf.encode(TEXT, add_special_tokens=False).ids
    except Exception:  # the library raises nothing more special
        return None


def changes(good: str, text: bytes) -> str:
    """Where a file differs, for the message."""
    lines = (json.dumps(json.loads(some), indent=0, sort_keys=True).splitlines() for some in (good, text))
    return "\n".join(line for line in difflib.ndiff(*lines) if line[0] in "+-")


@pytest.mark.parametrize("place", [("added_tokens", 0, "id"), ("model", "vocab", "t")])
@pytest.mark.parametrize("number", [10 ** 12, 10 ** 9, -1, 2 ** 31])
def test_an_id_far_beyond_the_file_takes_no_memory(place, number):
    file = json.loads(tokenizer_texts()["bpe"])
    functools.reduce(lambda part, key: part[key], place[:-1], file)[place[-1]] = number
    (scratch() / "tokenizer.json").write_bytes(json_text(file))
    with peak_memory(64 << 20):
        assert isinstance(outcome(lambda: use(scratch() / "tokenizer.json"), "tokenizer.json"), Refused)


@contextlib.contextmanager
def peak_memory(limit_bytes: int) -> Iterator[None]:
    """No more than that, by Python and numpy."""
    tracemalloc.start()
    try:
        with fuzzing.limited_memory():
            yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("regex", ["(a+)+$", "(a|a)*b", "(.*)*x", "((a{1,9}){1,9}){1,9}b"])
def test_a_split_that_backtracks_ends_all_the_same(regex):
    file = json.loads(tokenizer_texts()["split"])
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    (scratch() / "tokenizer.json").write_bytes(json_text(file))
    started = time.perf_counter()
    outcome(lambda: load_tokenizer(str(scratch() / "tokenizer.json")).encode("a" * 60 + "!"), "tokenizer.json")
    assert time.perf_counter() - started < 60  # not for ever


# ---- Chat templates --------------------------------------------------------------------------------------------------

NAMES = ["messages", "eos_token", "x", "loop", "self", "namespace", "range", "dict", "lipsum", "cycler", "joiner",
         "tools", "raise_exception", "strftime_now", "''", "[]", "{}", "1", "9", "'%s'", "messages[0]",
         "messages[0].content"]
TAILS = [".__class__", ".__mro__", ".__subclasses__()", ".__globals__", ".__init__", "['__class__']", "()", "[0]",
         "|attr('__class__')", "|tojson", "|map(attribute='__class__')|list", ".format", ".format(x)", "|list", "|trim",
         "*9", "**9", "%9", "|string", "(9)", ".pop()", ".append(1)", ".update({})", "|format(x)", "|center(9)",
         ".func",
         "._environment", ".gi_frame", "|join", ".__call__.__func__", "|safe", "|xmlattr", "|batch(2)|list", "|sum",
         "|int", "~x", "/0"]
EXPRESSION = st.builds(lambda name, tails: name + "".join(tails), st.sampled_from(NAMES),
                       st.lists(st.sampled_from(TAILS), max_size=4))
STATEMENT = st.one_of(
    EXPRESSION.map("{{{{ {} }}}}".format), EXPRESSION.map("{{% set x = {} %}}".format), st.text(max_size=5),
    EXPRESSION.map("{{% for m in {} %}}{{{{ m }}}}{{% endfor %}}".format),
    EXPRESSION.map("{{% if {} %}}y{{% endif %}}".format), EXPRESSION.map("{{% include {} %}}".format),
    EXPRESSION.map("{{% import {} as y %}}{{{{ y }}}}".format), EXPRESSION.map("{{% extends {} %}}".format),
    st.sampled_from(["{% generation %}", "{% endgeneration %}", "{% endfor %}", "{%", "{{", "{% break %}",
                     "{{ caller() }}", "{% macro m(a) %}{{ m(a) }}{% endmacro %}{{ m(1) }}",
                     "{% set ns = namespace(a=1) %}{{ ns }}"]))
TALK = [{"role": "user", "content": "Hi <|endoftext|>"}, {"role": "assistant", "content": "Ho"}]


@fuzz(600, template=st.one_of(st.lists(STATEMENT, min_size=1, max_size=4).map("".join), mutations(
    chat.DEFAULT_TEMPLATE.encode()).map(lambda data: data.decode(errors="replace"))))
def test_chat_templates(template):
    found = outcome(lambda: chat.render(chat.check_template(template, "t.jinja"), TALK, add_generation_prompt=True,
                                        eos_token="</s>"), "t.jinja", "template")
    if not isinstance(found, Refused):
        assert not any(words in found for words in ("<class 'object'", "<module ", "subclass", "os.system")), found
        assert len(found) < 10 ** 6


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}", "{{ x.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}", "{{ lipsum.__globals__.os.system('id') }}",
    "{{ cycler.__init__.__globals__ }}", "{{ self._TemplateReference__context }}", "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}", "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ strftime_now.__code__ }}", "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'config.py' %}",
    "{{ messages.append(1) }}", "{{ messages[0].update({'role': 'x'}) }}", "{{ messages[0].pop('role') }}"]


@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_reaches_no_object_and_no_file_and_changes_nothing(template):
    talk = [dict(message) for message in TALK]
    found = outcome(lambda: chat.render(template, talk, add_generation_prompt=True))
    assert isinstance(found, Refused) or found.strip() in ("", "[Undefined, Undefined]"), found
    assert talk == TALK


@pytest.mark.parametrize("template", [
    "{{ 9 ** 9 ** 9 }}", "{{ 2 ** 10000000000 }}", "{{ 'a' * 10 ** 12 }}", "{{ 'a' * 1000000000000 }}",
    "{{ [0] * 1000000000000 }}", "{{ 'x'|center(1000000000000) }}", "{{ '%1000000000000d' % 1 }}",
    "{% for i in range(1000000000000) %}{% endfor %}", "{{ x" + "(" * 5000 + "}}", "{{ " + "-" * 5000 + "1 }}",
    "{% if 1 %}" * 3000, "{{ " + "[" * 3000 + "]" * 3000 + " }}"])
def test_a_template_that_asks_for_everything_is_refused(template):
    with fuzzing.limited_memory():
        started = time.perf_counter()
        assert isinstance(outcome(lambda: chat.render(template, TALK, add_generation_prompt=True)), Refused)
        assert time.perf_counter() - started < 60  # not for ever


@fuzz(300, messages=st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]),
                                                    "content": WORDS}), max_size=4))
def test_what_messages_spell_is_plain_text(messages):
    tokenizer = load_tokenizer("bytes")
    ids = outcome(lambda: chat.encode_chat(tokenizer, chat.DEFAULT_TEMPLATE, messages))
    if not isinstance(ids, Refused):
        assert np.count_nonzero(ids == tokenizer.eot) == sum(message["role"] == "assistant" for message in messages)


# ---- JSONL -----------------------------------------------------------------------------------------------------------

ROW = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=12)}).map(json_text),
    st.fixed_dictionaries({"text": WORDS}, optional={"id": JSON}).map(json_text),
    JSON.map(json_text), st.sampled_from([
        b"", b" ", b'{"text": "a"', b'{"text": "a", "text": "b"}', b'{"text": NaN}', b'\xef\xbb\xbf{"text": "b"}',
        b"\xff\xfe",
        b'{"text": "\xff"}', b'{"text": 1}', b'[{"text": "a"}]', b'{"text": ' + b"[" * 990 + b"]" * 990 + b"}",
        b'{"text": "a", "x": ' + b"[" * 600 + b'"\\ud800"' + b"]" * 600 + b"}", b'{"text": "a"} x', b"null", b"{}",
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}"]))


def as_text(row: bytes) -> str | None:
    """The text of a row by Python's own reader; None if it has none."""
    def pairs(items: list) -> dict:
        assert len(items) == len(dict(items)) or all(dict(items)[key] == value for key, value in items)
        return dict(items)

    try:
        value = json.loads(row.decode("utf-8", "replace").removeprefix("\ufeff"), object_pairs_hook=pairs)
        return value["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        return None


@fuzz(100, rows=st.lists(ROW, min_size=1, max_size=5), ending=st.sampled_from([b"\n", b"\r\n"]),
      skips=st.booleans())
def test_rows_of_text(rows, ending, skips):
    source, out = scratch() / "rows.jsonl", scratch() / "rows"
    source.write_bytes(ending.join(rows))
    shutil.rmtree(out, ignore_errors=True)
    found = outcome(lambda: prepare([str(source)], out, tokenizer="bytes", val_fraction=0.0, kind="text",
                                    bad_rows="skip" if skips else "error", workers=1), str(source), str(out), "split")
    if isinstance(found, Refused):
        assert not (out / "index.json").exists()
        assert skips or None in map(as_text, filter(bytes.strip, rows)) or not any(map(as_text, rows)), found.text
        return
    texts = [as_text(row) for row in rows if row.strip()]
    if not skips:
        assert None not in texts, (rows, "a row without a text passes")
    stream = open_split(open_dataset(out), "train")
    tokens = stream.windows(np.array([0]), stream.tokens)[0].tolist()
    expected = [[*text.encode(), 256] for text in texts if text]
    assert tokens == sum(expected, [])
    assert found["bad_rows"] == texts.count(None)


EXAMPLE = st.sampled_from([
    {"prompt": "p", "response": "r"}, {"prompt": "p", "completion": "r"}, {"text": "t", "label": 1},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1}]}])


@fuzz(80, data=st.data(), skips=st.booleans())
def test_rows_of_examples(data, skips):
    first = data.draw(EXAMPLE)
    rows = [first, *(data.draw(st.one_of(st.just(first), other_json(first), EXAMPLE)) for _ in range(2))]
    source, out = scratch() / "examples.jsonl", scratch() / "rows"
    source.write_bytes(b"\n".join(map(json_text, rows)))
    shutil.rmtree(out, ignore_errors=True)
    found = outcome(lambda: prepare([str(source)], out, tokenizer="bytes", val_fraction=0.0, max_seq_len=64, workers=1,
                                    bad_rows="skip" if skips else "error"), str(source), str(out), "split")
    if not isinstance(found, Refused):
        counts = found["examples"]["train"] if "examples" in found else {"examples": 3}
        assert found["bad_rows"] == 0 or skips
        assert counts["examples"] + found["bad_rows"] >= len(rows)


# ---- Hugging Face folders --------------------------------------------------------------------------------------------

PLAIN = {"max_seq_len": 16, "n_layer": 1, "n_embd": 8, "n_head": 2, "head_dim": None}
MODELS = {"gpt2": PLAIN, "llama": PLAIN | {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "mlp_hidden": 12,
                                           "bias": False, "tie_embeddings": False}}


@functools.cache
def hf_folder(family: str) -> Path:
    run = save_run(scratch() / f"{family}-run", make_model(**MODELS[family]),
                   template=chat.DEFAULT_TEMPLATE)
    convert.to_hf(run, scratch() / family)
    return scratch() / family


@fuzz(250, family=st.sampled_from(["gpt2", "llama"]), data=st.data())
def test_hugging_face_folders(family, data):
    folder = hf_folder(family)
    name = data.draw(st.sampled_from(["config.json", "config.json", "model.safetensors", "generation_config.json",
                                      "tokenizer_config.json"]))
    good = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
    (folder / name).write_bytes(good)
    after = data.draw(mutations(good) if name.endswith("tensors") else st.one_of(
        mutations(good), other_json(json.loads(good)).map(json_text)))
    with changed(folder / name, after):
        found = outcome(lambda: (hf := convert.read_hf(folder)) and (hf.model, hf.weights()), str(folder), "tokenizer")
        if isinstance(found, Refused):
            return
        model, weights = found
        theirs = read_independently((folder / "model.safetensors").read_bytes())
    table = weights["wte.weight"][:model.vocab_size].numpy()
    np.testing.assert_array_equal(table, next(value for key, value in theirs.items() if "wte" in key or "embed" in key))


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions", "n_inner"])
@pytest.mark.parametrize("number", [10 ** 9, 10 ** 12, 10 ** 18, 10 ** 30])
def test_a_config_that_claims_a_giant_takes_no_memory(key, number):
    folder = hf_folder("gpt2")
    config = json.loads((folder / "config.json").read_bytes()) | {key: number}
    with changed(folder / "config.json", json_text(config)), peak_memory(64 << 20):
        assert isinstance(outcome(lambda: convert.read_hf(folder), str(folder)), Refused)
