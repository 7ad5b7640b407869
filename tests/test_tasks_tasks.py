"""tasks.py: log-likelihoods against a plain float64 forward pass, predictions by definition, lines that are refused."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HuggingFace

from config import ModelConfig, UserError
from data.chat import DEFAULT_TEMPLATE, turn_end
from data.examples import Packing, examples
from data.sources import RowsUnit
from data.tokenizer import load_tokenizer, train_bpe
from model import GPT
from tasks import tasks
from tasks.tasks import Answer, Chat, Choice, Labelled, Task, TaskError, read_task
from tests.test_data_chat import KINDS, hugging_face_folder
from tests.test_data_prompts import with_bos

BYTES = load_tokenizer("bytes")
ENDS = frozenset({BYTES.eot})
EOT = BYTES.eot


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> GPT:
    """A small model in eval mode whose weights are large enough for every token of the context to matter."""
    torch.manual_seed(seed)
    defaults = {"n_layer": 2, "n_head": 4, "n_embd": 24, "head_dim": 6, "vocab_size": 257, "max_seq_len": 32}
    model = GPT(ModelConfig(**defaults | settings), compute_dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype)


def talkative_model(dtype: torch.dtype = torch.float32, max_seq_len: int = 32) -> GPT:
    """A model whose next token depends on all tokens before it, and is end-of-text every now and then."""
    model = make_model(dtype=dtype, max_seq_len=max_seq_len, tie_embeddings=False, bias=False)
    with torch.no_grad():
        model.final_norm.weight.fill_(1.0)
        model.wte.weight *= 4.0
        model.wpe.weight *= 4.0
        model.lm_head.weight[EOT] *= 1.6
    return model


@torch.no_grad()
def expected_likelihood(model64: GPT, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """ln p of the continuation, token by token, from one uncached forward pass in float64."""
    tokens = torch.tensor([[*context, *continuation]])
    log_p = model64(tokens[:, :-1]).double().log_softmax(dim=-1)[0]
    return sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def random_requests(pick: random.Random, vocab_size: int, max_seq_len: int) -> list[tasks.Request]:
    """Continuations of a few contexts, of all lengths that fit; some share a context, some are there twice."""
    requests = []
    for _ in range(pick.randint(1, 7)):
        context = tuple(pick.randrange(vocab_size) for _ in range(pick.randint(1, max_seq_len)))
        for _ in range(pick.randint(1, 5)):
            length = pick.choice((1, 1, pick.randint(1, max_seq_len + 1 - len(context))))
            requests.append((context, tuple(pick.randrange(vocab_size) for _ in range(length))))
    return requests + requests[:1]


# ---- Log-likelihoods -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(16))
def test_log_likelihoods_are_those_of_a_plain_forward_pass(seed):
    pick = random.Random(seed)
    settings = dict(
        max_seq_len=pick.choice((3, 17, 24)), vocab_size=pick.choice((50, 1030)),  # 1,030 is padded to 1,152 rows
        norm=pick.choice(("layernorm", "rmsnorm")), position=pick.choice(("learned", "rope")),
        mlp=pick.choice(("gelu", "swiglu")), n_kv_head=pick.choice((None, 1, 2)), window=pick.choice((None, None, 5)),
        qk_norm=pick.random() < 0.5, tie_embeddings=pick.random() < 0.5, logit_softcap=pick.choice((0.0, 5.0)))
    model, model64 = make_model(seed, **settings), make_model(seed, torch.float64, **settings)
    requests = random_requests(pick, settings["vocab_size"], settings["max_seq_len"])
    found = tasks.log_likelihoods(model, requests, batch_size=pick.choice((1, 3, 64)))
    expected = [expected_likelihood(model64, *request) for request in requests]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32: sums of up to 24 rounded terms


def test_log_likelihoods_do_not_depend_on_the_batch_size():
    requests = [request for seed in range(4) for request in random_requests(random.Random(seed), 257, 32)]
    model = make_model(position="rope")
    alone = tasks.log_likelihoods(model, requests, batch_size=1)
    for batch_size in (2, 5, 100):
        np.testing.assert_allclose(tasks.log_likelihoods(model, requests, batch_size=batch_size), alone, rtol=1e-5,
                                   atol=1e-5)  # float32: other shapes of matmuls round otherwise


def test_equal_requests_have_equal_numbers_whatever_stands_between_them():
    model = make_model()
    request = ((1, 2, 3), (4, 5))
    found = tasks.log_likelihoods(model, [request, ((1, 2, 3), (9,)), ((7,), (4, 5, 6)), request], batch_size=2)
    assert found[0] == found[3]


def test_a_context_passes_through_the_model_once_for_all_its_continuations(monkeypatch):
    model, shapes = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **more: shapes.append(tuple(tokens.shape)) or hidden(tokens,
                                                                                                             **more))
    context = tuple(range(20))
    tasks.log_likelihoods(model, [(context, (i, i + 1, i + 2)) for i in range(5)] + [(context, (9,))], batch_size=3)
    assert shapes == [(1, 20), (3, 2), (3, 2)]  # the context; then what is fed of the continuations, three rows each


def test_numbers_that_are_not_finite_are_an_error():
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    with pytest.raises(TaskError, match="not finite; try --dtype float32"):
        tasks.log_likelihoods(model, [((1,), (2,))], batch_size=1)


# ---- Multiple choice -------------------------------------------------------------------------------------------------

def test_blanks_that_end_the_context_begin_the_continuation():
    assert tasks.encode_pair(BYTES, "ab \n", " c", 257) == (tuple(b"ab"), tuple(b" \n c"))


def test_without_a_context_the_continuation_follows_end_of_text():
    assert tasks.encode_pair(BYTES, "", " c", 257) == ((EOT,), tuple(b" c"))
    assert tasks.encode_pair(BYTES, "  ", "c", 257) == ((EOT,), tuple(b"  c"))


def test_a_continuation_has_the_ids_that_the_whole_has_behind_the_context():
    """The harness's rule: where the two merge, the context's own ids stay and the rest of the whole's ids follows."""
    bpe = train_bpe(["foobar foobarbaz"] * 9, 265)
    whole, context = bpe.encode("foobarbaz").tolist(), bpe.encode("foo").tolist()
    assert whole[:len(context)] != context  # they merge indeed
    assert tasks.encode_pair(bpe, "foo", "barbaz", 265) == (tuple(context), tuple(whole[len(context):]))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_split_as_the_harness_splits_them_whatever_begins_a_text(kind, tmp_path):
    """lm_eval/api/model.py: an empty context is the token for the beginning, and the continuation is encoded without
    one; else both encodings have it. Its tok_encode is the tokenizer's encode, here the library's."""
    hf = HuggingFace.from_file(str(hugging_face_folder(tmp_path / "hf", kind) / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path / "hf"))
    start = hf.token_to_id("<s>")  # bos_token of tokenizer_config.json
    for context in ("", "It is", "What is 2 + 2?", "It is ", "It\n\n", "Wh"):
        for continuation in (" 4.", "4", "at is 2", " It is brief"):
            text = context.rstrip()
            before = hf.encode(text).ids if context else [start]
            whole = hf.encode(context + continuation).ids if context else [
                start, *hf.encode(continuation, add_special_tokens=False).ids]
            assert tasks.encode_pair(ours, context, continuation, ours.vocab_size) == (
                tuple(before), tuple(whole[len(before):]))
            assert start not in whole[len(before):]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_have_the_ids_that_they_have_behind_a_text_and_in_training(kind, tmp_path):
    hf = HuggingFace.from_file(str(hugging_face_folder(tmp_path / "hf", kind) / "tokenizer.json"))
    ours, labels = load_tokenizer(str(tmp_path / "hf")), ["brief", "4", "is it"]
    spelled, _ = tasks.encode_labels(ours, labels, ours.vocab_size)
    packing = Packing("classification", 99)
    for label, ids in zip(labels, spelled, strict=True):
        whole = hf.encode(f"It is {label}")
        before = hf.encode("It is").ids
        assert whole.ids == [*before, *ids]
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"text": "It is", "label": label}) + "\n")
        size = path.stat().st_size
        [(example, _)] = examples(RowsUnit(str(path), size, None, end=size), packing, ours)
        assert example.ids[example.scored].tolist() == [*ids, ours.eot] and example.ids.tolist()[:-1] == whole.ids


def scored_by_definition(model64: GPT, query: str, choices: tuple[str, ...], max_seq_len: int) -> list[float]:
    values = []
    for choice in choices:
        context, continuation = tuple(query.encode()), tuple(f" {choice}".encode())
        whole = (context + continuation)[-(max_seq_len + 1):]
        values.append(expected_likelihood(model64, whole[:-len(continuation)], continuation))
    return values


def test_choices_are_made_by_likelihood_in_all_per_character_and_per_byte():
    pick = random.Random(3)
    words = ["aä", "日本", "dog", "é", "a longer one", "zz"]
    examples = [Choice(i + 1, pick.choice(words) * pick.randint(1, 3), tuple(pick.sample(words, 4)), pick.randrange(4))
                for i in range(25)]
    model, model64 = talkative_model(max_seq_len=64), talkative_model(torch.float64, max_seq_len=64)
    result, rows = tasks.multiple_choice(model, BYTES, Task(Path("f"), examples), batch_size=4)
    hits = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for example, row in zip(examples, rows, strict=True):
        values = np.array(scored_by_definition(model64, example.query, example.choices, 64))
        np.testing.assert_allclose(row["log_likelihoods"], values, rtol=1e-4)
        for name, lengths in (("acc", [1] * 4), ("acc_norm", [len(c) for c in example.choices]),
                              ("acc_bytes", [len(c.encode()) for c in example.choices])):
            assert row["predictions"][name] == np.argmax(values / lengths)
            hits[name].append(np.argmax(values / lengths) == example.gold)
    assert len({tuple(map(bool, each)) for each in hits.values()}) == 3  # the three differ on these examples
    for name, each in hits.items():
        p = np.mean(each)
        assert result[name] == pytest.approx(p)
        assert result[f"{name}_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 24))
    assert result["truncated"] == 0


def test_a_query_too_long_loses_its_first_tokens_choice_by_choice_and_is_counted():
    model, model64 = talkative_model(max_seq_len=16), talkative_model(torch.float64, max_seq_len=16)
    examples = [Choice(1, "0123456789abcdef", ("x", "yy yy"), 0), Choice(2, "fits", ("x", "y"), 1),
                Choice(3, "0123456789abc", ("xyz", "xy"), 0)]  # 13 + 4 = max_seq_len + 1 tokens just fit
    result, rows = tasks.multiple_choice(model, BYTES, Task(Path("f"), examples), batch_size=8)
    for example, row in zip(examples, rows, strict=True):
        np.testing.assert_allclose(row["log_likelihoods"],
                                   scored_by_definition(model64, example.query, example.choices, 16), rtol=1e-4)
    assert result["truncated"] == 1


def test_of_equally_likely_choices_the_first_is_taken():
    model = make_model()
    with torch.no_grad():
        model.wte.weight.zero_()  # tied: all logits are 0
    examples = [Choice(1, "q", ("ab", "cd", "ef"), 0), Choice(2, "q", ("abc", "de", "fg"), 1)]
    result, rows = tasks.multiple_choice(model, BYTES, Task(Path("f"), examples), batch_size=2)
    assert [row["predictions"]["acc"] for row in rows] == [0, 1]
    assert rows[0]["log_likelihoods"] == pytest.approx([-3 * math.log(257)] * 3)


def test_a_choice_longer_than_the_context_is_refused_with_its_line():
    with pytest.raises(TaskError, match="task 'f' line 7: choice 1 has 18 tokens, more than the context of 16"):
        tasks.multiple_choice(make_model(max_seq_len=16), BYTES, Task(Path("f"), [Choice(7, "q", ("a", "b" * 17), 0)]),
                              batch_size=1)


def test_hellaswag_lines_are_cleaned_as_the_harness_does(tmp_path):
    row = {"activity_label": "Making tea", "ctx_a": "[header] How to make tea [title] Boil it. [step] A Kettle",
           "ctx_b": "the NEW one", "ctx": "unused", "label": "1",
           "endings": ["is [substeps] here.", " stays  cold [title] Wait.", "a", "b"], "source_id": "w~1"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    [example] = read_task(tmp_path / "h.jsonl").examples
    # worked by hand: " [title]" -> ". ", brackets gone, double blanks halved once, capitalize() lowers the rest
    assert example.query == "Making tea: How to make tea. Boil it. A Kettle The new one"
    assert example.choices == ("is here.", "stays cold. Wait.", "a", "b")
    assert example.gold == 1


def test_hellaswag_in_llm_cs_short_form_is_taken_as_it_stands(tmp_path):
    (tmp_path / "h.jsonl").write_text('{"ctx": "A [title] b", "endings": ["c  d", "e"], "label": 0}\n')
    [example] = read_task(tmp_path / "h.jsonl").examples
    assert example == Choice(1, "A [title] b", ("c  d", "e"), 0)


# ---- Classification --------------------------------------------------------------------------------------------------

def test_the_likeliest_label_behind_the_text_is_predicted():
    pick = random.Random(1)
    labels = ["maybe", "never", "sure!"]
    examples = [Labelled(i + 1, "".join(pick.choices("abc xyz", k=pick.randint(0, 20))), pick.choice(labels))
                for i in range(20)]
    model, model64 = talkative_model(), talkative_model(torch.float64)
    result, rows = tasks.classification(model, BYTES, Task(Path("f"), examples), labels, batch_size=6)
    expected = np.zeros((3, 3), dtype=int)
    for example, row in zip(examples, rows, strict=True):
        values = [expected_likelihood(model64, tuple(example.text.encode()) or (EOT,), tuple(f" {label}".encode()))
                  for label in labels]
        assert list(row["log_likelihoods"].values()) == pytest.approx(values, rel=1e-4)
        assert row["prediction"] == labels[int(np.argmax(values))]
        expected[labels.index(example.label), int(np.argmax(values))] += 1
    assert result["confusion"] == expected.tolist()
    assert (expected.sum(axis=0) > 0).sum() > 1  # more than one label is predicted
    p = expected.trace() / 20
    assert result["acc"] == pytest.approx(p) and result["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 19))
    recalls = expected.diagonal() / expected.sum(axis=1)
    assert [result["classes"][label]["recall"] for label in labels] == pytest.approx(recalls.tolist())
    assert result["macro"]["recall"] == pytest.approx(recalls.mean())
    assert not result["end_of_text_scored"]


def test_labels_that_begin_one_another_are_told_apart_by_end_of_text():
    model, model64 = talkative_model(), talkative_model(torch.float64)
    examples = [Labelled(1, "abc", "1"), Labelled(2, "xyz", "10")]
    result, rows = tasks.classification(model, BYTES, Task(Path("f"), examples), ["1", "10"], batch_size=2)
    assert result["end_of_text_scored"]
    for example, row in zip(examples, rows, strict=True):
        values = [expected_likelihood(model64, tuple(example.text.encode()), (*f" {label}".encode(), EOT))
                  for label in ("1", "10")]
        assert list(row["log_likelihoods"].values()) == pytest.approx(values, rel=1e-4)


def test_a_text_that_leaves_no_room_for_the_longest_label_loses_its_front_or_is_refused_with_its_line():
    examples = [Labelled(1, "x" * 12 + "y", "xy"), Labelled(4, "abx" + "x" * 11 + "y", "abc")]
    model, labels = talkative_model(max_seq_len=16), ["xy", "abc"]  # 13 + 4 = max_seq_len + 1 just fit
    result, (whole, cut) = tasks.classification(model, BYTES, Task(Path("f"), examples), labels, batch_size=1)
    assert result["cut"] == 1 and whole["log_likelihoods"] == cut["log_likelihoods"] and cut["text"] == examples[1].text
    tasks.classification(model, BYTES, Task(Path("f"), examples[:1]), labels, batch_size=1, too_long="error")
    with pytest.raises(TaskError, match="task 'f' line 4: the text has 15 tokens and the longest label 4, more than "
                                        "the context of 16"):
        tasks.classification(model, BYTES, Task(Path("f"), examples), labels, batch_size=1, too_long="error")
    with pytest.raises(TaskError, match="the longest label has 17 tokens, more than the context of 16"):
        tasks.classification(model, BYTES, Task(Path("f"), examples), ["a", "b" * 16], batch_size=1)


def test_the_token_that_begins_every_text_stands_before_texts_and_not_before_labels():
    begun = with_bos(BYTES, "<|endoftext|>")
    assert tasks.encode_labels(begun, ["a", "b"], 257) == ([tuple(b" a"), tuple(b" b")], False)
    task = Task(Path("f"), [Labelled(1, "x" * 9, "a"), Labelled(2, "x" * 20, "a")])
    assert tasks.encode_asked(make_model(max_seq_len=16).config, begun, task, too_long="cut", label_tokens=2) == (
        [[EOT, *b"x" * 9], [EOT, *b"x" * 14]], 1)


def test_the_labels_of_a_file_are_sorted_and_a_given_set_keeps_its_order():
    task = Task(Path("f"), [Labelled(1, "", "b"), Labelled(2, "", "a"), Labelled(3, "", "b")])
    assert tasks.choose_labels(task, None) == ["a", "b"]
    assert tasks.choose_labels(task, ["c, b,a"]) == ["c", "b", "a"]
    assert tasks.choose_labels(task, ["c, or d", "b", "a"]) == ["c, or d", "b", "a"]


def test_labels_that_differ_in_blanks_only_are_named():
    task = Task(Path("f"), [Labelled(1, "", "so so"), Labelled(2, "", "b"), Labelled(4, "", " so\u00a0so")])
    for names in (None, ["so so,b"]):
        with pytest.raises(TaskError, match=r"4: label ' so\\xa0so' differs from 'so so' of line 1 in blanks only"):
            tasks.choose_labels(task, names)


@pytest.mark.parametrize("names, message", [
    (["a,c"], "line 2: label \"b\" is not in --labels a,c"),
    (["a"], "--labels 'a' should be two labels or more"),
    (["a,b,a"], "no two equal"),
    (["a,,b"], "no two equal"),
    (["a", "b", "a"], "--labels 'a' 'b' 'a' should be two labels or more"),
])
def test_a_set_of_labels_that_does_not_fit_is_refused(names, message):
    with pytest.raises(TaskError, match=message):
        tasks.choose_labels(Task(Path("f"), [Labelled(1, "", "a"), Labelled(2, "", "b")]), names)


def test_one_label_is_no_set():
    with pytest.raises(TaskError, match="one label only, 'a'; name the set with --labels"):
        tasks.choose_labels(Task(Path("f"), [Labelled(1, "", "a")]), None)


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused():
    class Blind:  # as a tokenizer that lowers all letters
        eot, bos_token = 0, None
        def encode(self, text: str, *, behind: str) -> np.ndarray:
            return np.frombuffer(text.lower().encode(), np.uint8)
    with pytest.raises(TaskError, match="'a', 'A': to the run's tokenizer two of them are the same text"):
        tasks.encode_labels(Blind(), ["a", "A"], 257)


# ---- Generation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def greedy(model: GPT, prompt: str | list[int], tokens: int) -> tuple[bytes, bool]:
    """The bytes up to end-of-text of at most so many tokens, each the likeliest by a plain forward pass."""
    ids = list(prompt.encode() if isinstance(prompt, str) else prompt) or [EOT]
    start = len(ids)
    while len(ids) - start < tokens and len(ids) <= model.config.max_seq_len:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == EOT:
            return bytes(ids[start:-1]), True
    return bytes(ids[start:]), False


PROMPTS = ["", "a", "what?", "0123456789" * 3, "ab cd", "é" * 5, "x" * 31, "zzz", "Q: who\nA:", "y" * 32]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_answer_is_the_greedy_continuation_to_end_of_text_or_to_the_end_of_the_context(batch_size):
    model = talkative_model()
    examples = [Answer(i + 1, prompt, ("ab",)) for i, prompt in enumerate(PROMPTS)]
    result, rows = tasks.generation(model, BYTES, Task(Path("f"), examples), None, ends=ENDS,
                                    metrics=("exact_match",), max_new_tokens=12, stop=(), batch_size=batch_size)
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert [(row["prediction"], row["finished"]) for row in rows] == [
        (text.decode(errors="replace"), finished) for text, finished in expected]
    assert result["unfinished"] == sum(not finished for _, finished in expected)
    assert 0 < result["unfinished"] < len(PROMPTS)


def test_special_tokens_of_a_prompt_are_read_as_such_on_request():
    arguments = {"ends": ENDS, "metrics": ("f1",), "max_new_tokens": 12, "stop": (), "batch_size": 1}
    model = talkative_model()
    said = {}
    for prompt, parse in itertools.product(("", "<|endoftext|>"), (False, True)):
        task = Task(Path("f"), [Answer(1, prompt, ("x",))], parse_special=parse)
        _, [row] = tasks.generation(model, BYTES, task, None, **arguments)
        said[prompt, parse] = row["prediction"]
    assert said["<|endoftext|>", True] == said["", True] == said["", False] != said["<|endoftext|>", False]


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it():
    model = talkative_model()
    text = greedy(model, "abc", 12)[0]
    stop = next(chr(byte) for byte in text[1:] if byte < 128)
    task = Task(Path("f"), [Answer(1, "abc", ("x",))])
    _, [row] = tasks.generation(model, BYTES, task, None, ends=ENDS, metrics=("f1",), max_new_tokens=12,
                                stop=(stop,), batch_size=1)
    assert row["finished"] and row["prediction"] == text[:text.index(stop.encode())].decode(errors="replace")


def test_the_scores_are_those_of_the_answers():
    model = talkative_model()
    text = next(text for text in (greedy(model, prompt, 12)[0].decode(errors="replace") for prompt in PROMPTS)
                if any(map(str.isalnum, text)))
    examples = [Answer(i + 1, prompt, (text, "zz")) for i, prompt in enumerate(PROMPTS)]
    result, rows = tasks.generation(model, BYTES, Task(Path("f"), examples), None, ends=ENDS,
                                    metrics=("exact_match",), max_new_tokens=12, stop=(), batch_size=4)
    hits = [row["prediction"] == text for row in rows]
    assert result["exact_match"] == pytest.approx(np.mean(hits)) and any(hits)
    assert all(row["exact_match"] == 1.0 for row, hit in zip(rows, hits, strict=True) if hit)


def test_a_prompt_longer_than_the_context_loses_its_front_or_is_refused_with_its_line():
    model, arguments = talkative_model(), dict(
        ends=ENDS, metrics=("f1",), max_new_tokens=5, stop=(), batch_size=2)
    task = Task(Path("f"), [Answer(1, "x" * 32, ("a",)), Answer(9, "ab" * 20, ("a",))])
    result, rows = tasks.generation(model, BYTES, task, None, **arguments)
    expected = [greedy(model, prompt, 5) for prompt in ("x" * 32, "ab" * 14)]  # 28 + 5 = max_seq_len + 1
    assert [(row["prediction"], row["finished"]) for row in rows] == [
        (text.decode(errors="replace"), finished) for text, finished in expected]
    assert result["cut"] == 1 and len(rows[1]["prompt"]) == 40
    with pytest.raises(TaskError, match="task 'f' line 9: the prompt has 40 tokens, more than the context of 32"):
        tasks.generation(model, BYTES, task, None, too_long="error", **arguments)


def chat(*contents: str) -> Chat:
    """Turns of user and assistant, the last one the user's; the answer sought is 'yes'."""
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))
    return Chat(5, messages, ("yes",))


def test_a_chat_is_answered_behind_what_the_template_makes_of_it():
    model = talkative_model(max_seq_len=64)
    examples = [chat("hi"), chat("a", "b", "c <|endoftext|>")]  # what users write is text, whatever it spells
    expected = [greedy(model, "User:\nhi\n\nAssistant:\n", 9)]
    [head, tail] = ["User:\na\n\nAssistant:\nb", "\n\nUser:\nc <|endoftext|>\n\nAssistant:\n"]
    expected.append(greedy(model, [*head.encode(), EOT, *tail.encode()], 9))
    _, rows = tasks.generation(model, BYTES, Task(Path("f"), examples), DEFAULT_TEMPLATE, ends=ENDS,
                               metrics=("f1",), max_new_tokens=9, stop=(), batch_size=2)
    assert [row["prediction"] for row in rows] == [text.decode(errors="replace") for text, _ in expected]
    assert [row["finished"] for row in rows] == [finished for _, finished in expected]
    assert rows[0]["messages"] == examples[0].messages


def test_a_chat_longer_than_the_context_loses_its_oldest_turns_or_is_refused_with_its_line():
    model, arguments = talkative_model(max_seq_len=64), dict(
        ends=ENDS, metrics=("f1",), max_new_tokens=9, stop=(), batch_size=2)
    task = Task(Path("f"), [chat("b" * 40, "c", "hi"), chat("hi")])
    result, rows = tasks.generation(model, BYTES, task, DEFAULT_TEMPLATE, **arguments)
    text, finished = greedy(model, "User:\nhi\n\nAssistant:\n", 9)
    assert [(row["prediction"], row["finished"]) for row in rows] == [(text.decode(errors="replace"), finished)] * 2
    assert result["cut"] == 1 and len(rows[0]["messages"]) == 3
    with pytest.raises(TaskError, match="task 'f' line 5: the prompt has 84 tokens, more than the context of 64"):
        tasks.generation(model, BYTES, task, DEFAULT_TEMPLATE, too_long="error", **arguments)


def test_an_answer_in_a_chat_ends_with_what_ends_a_turn_there_and_with_no_other_special_token():
    model = talkative_model()
    text = greedy(model, "abc", 9)[0]
    end = next(byte for byte in text if text.index(byte) > 0)
    class Tokenizer:  # the bytes' with more special tokens, as of a chat model that ends its turns with its own
        def __getattr__(self, name: str):
            return getattr(BYTES, name)
        special_ids = BYTES.special_ids | {"<|end|>": end, "<|other|>": text[0]}
    template = "{% for m in messages %}{{ m.content + ('<|end|>' if m.role == 'assistant' else '') }}{% endfor %}"
    ends = ENDS | {turn_end(Tokenizer(), template)}
    _, [row] = tasks.generation(model, Tokenizer(), Task(Path("f"), [chat("abc")]), template, ends=ends,
                                metrics=("f1",), max_new_tokens=9, stop=(), batch_size=1)
    assert row["finished"] and row["prediction"] == text[:text.index(end)].decode(errors="replace") != ""


def test_what_a_template_writes_before_its_answers_is_no_part_of_one(monkeypatch):
    template = ("{% for m in messages %}{{ m.role[0] }}{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
                "{{ eos_token }}{% endfor %}{{ 'a' if add_generation_prompt }}")
    answers = ["<think></think>b", "b<think></think>"]
    monkeypatch.setattr(tasks, "continue_greedily", lambda *some, **more: (answers, [True, True]))
    result, rows = tasks.generation(make_model(), BYTES, Task(Path("f"), [chat("a"), chat("a")]), template,
                                    ends=ENDS, metrics=("exact_match",), max_new_tokens=5, stop=(), batch_size=2)
    assert [row["prediction"] for row in rows] == ["b", "b<think></think>"]


def test_a_chat_that_the_template_refuses_or_a_run_without_one_is_an_error():
    model, bad = talkative_model(), Chat(3, ({"role": "robot", "content": "beep"},), ("yes",))
    arguments = dict(
        ends=ENDS, metrics=("f1",), max_new_tokens=9, stop=(), batch_size=2)
    with pytest.raises(TaskError, match="task 'f' line 3: .*robot"):
        tasks.generation(model, BYTES, Task(Path("f"), [chat("a"), bad]), DEFAULT_TEMPLATE, **arguments)
    with pytest.raises(TaskError, match="task 'f' holds messages, but the run has no chat template"):
        tasks.generation(model, BYTES, Task(Path("f"), [bad]), None, **arguments)


# ---- Reading ---------------------------------------------------------------------------------------------------------

def write(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_the_kind_is_seen_from_the_fields(tmp_path):
    for line, kind, example in (
            ('{"query": "q", "choices": ["a", "b"], "gold": 1}', "multiple choice", Choice(1, "q", ("a", "b"), 1)),
            ('{"text": "t", "label": 3, "id": 7}', "classification", Labelled(1, "t", "3")),
            ('{"prompt": "", "reference": "r"}', "generation", Answer(1, "", ("r",))),
            ('{"prompt": "p", "reference": ["r", "s"]}', "generation", Answer(1, "p", ("r", "s"))),
            ('{"prompt": "p", "response": " r"}', "generation", Answer(1, "p", (" r",))),
            ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "chat",
             Chat(1, ({"role": "user", "content": "a"},), ("b",)))):
        task = read_task(write(tmp_path, line))
        assert (task.kind, task.examples) == (kind, [example])


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_passed_over(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a", "label": "x"}\r', "", "  ", '{"text": "b", "label": "y"}')
    assert read_task(path).examples == [Labelled(1, "a", "x"), Labelled(4, "b", "y")]


def test_lone_surrogates_become_the_replacement_character_and_are_counted(tmp_path, capfd):
    row = '{"messages": [{"role": "user", "content": "a\\ud800"}, {"role": "assistant", "content": "\\udfffb"}]}'
    example = read_task(write(tmp_path, row)).examples[0]
    assert (example.messages[0]["content"], example.references) == ("a\ufffd", ("\ufffdb",))
    assert "jsonl': 2 lone surrogates, which are no characters, replaced by U+FFFD" in capfd.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_task_may_be_in_any_encoding_that_a_byte_order_mark_names(encoding, tmp_path):
    rows = '{"text": "ü\u2028", "label": "中"}\r{"text": "b", "label": "y"}'
    (tmp_path / "a.jsonl").write_bytes(rows.encode(encoding))
    assert read_task(tmp_path / "a.jsonl").examples == [Labelled(1, "ü\u2028", "中"), Labelled(2, "b", "y")]


@pytest.mark.parametrize("data, message", [
    ('{"text": "b", "label": "y"}'.encode("utf-16-le"), "looks like UTF-16LE without a byte order mark; convert it: "),
    (b"PK\x03\x04", "is a zip archive"),
    (b'[{"text": "b", "label": "y"}]', r"make rows of this array: python -c .* < "),
    (b'[\n{"text": "b", "label": "y"}]', r"make rows of this array: python -c .* < "),
    (b'{"text": "b", "text": "c", "label": "y"}', "line 1: is not JSON: it gives 'text' two values"),
])
def test_what_is_no_task_is_refused_with_the_way_out(data, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_task(tmp_path / "a.jsonl")


GOOD = '{"query": "q", "choices": ["a", "b"], "gold": 1}'


@pytest.mark.parametrize("line, message", [
    ('{"text": "a", "label": "b"', "is not JSON"),
    pytest.param("[" * 100_000, "is not JSON", id="nested too deeply"),
    (b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
    ('["a"]', r'holds \["a"\], not an object'),
    ('{"question": "a", "id": 1}', "has the fields question, id; an example has query, choices, gold, or"),
    ("{}", r"has the fields \(none\)"),
    ('{"text": "a", "label": "b"}', "is classification, the lines before it multiple choice; a file holds one kind"),
    ('{"query": 3, "choices": ["a", "b"], "gold": 1}', "query = 3 should be a text"),
    ('{"query": "q", "choices": "ab", "gold": 1}', 'choices = "ab" should be a list of at least 2 texts'),
    ('{"query": "q", "choices": ["a"], "gold": 0}', "should be a list of at least 2 texts"),
    ('{"query": "q", "choices": ["a", ""], "gold": 0}', r"choices\[1\] is empty"),
    ('{"query": "q", "choices": ["a", null], "gold": 0}', r"choices\[1\] = null should be a text"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold = 2 should be the index of the right choice, 0 to 1"),
    ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "gold = -1 should be"),
    ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold = true should be"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 1.0}', "gold = 1.0 should be"),
    ('{"ctx": "q", "endings": ["a", "b"], "label": ""}', 'label = "" should be the index'),
    ('{"ctx": "q", "activity_label": "a", "ctx_a": "a", "ctx_b": "b", "endings": ["a", "[step]"], "label": 0}',
     r"endings\[1\] is empty without its brackets"),
    ('{"text": "a", "label": null}', "label = null should be a text"),
    ('{"text": "a", "label": " "}', "label is empty"),
    ('{"text": "a", "label": true}', "label = true should be a text"),
    ('{"prompt": "p", "reference": ""}', "reference is empty"),
    ('{"prompt": "p", "response": ""}', "response is empty"),
    ('{"prompt": "p", "reference": []}', r"reference = \[\] should be a list of at least 1 text$"),
    ('{"prompt": ["p"], "reference": "r"}', "prompt = .* should be a text"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "has one message; it should have at least two"),
    ('{"prompt": "p", "response": "r", "system": "s"}', "has 'system', which is not honoured here"),
    ('{"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}', "the role 'human'"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}',
     "the last message is of the role 'user', not assistant"),
    ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
     'message 1 is not {"role", "content"}'),
    ('{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}',
     'message 1 is not {"role", "content"} with a text in both'),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
     "the last message's content is empty"),
])
def test_a_line_that_is_wrong_is_named_with_its_file(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line)
    with pytest.raises(TaskError, match=message) as caught:
        read_task(path)
    text = str(caught.value)
    assert text.startswith(f"task '{path}' line 3: ") and "\n" not in text and len(text) < len(str(path)) + 500


def test_a_file_without_examples_or_none_at_all_is_an_error(tmp_path):
    with pytest.raises(TaskError, match="holds no examples"):
        read_task(write(tmp_path, "", " "))
    with pytest.raises(TaskError, match="missing.jsonl' cannot be read: No such file"):
        read_task(tmp_path / "missing.jsonl")
    with pytest.raises(TaskError, match="cannot be read: Is a directory"):
        read_task(tmp_path)
