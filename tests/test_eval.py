"""Scores against a plain float64 computation, and the command line."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, normalizers

import checkpoint
import config as configuration
import eval as evaluation
import sample
from config import MachineError, UserError
from data.dataset import open_dataset, open_split
from data.loader import MicroBatch
from data.tokenizer import load_tokenizer
from finetune.runs import SavedRun
from model import GPT
from tests.test_data_tokenizer import (
    METASPACE,
    QWEN2,
    library_file,
    like_qwen,
    split,
    with_file,
    word_pieces,
    words_alone,
)
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


@pytest.mark.parametrize("length, stride", [(50, 1), (50, 5), (50, 16), (33, 7), (17, 16), (16, 3), (3, 2)])
def test_a_sliding_window_scores_each_token_once_as_hugging_face_defines_it(model, length, stride):
    """huggingface.co/docs/transformers/perplexity, in float64, one window at a time; end-of-text stands first."""
    T, ids = 16, np.random.default_rng(0).integers(0, 256, length)
    windows = evaluation.text_batches(ids, eot=256, seq_len=T, batch_size=3, device=CPU, stride=stride)
    score = evaluation.evaluate(model, windows, token_bytes=np.ones(257, dtype=np.int32), device=CPU)
    text, nats, previous, scored = torch.tensor([256, *ids]), 0.0, 0, 0
    exact = model.double()
    for begin in range(0, length, stride):
        end = min(begin + T, length)
        target_len = end - previous
        logits = exact(text[begin:end][None])[0].double()
        losses = torch.nn.functional.cross_entropy(logits, text[begin + 1:end + 1], reduction="none")
        assert begin == 0 or (end - begin) - target_len >= T - stride or end == length
        nats, scored, previous = nats + losses[-target_len:].sum().item(), scored + target_len, end
        if end == length:
            break
    assert score.tokens == scored == length
    assert score.loss == pytest.approx(nats / length, rel=1e-5)


def test_documents_stay_apart_in_sliding_windows(model):
    ids = np.array([1, 2, 256, 3, 4, 5, 256, 6], dtype=np.uint16)
    [batch] = evaluation.text_batches(ids, eot=256, seq_len=4, batch_size=9, device=CPU, stride=2, document_end=256)
    assert batch.tokens.tolist() == [[256, 1, 2, 256], [2, 256, 3, 4], [3, 4, 5, 256]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 2], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch.targets.tolist() == [[1, 2, 256, 3], [-100, -100, 4, 5], [-100, -100, 256, 6]]


def test_one_target_of_unknown_text_makes_bits_per_byte_unknown(model):
    token_bytes = np.ones(257, dtype=np.int32)
    token_bytes[int(batches(1)[0].targets[0, 0])] = -1
    score = evaluation.evaluate(model, batches(2), token_bytes=token_bytes, device=CPU)
    targets = torch.cat([batch.targets for batch in batches(2)]).flatten()
    assert score.bits_per_byte is None and score.unknown == int((targets == batches(1)[0].targets[0, 0]).sum()) >= 1
    assert score.tokens == len(targets) and score.bytes == len(targets) - score.unknown


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


@pytest.mark.parametrize(("scale", "expected"), [(1e4, "perplexity"), (math.nan, "the model's losses are not finite")])
def test_what_json_cannot_spell_is_null_or_an_error(settings, capsys, scale, expected):  # noqa: F811
    step = run(settings, "run", "train.max_steps=2") / "checkpoints" / "step_00000002"
    tensors = {name: tensor * scale for name, tensor in checkpoint.load_tensors(step, "model").items()}
    checkpoint.save(Path("run"), 3, tensors={"model": tensors}, state={"val_loss": None}, keep=9)
    capsys.readouterr()
    if math.isnan(scale):
        with pytest.raises(UserError, match=expected):
            evaluation.main(["run"])
        assert capsys.readouterr().out == ""
        return
    evaluation.main(["run"])
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result[expected] is None and result["loss"] > 710  # exp(709.8) is the largest float


def test_a_run_that_evaluated_less_text_is_told_so(settings, capsys):  # noqa: F811
    run_dir = run(settings, "scored", "train.max_steps=1", "train.eval_tokens=48")
    row = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    capsys.readouterr()
    evaluation.main(["scored"])
    printed, err = capsys.readouterr()
    printed = json.loads(printed)
    assert printed["tokens"] > 48 and printed["loss"] != pytest.approx(row["loss"], rel=1e-6)
    assert f"all {printed['tokens']:,} validation tokens are scored" in err and "first 48 (train.eval_tokens)" in err
    run(settings, "whole", "train.max_steps=1")
    capsys.readouterr()
    evaluation.main(["whole"])
    assert "eval_tokens" not in capsys.readouterr().err


def test_shards_are_scored_in_sliding_windows_as_their_text_is(settings, capsys):  # noqa: F811
    """With --stride the tail counts too: a stream's tokens but the first, which nothing precedes."""
    config = configuration.load_run_config(run(settings, "scored", "train.max_steps=1"))
    stream = open_split(open_dataset(Path(config.data.dir)), "val")
    capsys.readouterr()
    losses = {}
    for stride in ([], ["--stride", "16"], ["--stride", "4"], ["--stride", "1"]):
        evaluation.main(["scored", *stride])
        printed = json.loads(capsys.readouterr().out)
        losses[printed.get("stride")] = printed["loss"], printed["tokens"]
    assert losses[None][1] == (stream.tokens - 1) // 16 * 16
    assert {tokens for name, (_, tokens) in losses.items() if name} == {stream.tokens - 1}
    model, _ = sample.load_model("scored", device=CPU, dtype="float32", note=lambda line: None)
    ids = torch.from_numpy(stream.windows(np.zeros(1), stream.tokens)[0].astype(np.int64))
    with torch.no_grad():  # stride 1: the window before each token, by itself
        nats = [-model(ids[None, max(0, i - 16):i])[0, -1].double().log_softmax(0)[ids[i]].item()
                for i in range(1, len(ids))]
    assert losses[1][0] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)


def lossy_run(run_dir: Path, tokenizer_json: Path) -> GPT:
    """A run around a tokenizer.json with a random model."""
    tokenizer = load_tokenizer(tokenizer_json)
    config = configuration.ModelConfig(n_layer=1, n_head=2, n_embd=32, max_seq_len=64, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = GPT(config)
    checkpoint.save(run_dir, 1, tensors={"model": model.state_dict()}, state={"val_loss": None}, keep=1)
    tokenizer.save(run_dir / "tokenizer.json")
    (run_dir / "config.toml").write_text(configuration.to_toml(configuration.Config(
        model=config, train=configuration.TrainConfig(tokens_per_step=64))))
    return model


@pytest.mark.parametrize("kind, text, is_known", [
    ("qwen", "the house of the naïve cat <tool é>", True), ("qwen", "cafe\u0301 the house", True),
    ("metaspace", "the house of trees", True), ("pieces", "the house", True),
    ("pieces", "The house", False), ("words", "the Zzz", False)])
def test_bits_per_byte_of_a_text_are_of_its_real_bytes_or_null(tmp_path, capsys, kind, text, is_known):
    path = tmp_path / "tokenizer.json"
    if kind == "qwen":
        library_file(path, pre_tokenizer=split(QWEN2), decoder=decoders.ByteLevel(), normalizer=normalizers.NFC())
        with_file(path, like_qwen)
    elif kind == "metaspace":
        library_file(path, **METASPACE)
    else:
        {"pieces": word_pieces, "words": words_alone}[kind](path)
    model = lossy_run(tmp_path / "run", path)
    (tmp_path / "text.txt").write_text(text)
    evaluation.main([str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"])
    out, err = capsys.readouterr()
    printed, hf = json.loads(out), HuggingFace.from_file(str(path))
    ids = torch.tensor([load_tokenizer(path).start, *hf.encode(text, add_special_tokens=False).ids])
    logits = model.double()(ids[None, :-1])[0]
    nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    size = len(text.encode())
    assert printed["bytes"] == size and printed["tokens"] == len(ids) - 1 <= 64
    if is_known:
        assert printed["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5) and "null" not in err
    else:
        unknown = hf.encode(text, add_special_tokens=False).ids.count(hf.token_to_id("[UNK]"))
        assert printed["bits_per_byte"] is None and printed["unknown"] == unknown
        assert f"bits_per_byte is null: the run's tokenizer loses some of the text ({unknown} of" in err


def test_a_text_that_spells_end_of_text_is_said_to_be_another_than_the_run_learnt(settings, capsys):  # noqa: F811
    Path("parts.txt").write_text("<|endoftext|>".join(["the cat sat on a mat "] * 300))
    run([settings[0], "data.source=parts.txt", "data.parse_special=true"], "parted", "train.max_steps=1")
    for data, is_said in (("parts.txt", True), (str(next(Path("shards").iterdir())), False)):
        capsys.readouterr()
        evaluation.main(["parted", "--data", data])
        assert ("the text spells end-of-text 299 times" in capsys.readouterr().err) == is_said


def test_the_command_line_keeps_documents_apart_as_training_did(settings, capsys):  # noqa: F811
    Path("many.jsonl").write_text("".join(json.dumps({"text": f"a row of text number {i}"}) + "\n" for i in range(300)))
    run_dir = run([settings[0], "data.source=many.jsonl"], "apart", "data.document_mask=true")
    capsys.readouterr()
    evaluation.main(["apart"])
    row = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_a_text_is_scored_in_any_encoding_and_what_is_replaced_is_counted(settings, capsys):  # noqa: F811
    run(settings, "scored", "train.max_steps=1")
    text, scores = "Grüße und mehr. " * 20, []
    replaced = text.replace("ü", "\ufffd").replace("ß", "\ufffd")
    for name, encoding in (("utf8", "utf-8"), ("utf16", "utf-16"), ("bom", "utf-8-sig"), ("latin", "latin-1"),
                           ("replaced", "utf-8")):
        Path(name).write_bytes((replaced if name == "replaced" else text).encode(encoding))
        capsys.readouterr()
        evaluation.main(["scored", "--data", name])
        printed, said = capsys.readouterr()
        scores.append(json.loads(printed)["loss"])
        assert ("--data 'latin': 40 invalid UTF-8 sequences replaced by U+FFFD" in said) == (name == "latin")
        assert ("warning: --data 'latin': 40 of the first 320 characters are not UTF-8" in said) == (name == "latin")
    assert scores[0] == scores[1] == scores[2] != scores[3] == scores[4]


@pytest.mark.parametrize("words, message", [
    (["nowhere"], "nowhere"),
    (["scored", "--data", "missing.txt"], "missing.txt"),
    (["scored", "--data", "empty.txt"], "empty"),
    (["scored", "--data", "rows.jsonl"], "'rows.jsonl' is not plain text; prepare it first"),
    (["scored", "--stride", "0"], "--stride: '0' should be a whole number, at least 1"),
    (["scored", "--stride", "17"], "--stride 17 is more than the context of 16 tokens.*give 1 to 16"),
    (["scored", "--stride", "8", "--task", "choices.jsonl"], "--stride 8 is for text.*--data too"),
    (["scored", "--data", "utf16le.txt"], "utf16le.txt' is no UTF-8 .* looks like UTF-16LE"),
    (["scored", "--data", "scored/checkpoints/step_00000001/model.safetensors"], "is weights in safetensors, not text"),
    (["scored", "--batch-size", "0"], "--batch-size: .0. should be"),
    (["scored", "--device", "tpu"], "tpu"),
    (["scored", "--data", "other"], "tokenizer"),
])
def test_mistakes_are_one_line_before_the_weights_are_read(settings, monkeypatch, words, message):  # noqa: F811
    run(settings, "scored", "train.max_steps=1")
    Path("empty.txt").write_text("")
    write_task("choices.jsonl", *CHOICES)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("utf16le.txt").write_bytes("text".encode("utf-16-le"))
    if "other" in words:
        run(settings, "unused", "train.max_steps=1", "data.tokenizer=bpe:257", "data.dir=other")
    monkeypatch.setattr(SavedRun, "weights", lambda run: pytest.fail("gigabytes were read before the refusal"))
    with pytest.raises(UserError, match=message):
        evaluation.main(words)


# ---- Tasks on the command line ---------------------------------------------------------------------------------------

def write_task(name: str, *rows: dict) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


CHOICES = [{"query": "the cat", "choices": ["sat", "mat", "zzz"], "gold": i % 3} for i in range(4)]
LABELLED = [{"text": "the cat", "label": label} for label in ("sat", "on", "sat")]
ANSWERED = [{"prompt": "the", "reference": ["cat", "mat"]}, {"prompt": "a", "reference": "mat"}]
LONG_PROMPT = {"prompt": "x" * 17, "reference": "y"}
CHATS = [{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]}]


@pytest.mark.parametrize("rows, words, expected", [
    (CHOICES, ["--limit", "3"], {"kind": "multiple choice", "examples": 3, "acc": 1 / 3, "truncated": 0}),
    (LABELLED, ["--labels", "zzz,sat,on"], {"kind": "classification", "examples": 3, "labels": ["zzz", "sat", "on"],
                                            "cut": 0}),
    ([*ANSWERED, LONG_PROMPT], ["--max-new-tokens", "4", "--stop", r"\n", "--parse-special", "--metrics", "f1,rouge_l"],
     {"kind": "generation", "examples": 3, "cut": 1}),
    (CHATS, ["--metrics", "f1"], {"kind": "chat", "examples": 1, "cut": 0}),
], ids=["multiple-choice", "classification", "generation", "chat"])
def test_a_task_is_scored_into_json_and_its_predictions_into_a_file(settings, capsys, rows, words, expected):  # noqa: F811
    run_dir = run(settings, "scored", "train.max_steps=1")
    (run_dir / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}: {% endfor %}")
    write_task("task.jsonl", *rows)
    capsys.readouterr()
    evaluation.main(["scored", "--task", "task.jsonl", "--predictions", "made.jsonl", *words])
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed["run"] == "scored" and printed["task"] == "task.jsonl" and "loss" not in printed
    assert (r"--stop '\n': read as '\n'" in err) == ("--stop" in words)
    assert {name: printed[name] for name in expected} == expected
    made = [json.loads(line) for line in Path("made.jsonl").read_text().splitlines()]
    assert [row["line"] for row in made] == list(range(1, printed["examples"] + 1))
    if "--metrics" in words:
        assert not printed.keys() & {"bleu", "chrf", "exact_match"}
        assert printed["f1"] == pytest.approx(sum(row["f1"] for row in made) / len(made))
    assert sorted(path.name for path in Path().glob("*made*")) == ["made.jsonl"]


def test_a_bleu_of_0_is_explained(settings, capsys):  # noqa: F811
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: BLEU stays unchecked")
    run(settings, "scored", "train.max_steps=1")
    write_task("task.jsonl", *ANSWERED)
    evaluation.main(["scored", "--task", "task.jsonl", "--max-new-tokens", "2", "--metrics", "bleu"])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["bleu"] == 0.0 and "bleu is 0: " in err and "chrf" in err


def test_a_classification_shows_its_table_on_stderr_and_its_image_in_a_file(settings, capsys):  # noqa: F811
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: --plot stays unchecked")
    run(settings, "scored", "train.max_steps=1")
    write_task("task.jsonl", *LABELLED)
    capsys.readouterr()
    evaluation.main(["scored", "--task", "task.jsonl", "--plot", "matrix.png"])
    out, err = capsys.readouterr()
    assert json.loads(out)["labels"] == ["on", "sat"]  # of the file, sorted
    assert "true \\ predicted  on  sat  precision  recall     f1" in err
    assert Path("matrix.png").read_bytes().startswith(b"\x89PNG")


def test_data_and_a_task_share_one_json_object(settings, capsys):  # noqa: F811
    run(settings, "scored", "train.max_steps=1")
    write_task("task.jsonl", *CHOICES)
    capsys.readouterr()
    evaluation.main(["scored", "--task", "task.jsonl", "--data", "text.txt"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"] == "text.txt" and printed["loss"] > 0 and printed["examples"] == 4


@pytest.mark.parametrize("words, message", [
    (["--task", "missing.jsonl"], "task 'missing.jsonl' cannot be read: No such file"),
    (["--task", "bad.jsonl"], "task 'bad.jsonl' line 2: is not JSON"),
    (["--limit", "3"], "--limit is for a task of any kind; name one with --task"),
    (["--task", "choices.jsonl", "--limit", "0"], "--limit: '0' should be a whole number, at least 1"),
    (["--task", "choices.jsonl", "--labels", "a,b"], "--labels is for classification, and 'choices.jsonl' is multiple"),
    (["--task", "labels.jsonl", "--metrics", "f1"], "--metrics is for generation, and 'labels.jsonl' is class"),
    (["--task", "labels.jsonl", "--labels", "sat,mat"], "line 2: label \"on\" is not in --labels sat,mat"),
    (["--task", "labels.jsonl", "--plot", "m.svg"], "--plot 'm.svg' should end in .png"),
    (["--task", "labels.jsonl", "--plot", "no/m.png"], "lies in no folder that exists; make 'no' first"),
    (["--task", "answers.jsonl", "--predictions", "no/p.jsonl"], "lies in no folder that exists; make 'no' first"),
    (["--task", "answers.jsonl", "--predictions", "answers.jsonl"], "is the task itself"),
    (["--task", "answers.jsonl", "--predictions", "pipe"], "--predictions 'pipe' is no regular file"),
    (["--task", "answers.jsonl", "--predictions", "scored"], "--predictions 'scored' is no regular file"),
    (["--task", "answers.jsonl", "--metrics", "f2"], "names 'f2'; there are exact_match"),
    (["--task", "long.jsonl", "--predictions", "p.jsonl"], "task 'long.jsonl' line 1: the prompt has 17 tokens, more"),
    (["--task", "texts.jsonl", "--predictions", "p.jsonl"], "line 1: the text has 17 tokens and the longest label 4, "),
    (["--task", "chats.jsonl", "--predictions", "p.jsonl"], "holds messages, but the run has no chat template"),
    (["--task", "chats.jsonl", "--parse-special"], "--parse-special is for generation, and 'chats.jsonl' is chat"),
    (["--task", "labels.jsonl", "--parse-special"], "--parse-special is for generation, and 'labels.jsonl' is class"),
])
def test_mistakes_with_tasks_are_one_line_and_write_nothing(settings, monkeypatch, words, message):  # noqa: F811
    run(settings, "scored", "train.max_steps=1", "data.too_long=error")
    long_text = {"text": "x" * 17}
    for name, rows in (("choices", CHOICES), ("labels", LABELLED), ("answers", ANSWERED), ("chats", CHATS),
                       ("long", [LONG_PROMPT]), ("texts", [long_text | {"label": "a"}, long_text | {"label": "bcd"}])):
        write_task(f"{name}.jsonl", *rows)
    os.mkfifo("pipe")
    Path("bad.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "a", "label": \n')
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    monkeypatch.setattr(SavedRun, "weights", lambda run: pytest.fail("gigabytes were read before the refusal"))
    with pytest.raises(UserError, match=message) as caught:
        evaluation.main(["scored", *words])
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_predictions_that_cannot_be_written_leave_the_old_file_as_it_was(settings, monkeypatch):  # noqa: F811
    run(settings, "scored", "train.max_steps=1")
    write_task("task.jsonl", *CHOICES)
    Path("made.jsonl").write_text("old")
    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="writing 'made.jsonl' failed: No space left on device"):
        evaluation.main(["scored", "--task", "task.jsonl", "--predictions", "made.jsonl"])
    assert Path("made.jsonl").read_text() == "old" and list(Path().glob(".made*")) == []
