"""scores.py against published formulas, worked by hand or by the packages that define them."""

import importlib.util
import math
import random
import re

import numpy as np
import pytest

from config import UserError
from tasks import scores


def test_the_standard_error_of_hits_is_the_harness_formula():
    mean, stderr = scores.mean_and_stderr([1.0, 0.0, 1.0, 1.0, 0.0])
    assert mean == pytest.approx(0.6)
    assert stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_the_standard_error_of_any_values_is_that_of_numpy():
    values = [0.25, 1.0, 0.125, 0.9, 0.0]
    assert scores.mean_and_stderr(values)[1] == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def test_one_value_has_no_standard_error():
    assert scores.mean_and_stderr([1.0]) == (1.0, None)


@pytest.mark.parametrize("text, normalized", [
    ("The  Cat, sat!", "cat sat"),
    ("A.B.C.", "abc"),  # points go before articles are looked for
    ("an apple a day; the end", "apple day end"),
    ("Theatre and anthem", "theatre and anthem"),
    ("the-end", "theend"),
    ("“quoted”\tÉté\n", "“quoted” été"),  # only ASCII punctuation goes
    ("a the an", ""),
])
def test_answers_are_normalized_as_in_squad(text, normalized):
    assert scores.normalized_answer(text) == normalized


@pytest.mark.parametrize("prediction, reference, match, f1", [
    ("The Denver Broncos", "Denver Broncos!", 1.0, 1.0),
    ("Denver", "Denver Broncos", 0.0, 2 * 1.0 * 0.5 / 1.5),
    ("in the year 1066", "1066", 0.0, 2 * (1 / 3) * 1.0 / (4 / 3)),
    ("cat cat dog", "cat dog dog", 0.0, 2 / 3),  # one cat and one dog in common
    ("cats", "dogs", 0.0, 0.0),
    ("", "dogs", 0.0, 0.0),
    ("the", "a", 1.0, 1.0),  # nothing is left of either
    ("the", "dog", 0.0, 0.0),
])
def test_exact_match_and_f1_have_their_values_worked_by_hand(prediction, reference, match, f1):
    assert scores.exact_match(prediction, reference) == match
    assert scores.answer_f1(prediction, reference) == pytest.approx(f1)


@pytest.mark.parametrize("prediction, reference, value", [
    # RougeScorer(["rougeL"], use_stemmer=False).score(reference, prediction)["rougeL"].fmeasure, rouge-score 0.1.2
    ("The cat sat on the mat.", "the cat is on the mat", 0.8333333333333334),
    ("police kill the gunman", "police killed the gunman", 0.75),
    ("the gunman kill police", "police killed the gunman", 0.5),
    ("don't x_1 fine", "Don t X 1 FINE", 1.0),
    ("3.14", "3 14 pi", 0.8),
    ("", "something", 0.0),
    ("!!!", "???", 0.0),
])
def test_rouge_l_has_the_values_of_the_package_rouge_score(prediction, reference, value):
    assert scores.rouge_l(prediction, reference) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("text, words", [
    ("Привет, МИР", ["привет", "мир"]),
    ("今天天气", ["今", "天", "天", "气"]),
    ("日本のiPhone 15", ["日", "本", "の", "iphone", "15"]),
    ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks, no letters
    ("안녕하세요 세계", ["안녕하세요", "세계"]),
    ("cafe\u0301 x_1", ["café", "x", "1"]),
])
def test_words_of_other_scripts_are_kept(text, words):
    assert scores.words(text) == words
    assert scores.rouge_l(text, text) == 1.0 and scores.rouge_l(text, f"{text} {text}") == pytest.approx(2 / 3)


def test_on_ascii_text_words_are_those_of_the_package_rouge_score():
    text = "".join(map(chr, range(128))) + "Don't U.S.A. 3.14 x_y -5"
    assert scores.words(text) == re.sub("[^a-z0-9]+", " ", text.lower()).split()  # rouge_score/tokenize.py


@pytest.mark.parametrize("prediction, reference, squad, strict", [
    ("-5", "5", 1.0, 0.0), ("", "A", 1.0, 0.0), ("The cat", "cat", 1.0, 0.0), (" -5\n", "-5", 1.0, 1.0),
    ("Paris", "paris", 1.0, 0.0), ("-5", "-5", 1.0, 1.0)])
def test_the_strict_match_tells_apart_what_squads_normalization_makes_alike(prediction, reference, squad, strict):
    total, _ = scores.text_scores([prediction], [(reference,)], ("exact_match", "strict_match", "f1", "rouge_l"))
    assert (total["exact_match"], total["strict_match"]) == (squad, strict)
    for name, words in (("exact_match", "SQuAD's.*without ASCII punctuation and a, an, the"), ("strict_match", "all"),
                        ("f1", "SQuAD's: words between blanks"), ("rouge_l", "rouge-score's.*each character")):
        assert re.match(f".*{words}", total[f"{name}_signature"])


@pytest.mark.parametrize("text, other, tokenize", [
    ("今天天气很好", "昨天天气很好", "zh"), ("今日はいい天気です", "明日はいい天気です", "char"),
    ("сегодня очень хорошая погода", "вчера была очень хорошая погода", "13a"),
    ("the word 天 is here today", "a word 天 was here today", "13a")])
def test_bleus_words_are_those_of_the_references_script(text, other, tokenize):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: BLEU and chrF stay unchecked")
    assert scores.corpus_score("bleu", [text], [(text,)])[0] == pytest.approx(100)
    score, signature = scores.corpus_score("bleu", [text], [(other,)])
    assert score == pytest.approx(sacrebleu.corpus_bleu([text], [[other]], tokenize=tokenize).score, rel=1e-12)
    assert f"tok:{tokenize}|" in signature


def test_the_common_subsequence_has_the_length_that_the_table_gives():
    pick = random.Random(0)
    for _ in range(200):
        one, other = ([pick.choice("abcd") for _ in range(pick.randint(0, 90))] for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
        for i, a in enumerate(one, 1):
            for j, b in enumerate(other, 1):
                table[i, j] = table[i - 1, j - 1] + 1 if a == b else max(table[i - 1, j], table[i, j - 1])
        assert scores.common_subsequence(one, other) == table[-1, -1]


def test_of_several_references_the_best_counts():
    total, rows = scores.text_scores(["Paris", "a red fox"], [("London", "paris"), ("the red dog", "one red fox ran")],
                                     ("exact_match", "f1", "rouge_l"))
    assert [row["exact_match"] for row in rows] == [1.0, 0.0]
    assert rows[1]["f1"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)  # red fox of "red fox" and of "one red fox ran"
    assert rows[1]["rouge_l"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert total["exact_match"] == 0.5 and total["exact_match_stderr"] == pytest.approx(0.5)


def test_bleu_and_chrf_are_sacrebleus_of_the_whole_corpus():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: BLEU and chrF stay unchecked")
    predictions = ["the cat sat on the mat today", "a dog ran away from it", "that is all"]
    references = [["a cat sat on the mat today", "a dog ran far away from it", "this is all"],
                  ["the cat sat there on the mat", "the dog ran away", "that was all of it"]]
    total, rows = scores.text_scores(predictions, list(zip(*references, strict=True)), ("bleu", "chrf"))
    assert total["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, references).score, rel=1e-12)
    assert total["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score, rel=1e-12)
    assert 20 < total["bleu"] < 90 and "tok:13a" in total["bleu_signature"] and rows == [{}, {}, {}]


def test_examples_may_have_different_numbers_of_references():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: BLEU and chrF stay unchecked")
    total, _ = scores.text_scores(["one two three four", "five six seven eight"],
                                  [("one two three four",), ("nothing alike", "five six seven eight")], ("bleu",))
    assert total["bleu"] == pytest.approx(100.0)


def test_without_sacrebleu_its_metrics_are_left_out_with_a_note_or_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    notes = []
    assert scores.choose_metrics(None, notes.append) == ("exact_match", "strict_match", "f1", "rouge_l")
    assert "pip install sacrebleu" in notes[0]
    assert scores.choose_metrics("rouge_l, f1", notes.append) == ("rouge_l", "f1")
    with pytest.raises(UserError, match="--metrics chrf needs the package sacrebleu.*pip install sacrebleu"):
        scores.choose_metrics("f1,chrf", notes.append)


def test_an_unknown_metric_is_named():
    with pytest.raises(UserError, match="'rouge'; there are exact_match, strict_match, f1, rouge_l, bleu, chrf"):
        scores.choose_metrics("f1,rouge", print)


# ---- Classes ---------------------------------------------------------------------------------------------------------

EXPECTED, PREDICTED = [0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 0, 1, 2, 2, 2, 0, 2]


def test_the_confusion_matrix_counts_true_classes_in_rows():
    matrix = scores.confusion_matrix(EXPECTED, PREDICTED, 4)  # nobody has or gets the class 3
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [1, 0, 3, 0], [0, 0, 0, 0]]


def test_precision_recall_and_f1_have_their_values_worked_by_hand():
    found = scores.class_scores(scores.confusion_matrix(EXPECTED, PREDICTED, 4))
    assert found["support"].tolist() == [3, 2, 4, 0]
    assert found["precision"] == pytest.approx([2 / 3, 1 / 2, 3 / 4, 0.0])
    assert found["recall"] == pytest.approx([2 / 3, 1 / 2, 3 / 4, 0.0])
    found = scores.class_scores(scores.confusion_matrix([0, 0, 0, 1], [0, 1, 1, 1], 2))
    assert found["precision"] == pytest.approx([1.0, 1 / 3]) and found["recall"] == pytest.approx([1 / 3, 1.0])
    assert found["f1"] == pytest.approx([0.5, 0.5])


def test_the_table_shows_counts_and_scores_under_their_headings():
    table = scores.confusion_table(["bad", "good"], scores.confusion_matrix([0, 0, 0, 1], [0, 1, 1, 1], 2))
    assert table.splitlines() == [
        "true \\ predicted  bad  good  precision  recall     f1",
        "bad                 1     2      1.000   0.333  0.500",
        "good                0     1      0.333   1.000  0.500",
        "mean                             0.667   0.667  0.500"]


@pytest.mark.parametrize("classes", [2, 50])
def test_the_image_is_a_png(classes):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the image of a confusion matrix stays "
                                             "unchecked")
    names = ["$not math_", *map(str, range(1, classes))]
    image = scores.confusion_image(names, np.eye(classes, dtype=np.int64))
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 5_000
