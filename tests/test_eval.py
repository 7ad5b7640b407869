"""Scores against a plain float64 computation, and the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import config as configuration
import eval as evaluation
from config import UserError
from data.loader import MicroBatch
from data.tokenizer import load_tokenizer
from model import GPT
from tests.test_train import run, settings  # noqa: F401  (settings is a fixture)

CPU = torch.device("cpu")


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(configuration.ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=16, vocab_size=257, init="gpt2"))


def batches(count: int) -> list[MicroBatch]:
    tokens = torch.randint(257, (count, 5, 17), generator=torch.Generator().manual_seed(1))
    return [MicroBatch(rows[:, :-1], rows[:, 1:], None, 0) for rows in tokens]


def test_a_score_equals_the_float64_formula(model):
    token_bytes = np.arange(257, dtype=np.int32) % 4  # as if every fourth token were special
    score = evaluation.evaluate(model, batches(3), token_bytes=token_bytes, device=CPU)
    nats = text_nats = text_bytes = 0.0
    for batch in batches(3):
        logits = model(batch.tokens).double().flatten(0, 1)
        targets = batch.targets.flatten()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        is_text = torch.from_numpy(token_bytes)[targets] > 0
        nats, text_nats = nats + losses.sum().item(), text_nats + losses[is_text].sum().item()
        text_bytes += int(token_bytes[targets.numpy()].sum())
    assert score.tokens == 3 * 5 * 16 and score.bytes == text_bytes
    assert score.loss == pytest.approx(nats / score.tokens, rel=1e-6)  # float32 losses, summed in float64
    assert score.perplexity == pytest.approx(math.exp(nats / score.tokens), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(text_nats / (math.log(2) * text_bytes), rel=1e-6)


def test_bits_per_byte_without_text_is_unknown_rather_than_a_number(model):
    score = evaluation.evaluate(model, batches(1), token_bytes=np.zeros(257, dtype=np.int32), device=CPU)
    assert score.bits_per_byte is None and math.isfinite(score.loss)


def test_every_byte_of_a_text_is_scored_once_whatever_its_length(model):
    token_bytes = load_tokenizer("bytes").token_bytes()
    for length in (1, 15, 16, 17, 50):
        ids = np.arange(length, dtype=np.uint32) % 256
        windows = evaluation.text_batches(ids, eot=256, seq_len=16, batch_size=2, device=CPU)
        score = evaluation.evaluate(model, windows, token_bytes=token_bytes, device=CPU)
        assert (score.tokens, score.bytes) == (length, length)


def test_a_text_is_predicted_from_end_of_text_in_windows(model):
    ids = np.array([10, 20, 30], dtype=np.uint32)
    [batch] = evaluation.text_batches(ids, eot=256, seq_len=4, batch_size=8, device=CPU)
    assert batch.tokens[0, :3].tolist() == [256, 10, 20]
    assert batch.targets.tolist() == [[10, 20, 30, evaluation.IGNORED]]


def test_evaluation_leaves_the_mode_of_the_model_alone(model):
    for training in (True, False):
        model.train(training)
        evaluation.evaluate(model, batches(1), token_bytes=np.ones(257, dtype=np.int32), device=CPU)
        assert model.training == training


def test_a_stop_in_the_middle_gives_no_score(model):
    assert evaluation.evaluate(model, batches(2), token_bytes=np.ones(257, dtype=np.int32), device=CPU,
                               should_stop=lambda: True) is None


def test_yardsticks_are_bits_per_byte_of_real_compressors():
    text = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    sizes = evaluation.compressed_bits_per_byte(text)
    assert all(8.0 < bits < 8.1 for bits in sizes.values())  # noise cannot be compressed; headers cost a little
    assert all(bits < 0.1 for bits in evaluation.compressed_bits_per_byte(b"a" * 100_000).values())


def test_the_command_line_prints_one_json_object_that_repeats_the_val_row(settings, capsys):  # noqa: F811
    run_dir = run(settings, "scored")
    row = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    assert row["kind"] == "val"
    capsys.readouterr()
    evaluation.main(["scored", "--batch-size", "3"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss"] == pytest.approx(row["loss"], rel=1e-6)  # batches of another size: rounding
    assert printed["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-6)
    evaluation.main(["scored/checkpoints/step_00000012", "--data", "text.txt"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == Path("text.txt").stat().st_size


def test_the_command_line_keeps_documents_apart_as_training_did(settings, capsys):  # noqa: F811
    Path("many.jsonl").write_text("".join(json.dumps({"text": f"a row of text number {i}"}) + "\n" for i in range(300)))
    run_dir = run([settings[0], "data.source=many.jsonl"], "apart", "data.document_mask=true")
    capsys.readouterr()
    evaluation.main(["apart"])
    row = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.parametrize("words, message", [
    (["nowhere"], "nowhere"),
    (["scored", "--data", "missing.txt"], "missing.txt"),
    (["scored", "--data", "empty.txt"], "empty"),
    (["scored", "--batch-size", "0"], "--batch-size 0"),
    (["scored", "--device", "tpu"], "tpu"),
    (["scored", "--data", "other"], "tokenizer"),
])
def test_mistakes_are_one_line(settings, words, message):  # noqa: F811
    run(settings, "scored", "train.max_steps=1")
    Path("empty.txt").write_text("")
    if "other" in words:
        run(settings, "unused", "train.max_steps=1", "data.tokenizer=bpe:257", "data.dir=other")
    with pytest.raises(UserError, match=message):
        evaluation.main(words)
