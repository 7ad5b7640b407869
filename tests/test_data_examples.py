"""Rows of JSONL to rows of tokens, loss masks and starts: against strings put together by hand and plain packing."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from data import sources
from data.chat import DEFAULT_TEMPLATE
from data.dataset import open_dataset, open_split
from data.examples import Packing, examples, pack
from data.loader import IGNORED, TrainLoader, ValLoader
from data.prepare import prepare
from data.shards import ShardError
from data.sources import RowsUnit
from data.tokenizer import load_tokenizer
from data.verify_shards import verify
from data.write_shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
BYTES = load_tokenizer("bytes")
EOT = 256  # of the bytes tokenizer
T = 23  # odd on purpose; a row is T + 1 tokens


def quiet(line: str) -> None:
    pass


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(source: str, out: Path, **options) -> dict:
    return prepare([source], out, **{"tokenizer": "bytes", "max_seq_len": T, **options})


def rows_of(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, loss and start of all rows, read from the bytes of the files."""
    index = json.loads((folder / "index.json").read_text())
    parts = ([], [], [])
    for shard in (s for s in index["shards"] if s["split"] == split):
        stem = shard["file"].removesuffix(".bin")
        parts[0].append(np.fromfile(folder / shard["file"], "<u2")[512:])
        parts[1].append(np.fromfile(folder / f"{stem}.loss.bin", np.uint8))
        parts[2].append(np.fromfile(folder / f"{stem}.start.bin", np.uint8))
    return tuple(np.concatenate(part).reshape(-1, index["row_tokens"]) for part in parts)


def examples_in(folder: Path, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(ids, loss) of each example, cut out of its row at the starts and freed of what fills the row."""
    found = []
    for tokens, loss, start in zip(*rows_of(folder, split), strict=True):
        assert start[0] == 1
        edges = [*np.flatnonzero(start), len(tokens)]
        for a, b in zip(edges, edges[1:], strict=False):
            b = a + int(np.flatnonzero(loss[a:b])[-1]) + 1
            found.append((tokens[a:b].tolist(), loss[a:b].tolist()))
    return found


def spelled(prompt: str, response: str) -> tuple[list[int], list[int]]:
    before, after = list(prompt.encode()), [*response.encode(), EOT]
    return before + after, [0] * len(before) + [1] * len(after)


PAIRS = [{"prompt": f"say {'é' * (i % 4)}{i}:", "response": f"{i}!"} for i in range(120)]


def refusal(tmp_path: Path, rows: list | str, **options) -> str:
    """The error; nothing may stay written."""
    if isinstance(rows, str):
        (tmp_path / "in.jsonl").write_text(rows)
    else:
        write(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError) as error:
        prepared(str(tmp_path / "in.jsonl"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
    return str(error.value)


# ---- What is written -------------------------------------------------------------------------------------------------

def test_each_example_is_prompt_response_and_end_with_loss_on_the_response(tmp_path):
    prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out")
    found = examples_in(tmp_path / "out") + examples_in(tmp_path / "out", "val")
    assert sorted(found) == sorted(spelled(row["prompt"], row["response"]) for row in PAIRS)


def test_prompt_and_response_are_encoded_apart(tmp_path):
    from data.tokenizer import train_bpe
    train_bpe(["the cat the cat the cat sat"] * 5, 264).save(tmp_path / "tokenizer.json")
    tokenizer = str(tmp_path / "tokenizer.json")
    prepared(write(tmp_path / "a.jsonl", [{"prompt": "th", "response": "e cat"}] * 4), tmp_path / "out",
             tokenizer=tokenizer)
    encoded = load_tokenizer(tokenizer)
    apart = [*encoded.encode("th"), *encoded.encode("e cat"), encoded.eot]
    assert apart[:-1] != encoded.encode("the cat").tolist()
    assert examples_in(tmp_path / "out")[0][0] == apart


def test_a_label_is_a_response_after_a_space(tmp_path):
    rows = [{"text": "fine", "label": "good"}, {"text": "dull", "label": 0}, {"text": "odd", "label": "bad"}]
    index = prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "out", val_fraction=0.0)
    expected = [spelled("fine", " good"), spelled("dull", " 0"), spelled("odd", " bad")]
    assert sorted(examples_in(tmp_path / "out")) == sorted(expected)
    assert index["settings"]["kind"] == "classification"


def test_a_conversation_has_loss_on_every_turn_of_the_assistant_and_nothing_else(tmp_path):
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "<|endoftext|>"}, {"role": "assistant", "content": "dd"}]
    prepared(write(tmp_path / "a.jsonl", [{"messages": talk}]), tmp_path / "out", max_seq_len=127, val_fraction=0.0)
    tokens, loss, start = rows_of(tmp_path / "out")
    text = b"User:\na?\n\nAssistant:\nb\0\n\nUser:\n<|endoftext|>\n\nAssistant:\ndd\0"
    assert tokens[0, :len(text)].tolist() == [EOT if byte == 0 else byte for byte in text]
    assert (tokens[0][loss[0] == 1] % 256).tolist() == list(b"b\0dd\0") and tokens.max() == EOT
    assert start.sum() == 1  # end-of-text inside a conversation does not end it
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE


def test_an_empty_prompt_starts_from_end_of_text(tmp_path):
    prepared(write(tmp_path / "a.jsonl", [{"prompt": "", "response": "x"}]), tmp_path / "out", val_fraction=0.0)
    assert examples_in(tmp_path / "out") == [([EOT, 120, EOT], [0, 1, 1])]


def test_the_first_token_of_an_example_is_never_a_target(tmp_path):
    only = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"  # nothing stands before the answer
    rows = [{"messages": [{"role": "assistant", "content": "abc"}]}] * 3
    prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "out", val_fraction=0.0, chat_template=only)
    tokens, loss, start = rows_of(tmp_path / "out")
    assert start.sum() == 3 and not (loss & start).any() and loss.sum() == 9


def test_a_row_ends_in_end_of_text_without_loss(tmp_path):
    prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out")
    for tokens, loss, _ in zip(*rows_of(tmp_path / "out"), strict=True):
        rest = slice(int(np.flatnonzero(loss)[-1]) + 1, None)
        assert (tokens[rest] == EOT).all() and not loss[rest].any()


def of_rows(folder: Path, rows: list, kind: str, **settings) -> list:
    """What examples() yields for the rows of a file, with the bytes tokenizer."""
    path = write(folder / "in.jsonl", rows)
    size = os.path.getsize(path)
    packing = Packing(kind, **{"max_seq_len": T, "chat_template": TALK_TEMPLATE} | settings)
    return [example for example, _ in examples(RowsUnit(path, size, None, end=size), packing, BYTES)]


TALK_TEMPLATE = ("{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
                 "{{ 'a' if add_generation_prompt }}")
TOO_LONG = [  # kind, a row of more than T + 1 = 24 tokens, what stays (~ is end-of-text), from where the loss counts
    ("prompt/response", {"prompt": "0123456789" * 2, "response": "abcdefgh"}, "567890123456789abcdefgh~"[-24:], 15),
    ("prompt/response", {"prompt": "0123", "response": "abcdefghijklmnopqrstuvwxyz"}, "0123abcdefghijklmnopqrst", 4),
    ("prompt/response", {"prompt": "0123456789" * 9, "response": "x" * 99}, "890123456789" + "x" * 12, 12),
    ("classification", {"text": "0123456789" * 3, "label": "good"}, "234567890123456789 good~", 18),
    ("chat", {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "one"},
                           {"role": "assistant", "content": "A"}, {"role": "user", "content": "two"},
                           {"role": "assistant", "content": "B" * 9}]}, "sS~utwo~a" + "B" * 9 + "~", 9),
    ("chat", {"messages": [{"role": "user", "content": "0123456789" * 3}, {"role": "assistant", "content": "B" * 9}]},
     "u" + "901234567890123456789"[-11:] + "~a" + "B" * 9 + "~", 14)]


@pytest.mark.parametrize(("kind", "row", "stays", "learnt_from"), TOO_LONG)
def test_an_example_too_long_is_cut_dropped_or_refused(kind, row, stays, learnt_from, tmp_path):
    fits = {"prompt/response": {"prompt": "p", "response": "q"}, "classification": {"text": "t", "label": "l"},
            "chat": {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}}[kind]
    whole = of_rows(tmp_path, [row], kind, max_seq_len=1000)[0]
    cut, other = of_rows(tmp_path, [row, fits], kind)
    assert cut.ids.tolist() == [EOT if char == "~" else ord(char) for char in stays] and len(cut.ids) <= T + 1
    assert cut.scored.tolist() == [i >= learnt_from for i in range(len(stays))]
    assert (cut.cut, other.cut, whole.cut, cut.text) == (len(whole.ids) - len(cut.ids), 0, 0, whole.text)
    for setting in ("drop", "error"):
        assert of_rows(tmp_path, [row], kind, max_seq_len=len(whole.ids) - 1, too_long=setting)[0].cut == 0  # it fits
    dropped, other = of_rows(tmp_path, [row, fits], kind, too_long="drop")
    assert dropped is None and other.cut == 0
    before = int(whole.scored.argmax())
    with pytest.raises(UserError, match=f"in.jsonl' line 2 has {len(whole.ids)} tokens, {before} of them before its "
                                        f"response, more than the {T + 1} that a context of {T} takes; shorten it, "
                                        "raise the context .* or let it be cut or dropped .--too-long, data.too_long"):
        of_rows(tmp_path, [fits, row], kind, too_long="error")


def test_a_cut_prompt_keeps_the_token_that_begins_every_text(tmp_path):
    file = json.loads(BYTES.file_text)
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    file["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    rows = [{"prompt": "0123456789" * 3, "response": "abc"}]
    prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "out", val_fraction=0.0,
             tokenizer=str(tmp_path / "tokenizer.json"))
    assert rows_of(tmp_path / "out")[0].tolist() == [[EOT, *b"1234567890123456789"[-19:], *b"abc", EOT]]


def test_many_rows_of_which_some_are_too_long_are_prepared_and_counted(tmp_path, capsys):
    rows = [{"text": "x" * (200 if i % 10 == 0 else 5) + str(i), "label": "good"} for i in range(300)]
    index = prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "out", val_fraction=0.0)
    said = capsys.readouterr().err
    counts = index["examples"]["train"]
    assert (counts["examples"], counts["truncated"], counts["longest"]) == (300, 30, 200 + 3 + 5 + 1)
    lengths = [len(row["text"]) + len(" good") + 1 for row in rows]
    assert (f"300 examples of 12 to 209 tokens, {np.mean(lengths):.1f} on average; 30 cut to fit, then 12 to {T + 1}, "
            f"{np.minimum(lengths, T + 1).mean():.1f} on average; " in said)
    assert counts["tokens"] == sum(len(ids) for ids, _ in examples_in(tmp_path / "out"))
    assert max(len(ids) for ids, _ in examples_in(tmp_path / "out")) == T + 1


def test_what_decides_the_tokens_is_among_the_settings():
    assert Packing("prompt/response", 9, too_long="drop").settings == {
        "kind": "prompt/response", "max_seq_len": 9, "too_long": "drop"}
    assert Packing("chat", 9, "x").settings.keys() == {"kind", "max_seq_len", "too_long", "chat_template",
                                                          "chat_format"}


def test_what_is_reported_is_what_is_there(tmp_path, capsys):
    index = prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out")
    notes = capsys.readouterr().err.splitlines()
    found = examples_in(tmp_path / "out")
    lengths = [len(ids) for ids, _ in found]
    assert index["examples"]["train"] == {
        "examples": len(found), "tokens": sum(lengths), "response_tokens": sum(sum(loss) for _, loss in found),
        "shortest": min(lengths), "longest": max(lengths), "truncated": 0, "dropped": 0, "cut_tokens": 0}
    shard = index["shards"][0]
    assert shard["documents"] == len(found) and index["row_tokens"] == T + 1
    assert shard["text_bytes"] == sum(i != EOT for ids, _ in found for i in ids)
    full = 100 * sum(lengths) / shard["tokens"]
    summary, example = notes
    assert f"{len(found)} examples of {min(lengths)} to {max(lengths)} tokens, {np.mean(lengths):.1f} on" in summary
    assert f"rows {full:.1f} % full" in summary
    assert f"prompt/response in rows of {T + 1} tokens, loss on the responses" in summary
    ids, loss = found[0]
    asked, answer = (bytes(i for i, scored in zip(ids, loss, strict=True) if scored == part and i != EOT).decode()
                     for part in (0, 1))
    assert example.endswith(f': "{asked}[[{answer}<|endoftext|>]]"')


def test_packing_puts_every_example_once_into_rows_that_hold_it_and_wastes_little():
    lengths = np.random.default_rng(0).integers(3, 40, 500).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.98  # first-fit in the order given: 0.970
    assert pack([64, 1, 63, 32, 32], 64) == [[0], [1, 2], [3, 4]]


def test_few_examples_stay_whole_and_the_last_are_val(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", PAIRS[:7])
    write(tmp_path / "in" / "b.jsonl", PAIRS[7:11])
    index = prepared(str(tmp_path / "in"), tmp_path / "out", val_fraction=0.2)
    assert index["val_split"] == "rows"
    for split, rows in (("train", PAIRS[:9]), ("val", PAIRS[9:11])):
        assert sorted(examples_in(tmp_path / "out", split)) == sorted(spelled(*row.values()) for row in rows)


def test_many_examples_are_split_by_the_hash_of_what_they_say(tmp_path):
    prepared(write(tmp_path / "a.jsonl", [row | {"id": i} for i, row in enumerate(PAIRS)]), tmp_path / "out",
             val_fraction=0.3)

    def is_val(row: dict) -> bool:
        said = json.dumps({"prompt": row["prompt"], "response": row["response"]})
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") < 0.3 * 2**64

    expected = [spelled(*row.values()) for row in PAIRS if is_val(row)]
    assert 15 < len(expected) < 60 and sorted(examples_in(tmp_path / "out", "val")) == sorted(expected)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_workers_compression_and_place_do_not_change_the_bytes(tmp_path, monkeypatch):
    from data import prepare as module
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 1)
    source = write(tmp_path / "a.jsonl", PAIRS * 4)
    (tmp_path / "elsewhere").mkdir()
    moved = write(tmp_path / "elsewhere" / "a.jsonl", PAIRS * 4)
    prepared(source, tmp_path / "one", workers=1, shard_tokens=500)
    prepared(moved, tmp_path / "two", workers=2, shard_tokens=500)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    shards = json.loads((tmp_path / "one" / "index.json").read_text())["shards"]
    assert len(shards) > 5 and all(shard["tokens"] % (T + 1) == 0 and shard["tokens"] <= 500 for shard in shards)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(Path(source).read_bytes())
    prepared(str(tmp_path / "a.jsonl.gz"), tmp_path / "packed")
    assert sorted(examples_in(tmp_path / "packed")) == sorted(examples_in(tmp_path / "one"))


@pytest.mark.parametrize("stop_at", [0, 2, 5])
def test_stopped_anywhere_the_same_call_goes_on_to_the_same_bytes(stop_at, tmp_path, monkeypatch):
    from data import prepare as module
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 1)
    source = write(tmp_path / "a.jsonl", PAIRS * 3)
    prepared(source, tmp_path / "whole", shard_tokens=400)
    asked = iter(range(1000))
    with pytest.raises(module.PreparationStopped):
        prepared(source, tmp_path / "out", shard_tokens=400, should_stop=lambda: next(asked) == stop_at)
    prepared(source, tmp_path / "out", shard_tokens=400)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_bpe_is_trained_on_what_the_training_examples_say(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "zebra zebra"}, {"role": "assistant", "content": "okapi"}]}] * 9
    prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer="bpe:262", max_seq_len=60)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert len(tokenizer.encode("zebra")) < 5 and len(tokenizer.encode("User:\n")) == 6  # not on the template


# ---- What is read back -----------------------------------------------------------------------------------------------

def test_batches_hold_rows_with_targets_masked_and_examples_apart(tmp_path):
    prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out", shard_tokens=10 * (T + 1))
    tokens, loss, start = rows_of(tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    loader = TrainLoader(open_split(dataset, "train"), seq_len=T, tokens_per_step=6 * T, micro_batch=4, seed=3)
    assert loader.windows_per_epoch == len(tokens)
    seen = []
    for step in range(4):
        ids = loader.window_ids(step)
        batches = loader.batch(step)
        assert [len(b.tokens) for b in batches] == [4, 2]
        for name, wanted in (("tokens", tokens[ids, :-1]), ("document_ids", start[ids, :-1].cumsum(axis=1) - 1),
                             ("targets", np.where(loss[ids, 1:] == 1, tokens[ids, 1:].astype(int), IGNORED))):
            found = np.concatenate([getattr(b, name).numpy() for b in batches])
            np.testing.assert_array_equal(found, wanted)
        assert [b.scored for b in batches] == [loss[ids[:4], 1:].sum(), loss[ids[4:], 1:].sum()]
        seen += ids.tolist()
    assert len(set(seen)) == len(seen)
    val = ValLoader(open_split(dataset, "val"), seq_len=T, eval_tokens=10**6, micro_batch=3)
    found = np.concatenate([b.targets.numpy() for b in val.micro_batches()])
    tokens, loss, _ = rows_of(tmp_path / "out", "val")
    np.testing.assert_array_equal(found, np.where(loss[:, 1:] == 1, tokens[:, 1:].astype(int), IGNORED))


def test_a_loss_mask_beside_text_masks_targets_and_a_shard_without_one_counts_all(tmp_path):
    for name, count in (("train_00000", 40), ("train_00001", 30)):
        writer = ShardWriter(tmp_path / f"{name}.bin", np.uint16, 100)
        writer.write(np.arange(count))
        writer.close()
    mask = (np.arange(40) % 3 == 0).astype(np.uint8)
    mask.tofile(tmp_path / "train_00000.loss.bin")
    stream = open_split(open_dataset(tmp_path), "train")
    loader = TrainLoader(stream, seq_len=13, tokens_per_step=5 * 13, micro_batch=5, seed=0)
    whole, counts = np.concatenate([np.arange(40), np.arange(30)]), np.concatenate([mask, np.ones(30)])
    for row, window in zip(loader.batch(0)[0].targets.numpy(), loader.window_ids(0), strict=True):
        part = slice(window * 13 + 1, window * 13 + 14)
        np.testing.assert_array_equal(row, np.where(counts[part] == 1, whole[part], IGNORED))


def test_another_context_than_the_rows_were_packed_for_is_refused_with_the_way_out(tmp_path):
    prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out")
    stream = open_split(open_dataset(tmp_path / "out"), "train")
    for seq_len in (T - 1, T + 1):
        with pytest.raises(ShardError, match=f"context of {T} tokens but model.max_seq_len = {seq_len}; set it to {T}"):
            TrainLoader(stream, seq_len=seq_len, tokens_per_step=4 * seq_len, micro_batch=1, seed=0)


@pytest.mark.parametrize("track", ["loss", "start"])
def test_verify_finds_a_flipped_bit_of_a_track_and_opening_a_missing_one(track, tmp_path):
    prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "out")
    assert verify(tmp_path / "out", quiet) == []
    path = tmp_path / "out" / f"train_00000.{track}.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    problems = verify(tmp_path / "out", quiet)
    assert len(problems) == 1 and path.name in problems[0] and "is damaged" in problems[0]
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match=f"{path.name}' holds {len(data) - 1} bytes but its shard {len(data)} tokens"):
        open_dataset(tmp_path / "out")
    path.unlink()
    with pytest.raises(ShardError, match=f"{path.name}' is missing"):
        open_dataset(tmp_path / "out")


# ---- What is refused: by file and line, with nothing written ---------------------------------------------------------

GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(("row", "words"), [
    ({"prompt": "a", "response": ""}, "has an empty response"),
    ({"prompt": "a", "response": " \n"}, "has an empty response"),
    ({"prompt": "a", "response": None}, "has null as its response; it should be text"),
    ({"prompt": ["a"], "response": "b"}, 'has ["a"] as its prompt'),
    ({"prompt": "a"}, "is not prompt/response, as the first row is: it should have prompt and response but has only "
                      "prompt"),
    ({"text": "a", "label": "b"}, "is not prompt/response"),
    ({"messages": []}, "is not prompt/response"),
    ({"prompt": "a", "response": "b", "completion": "b"}, "has both a response and a completion"),
    ({"prompt": [{"role": "user"}], "completion": []},
     'has [{"role": "user"}] as its prompt; it should be text (turns go into one list, messages)'),
    ({"prompt": "a", "response": "b", "system": "Be brief."}, "has 'system', which is not honoured here; put what it"),
    ({"prompt": "a", "response": "b", "rejected": "c"}, "has 'rejected', which is not honoured here"),
    ({"prompt": "a", "response": "b", "weight": 0}, "has 'weight', which is not honoured here"),
    ([1], "is not prompt/response"),
])
def test_a_row_that_is_no_example_is_named_by_file_and_line(row, words, tmp_path):
    text = refusal(tmp_path, [GOOD, GOOD, row, GOOD])
    assert f"in.jsonl' line 3 {words}" in text


@pytest.mark.parametrize(("messages", "words"), [
    ([], "has no messages"),
    ("hello", "has no messages"),
    ([{"role": "user", "content": "a"}], "has no message of the role assistant, only of user"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "message 2, the assistant's, is empty"),
    ([{"role": "user"}], "message 1 is not"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
     "has no message of the role assistant with a weight, only of assistant, user"),
    ([{"role": "user", "content": "a"}, {"role": "gpt", "content": "b"}], "the role 'gpt', which is called assistant"),
    ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}, {"role": "assistant", "content": "b"}],
     "role robot is none of"),
])
def test_a_conversation_that_cannot_be_learnt_from_is_named_by_file_and_line(messages, words, tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    text = refusal(tmp_path, [good, {"messages": messages}], max_seq_len=100)
    assert "in.jsonl' line 2 " in text and words in text


@pytest.mark.parametrize("field", ["tools", "functions", "parallel_tool_calls", "system", "documents"])
def test_a_field_of_a_conversation_that_would_change_it_is_refused_by_name(field, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    prepared(write(tmp_path / "null.jsonl", [talk | {field: None, "id": 3, "source": "here"}]), tmp_path / "fine",
             max_seq_len=100, val_fraction=0.0)  # what says nothing, and what stays outside
    assert f"in.jsonl' line 2 has '{field}', which is not honoured here" in refusal(
        tmp_path, [talk, talk | {field: True}], max_seq_len=100)


def test_prompt_and_completion_are_a_prompt_and_its_response(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in PAIRS]
    prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "one")
    prepared(write(tmp_path / "a.jsonl", PAIRS), tmp_path / "two")
    assert rows_of(tmp_path / "one")[0].tolist() == rows_of(tmp_path / "two")[0].tolist()


def test_a_conversation_in_parts_of_text_and_with_a_weight_of_0(tmp_path):
    talk = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "no", "weight": 0}, {"role": "user", "content": "b"},
            {"role": "assistant", "content": "yes", "weight": 1}]
    [example] = of_rows(tmp_path, [{"messages": talk}], "chat")
    assert bytes(i % 256 for i in example.ids) == b"ua?\0ano\0ub\0ayes\0"
    assert bytes(i % 256 for i in example.ids[example.scored]) == b"yes\0"


def test_a_template_that_rewrites_turns_gives_examples_that_are_cut_each_by_itself(tmp_path, capsys):
    rewriting = ("{% for m in messages %}{{ m.role[0] + (m.content if loop.last or m.role == 'user' else '..') }}"
                 "{{ eos_token }}{% endfor %}{{ 'a' if add_generation_prompt }}")
    talk = [{"role": role, "content": word * 5} for role, word in (
        ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"))]
    found = of_rows(tmp_path, [{"messages": talk}], "chat", chat_template=rewriting)
    assert [bytes(i % 256 for i in example.ids) for example in found] == [
        b"uAAAAA\0aBBBBB\0", b"uCCCCC\0aDDDDD\0"]  # the second without its oldest turn
    assert [bytes(i % 256 for i in example.ids[example.scored]) for example in found] == [b"BBBBB\0", b"DDDDD\0"]
    assert [example.cut for example in found] == [0, 11]
    index = prepared(write(tmp_path / "a.jsonl", [{"messages": talk}] * 3), tmp_path / "out", val_fraction=0.0,
                     chat_template=rewriting)
    assert index["examples"]["train"]["examples"] == 6


def test_a_line_that_is_not_json_is_named(tmp_path):
    assert "in.jsonl' line 2 is not JSON" in refusal(tmp_path, json.dumps(GOOD) + "\n{'prompt': 1}\n")


def test_the_same_mistake_in_the_middle_of_much_is_named_by_its_line(tmp_path, monkeypatch):
    from data import prepare as module
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 1)
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    assert "in.jsonl' line 334 has an empty response" in refusal(
        tmp_path, [*PAIRS, *PAIRS, *PAIRS[:93], {"prompt": "x", "response": ""}, *PAIRS])


def test_kinds_are_not_mixed(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", [GOOD])
    for name, rows in (("b.jsonl", [{"text": "plain"}]), ("c.txt", ["plain"])):
        write(tmp_path / "in" / name, rows)
        with pytest.raises(UserError, match=f"a.jsonl' holds prompt/response but .*{name}' holds text; prepare one"):
            prepared(str(tmp_path / "in"), tmp_path / "out")
        (tmp_path / "in" / name).unlink()
    with pytest.raises(UserError, match="holds classification"):
        prepared(str(tmp_path / "in"), tmp_path / "out",
                 val_sources=[write(tmp_path / "v.jsonl", [{"text": "a", "label": "b"}])])


def test_a_field_named_by_the_user_is_plain_text_whatever_else_a_row_has(tmp_path):
    rows = [{"body": f"text {i}", "prompt": "a", "response": "b"} for i in range(5)]
    index = prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "out", text_field="body", val_fraction=0.0)
    assert "row_tokens" not in index and "kind" not in index["settings"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_text_and_label_are_pretrained_on_when_that_is_said(kind, tmp_path):
    rows = [{"text": f"review {i}", "label": i % 2} for i in range(5)]
    source = write(tmp_path / "a.jsonl", rows)
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; parquet stays untested")
        import pyarrow
        parquet.write_table(pyarrow.Table.from_pylist(rows), source := str(tmp_path / "a.parquet"))
    else:
        with pytest.raises(UserError, match=r"to be learnt as they are \(--kind text, data.kind=text\)"):
            prepare([source], tmp_path / "out", tokenizer="bytes")
    index = prepared(source, tmp_path / "out", kind="text", val_fraction=0.0)
    tokens = np.fromfile(tmp_path / "out" / "train_00000.bin", "<u2")[512:].tolist()
    assert "row_tokens" not in index and tokens == [i for n in range(5) for i in [*f"review {n}".encode(), EOT]]
    if kind == "jsonl":
        with pytest.raises(UserError, match='kind: "text" -> "classification"'):
            prepared(source, tmp_path / "out", val_fraction=0.0)


def test_other_settings_are_refused_with_the_list(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "hello"}]}] * 3)
    prepared(source, tmp_path / "out", max_seq_len=50, val_fraction=0.0)
    with pytest.raises(UserError, match="max_seq_len: 50 -> 51"):
        prepared(source, tmp_path / "out", max_seq_len=51, val_fraction=0.0)
    with pytest.raises(UserError, match="chat_template: "):
        prepared(source, tmp_path / "out", max_seq_len=50, val_fraction=0.0, chat_template=DEFAULT_TEMPLATE + " ")


def test_the_command_line_needs_the_context_and_takes_a_template(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "hello"}]}] * 3)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}-{{ m.content }}{{ eos_token }}{% endfor %}"
                                         "{{ '-' if add_generation_prompt }}")

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data.prepare", source, "--tokenizer", "bytes", "--val-fraction", "0", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})

    missing = run("--out", str(tmp_path / "out"))
    assert missing.returncode == 2 and missing.stderr.startswith("error: --max-seq-len is missing")
    assert not (tmp_path / "out").exists()
    done = run("--out", str(tmp_path / "out"), "--max-seq-len", "20", "--chat-template", str(tmp_path / "mine.jinja"))
    assert done.returncode == 0, done.stderr
    tokens, loss, _ = rows_of(tmp_path / "out")
    assert tokens[0, :14].tolist() == [*b"-hello", EOT] * 2 and loss[0, :14].tolist() == [0, 1, 1, 1, 1, 1, 1] * 2
