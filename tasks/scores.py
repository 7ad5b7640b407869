"""Scores of predictions against references: the field's definitions, on plain numbers and texts. No model, no files.

Answers: exact match and token F1 as in SQuAD's evaluation script (arXiv:1606.05250), and equality to the character.
Summaries: ROUGE-L (Lin 2004), on ASCII text as the package rouge-score computes it without stemming. Translations: BLEU
and chrF by sacrebleu (arXiv:1804.08771). Classes: confusion matrix, precision, recall, F1. Of several references the
best counts. A signature says of each score of texts what was compared.
"""

import io
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest

import numpy as np

import cli
from config import UserError

TEXT_METRICS = ("exact_match", "strict_match", "f1", "rouge_l", "bleu", "chrf")
CORPUS_METRICS = ("bleu", "chrf")  # of all texts together, 0 to 100, by sacrebleu; the others are means over examples


def mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error, of 0s and 1s sqrt(p (1 - p) / (n - 1)); None for the error of one value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


# ---- Texts, one prediction at a time: 0 to 1 -------------------------------------------------------------------------

PUNCTUATION = str.maketrans("", "", string.punctuation)
# Thai, Lao, Myanmar, Khmer; kana and iteration marks; Han characters
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
                      "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def normalized_answer(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def strict_match(prediction: str, reference: str) -> float:
    """1 if both are the same characters but for blanks at their ends: -5 is not 5, and A is not nothing."""
    return float(prediction.strip() == reference.strip())


def exact_match(prediction: str, reference: str) -> float:
    return float(normalized_answer(prediction) == normalized_answer(reference))


def answer_f1(prediction: str, reference: str) -> float:
    """F1 of the words of both normalized answers, counted with their repetitions; without words only equals match."""
    predicted, expected = normalized_answer(prediction).split(), normalized_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    return _f1_of_overlap((Counter(predicted) & Counter(expected)).total(), len(predicted), len(expected))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words."""
    predicted, expected = words(prediction), words(reference)
    return _f1_of_overlap(common_subsequence(predicted, expected), len(predicted), len(expected))


def words(text: str) -> list[str]:
    """The lower-case words of a text in any script: letters, marks and digits (of ASCII text rouge-score's, [a-z0-9]+);
    each character by itself of a script that puts no blanks between words."""
    text = unicodedata.normalize("NFC", text.lower())
    marked = (f" {char} " if UNSPACED.match(char) else char if unicodedata.category(char)[0] in "LMN" else " "
              for char in text)
    return "".join(marked).split()


def common_subsequence(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, a column of its table in the bits of one integer (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    all_ones = (1 << len(one)) - 1
    column = all_ones  # bit i is 0 where the length grows from row i to row i + 1
    for word in other:
        matches = column & places.get(word, 0)
        column = ((column + matches) | (column - matches)) & all_ones
    return len(one) - column.bit_count()


def _f1_of_overlap(overlap: int, predicted: int, expected: int) -> float:
    if overlap == 0:
        return 0.0
    precision, recall = overlap / predicted, overlap / expected
    return 2 * precision * recall / (precision + recall)


SIGNATURES = {
    "exact_match": "SQuAD's: lower case, without ASCII punctuation and a, an, the",
    "strict_match": "all characters, without blanks at the ends",
    "f1": "SQuAD's: words between blanks, lower case, without ASCII punctuation and a, an, the",
    "rouge_l": "lower-case words of letters, marks and digits (on ASCII text rouge-score's), each character of scripts "
               "without blanks between words"}


# ---- Texts, all together ---------------------------------------------------------------------------------------------

def choose_metrics(names: str | None, note: Callable[[str], None]) -> tuple[str, ...]:
    """The text metrics of a comma-separated list; None = all that are installed, and a note names the missing.

    Raises UserError for an unknown name, or one whose package is missing.
    """
    if names is None and not cli.is_installed("sacrebleu"):
        note("bleu and chrf are left out: they need the package sacrebleu (pip install sacrebleu)")
        return tuple(name for name in TEXT_METRICS if name not in CORPUS_METRICS)
    chosen = TEXT_METRICS if names is None else tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in TEXT_METRICS:
            raise UserError(f"--metrics {names!r} names {name!r}; there are {', '.join(TEXT_METRICS)}")
        if name in CORPUS_METRICS:
            cli.require(f"--metrics {name}", "sacrebleu")
    return chosen


def text_scores(predictions: list[str], references: list[tuple[str, ...]],
                metrics: tuple[str, ...]) -> tuple[dict, list[dict]]:
    """The scores of all texts, and of each one those that are means over examples (with their standard error)."""
    functions = {"exact_match": exact_match, "strict_match": strict_match, "f1": answer_f1, "rouge_l": rouge_l}
    rows = [{name: max(functions[name](prediction, reference) for reference in expected)
             for name in metrics if name in functions}
            for prediction, expected in zip(predictions, references, strict=True)]
    total = {}
    for name in metrics:
        if name in functions:
            total[name], total[f"{name}_stderr"] = mean_and_stderr([row[name] for row in rows])
            total[f"{name}_signature"] = SIGNATURES[name]
        else:
            total[name], total[f"{name}_signature"] = corpus_score(name, predictions, references)
    return total, rows


def corpus_score(name: str, predictions: list[str], references: list[tuple[str, ...]]) -> tuple[float, str]:
    """BLEU or chrF, 0 to 100, and sacrebleu's signature of how it was computed. BLEU's words are sacrebleu's default,
    13a, unless most letters are of scripts without blanks between words: then its `zh` (Han), or each character."""
    from sacrebleu.metrics import BLEU, CHRF
    letters = [char for texts in references for text in texts for char in text if char.isalpha()]
    unspaced, han = (sum(map(bool, map(script.match, letters))) for script in (UNSPACED, HAN))
    tokenize = "13a" if 2 * unspaced <= len(letters) else "zh" if han == unspaced else "char"
    metric = BLEU(tokenize=tokenize) if name == "bleu" else CHRF()
    streams = list(zip_longest(*references))  # the first reference of each, the second where there is one, ...
    return metric.corpus_score(predictions, streams).score, metric.get_signature().format()


# ---- Classes. Dims: K classes ----------------------------------------------------------------------------------------

def confusion_matrix(expected: list[int], predicted: list[int], classes: int) -> np.ndarray:
    """int64 (K, K): examples of the row's class that were taken for the column's."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (expected, predicted), 1)
    return matrix


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall and f1, float64 (K,), 0 where there is nothing to divide by, and support, int64 (K,)."""
    hits, support, claimed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return {"precision": _share(hits, claimed), "recall": _share(hits, support),
            "f1": _share(2 * hits, support + claimed), "support": support}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def confusion_table(labels: list[str], confusion: np.ndarray) -> str:
    """The matrix as text, a row per true class, with each class's precision, recall and F1 behind it."""
    scores, shares = class_scores(confusion), ("precision", "recall", "f1")
    rows = [(label, *map(str, confusion[k]), *(f"{scores[name][k]:.3f}" for name in shares))
            for k, label in enumerate(labels)]
    rows.append(("mean", *[""] * len(labels), *(f"{scores[name].mean():.3f}" for name in shares)))
    return cli.format_table(("true \\ predicted", *labels, *shares), rows)


def confusion_image(labels: list[str], confusion: np.ndarray) -> bytes:
    """The matrix as a PNG: counts, shaded by their share of the row's class."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    classes = len(labels)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.6 * min(classes, 40)  # inches
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    ticks = range(classes)
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(ticks, labels, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= 40:  # beyond, the numbers would not be legible
        for row, column in np.ndindex(confusion.shape):
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=9,
                      color="white" if shares[row, column] > 0.5 else "black")
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.05)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
