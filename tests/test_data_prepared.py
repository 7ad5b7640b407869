"""What train.py gets: the folder, the process that prepares it, and what goes wrong with either."""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from config import ConfigError, DataConfig, MachineError, UserError
from data import prepared as module
from data.dataset import load_index, open_dataset, open_split
from data.prepare import PreparationStopped, prepare
from data.prepared import check_content, data_dir_for, ensure_prepared
from data.tokenizer import load_tokenizer, train_bpe
from tests.test_data_prepare import ROOT, SOURCE, children_of, jsonl


@pytest.fixture
def book(tmp_path, monkeypatch) -> DataConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mybook.txt").write_text("some text " * 100)
    return DataConfig(source=("mybook.txt",), tokenizer="bytes")


@pytest.fixture
def mine(book) -> DataConfig:
    """The book as train.py finds it prepared in a folder "mine"."""
    prepare(book.source, Path("mine"), tokenizer="bytes")
    return dataclasses.replace(book, dir="mine")


@pytest.fixture
def no_process(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)


def test_the_folder_is_named_after_the_source_and_the_settings(book):
    folder = data_dir_for(book)
    assert folder.parent == Path("shards") and folder.name.startswith("mybook-") and len(folder.name) == 7 + 8
    changes = [{"tokenizer": "gpt2"}, {"val_fraction": 0.1}, {"val_source": ("x.txt",)}, {"text_field": "content"},
               {"source": ("mybook.txt", "b.txt")}]
    assert len({data_dir_for(dataclasses.replace(book, **change)) for change in [{}, *changes]}) == 6
    assert data_dir_for(dataclasses.replace(book, dir="mine")) == Path("mine")
    with pytest.raises(ConfigError, match="data.source and data.dir are both left out"):
        data_dir_for(DataConfig())


def test_what_becomes_of_rows_too_long_is_in_the_name_of_folders_of_examples_alone(book):
    Path("pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    pairs = dataclasses.replace(book, source=("pairs.jsonl",))
    for data, names in ((book, 1), (pairs, 3)):
        assert len({data_dir_for(dataclasses.replace(data, too_long=choice), 64)
                    for choice in ("cut", "drop", "error")}) == names


def test_rows_of_a_kind_of_their_own_and_as_plain_text_are_two_folders_of_data(book):
    Path("reviews.jsonl").write_text('{"text": "a review", "label": "good"}\n' * 50)
    reviews = dataclasses.replace(book, source=("*.jsonl",), kind="text")
    as_text = ensure_prepared(reviews, 16)
    assert "kind" in load_index(as_text)["settings"] and "row_tokens" not in load_index(as_text)
    examples = ensure_prepared(dataclasses.replace(reviews, kind="auto"), 16)
    assert load_index(examples)["row_tokens"] == 17 and re.fullmatch("text-[0-9a-f]{8}", examples.name)
    assert ensure_prepared(reviews, 16) == as_text
    with pytest.raises(ConfigError, match='kind: "text" -> "auto"'):
        ensure_prepared(dataclasses.replace(reviews, kind="auto", dir=str(as_text)), 16)


def test_local_rank_0_prepares_while_the_others_wait(book):
    found = []
    waiting = threading.Thread(target=lambda: found.append(ensure_prepared(book, 64, local_rank=1)))
    waiting.start()
    folder = ensure_prepared(book, 64)
    waiting.join(10)
    assert found == [folder] == [data_dir_for(book)] and (folder / "index.json").exists()


def test_words_that_look_like_options_reach_the_process_as_they_are(book):
    for name in ("-mybook.jsonl", "--val", "-v.jsonl"):
        Path(name).write_text(jsonl([f"text {i} in {name}" for i in range(120)], field="--body"))
    Path("--val").rename("--val.jsonl")
    data = DataConfig(source=("-mybook.jsonl", "./-mybook.jsonl"), val_source=("-v.jsonl", "--val.jsonl"),
                      tokenizer="bytes", text_field="--body", dir="-out")
    folder = ensure_prepared(data, 64)
    settings = json.loads((folder / "index.json").read_text())["settings"]
    assert [source["name"] for source in settings["sources"]] == ["-mybook.jsonl", "-mybook.jsonl"]
    assert [source["name"] for source in settings["val_sources"]] == ["-v.jsonl", "--val.jsonl"]
    assert settings["text_field"] == "--body" and settings["val_fraction"] is None
    assert ensure_prepared(data, 64) == folder


def test_a_template_of_the_parent_reaches_the_process_byte_for_byte_and_no_file_stays(book, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))  # the child's; others use the machine's at the same time
    monkeypatch.setattr(tempfile, "tempdir", None)  # ours: look again
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "é"}]}) + "\n")
    template = ("{% for m in messages %}\r\n中{{ m.content }}{{ eos_token }}{% endfor %}"
                "{{ '中' if add_generation_prompt }}")
    data = DataConfig(source=("chat.jsonl",), tokenizer="bytes", val_fraction=0.0, too_long="drop", dir="out")
    ensure_prepared(data, 64, template)
    assert Path("out", "chat_template.jinja").read_bytes() == template.encode()
    assert list(Path(tempfile.gettempdir()).iterdir()) == list((tmp_path / "temporary").iterdir()) == []
    assert ensure_prepared(data, 64, template) == Path("out")
    for changed, words in (({"too_long": "cut"}, "too_long"), ({}, "chat_template")):
        with pytest.raises(ConfigError, match=f"other settings .*{words}: "):
            ensure_prepared(dataclasses.replace(data, **changed), 64, template if changed else None)


def test_nothing_is_started_when_all_is_prepared(mine, no_process):
    assert ensure_prepared(mine, 64) == Path("mine")


@pytest.mark.parametrize(("failing", "status"), [("mistake", 2), ("disk", 1)])
def test_what_ends_the_process_is_its_one_line_and_its_status(failing, status, book, tmp_path, monkeypatch):
    """In a process of its own, whose stderr is looked at."""
    Path("rows.jsonl").write_text(jsonl(["text"] * 3) + "{broken\n")
    program = (f"import resource, sys\nfrom config import DataConfig, exit_cleanly\n"
               f"from data.prepared import ensure_prepared\n"
               f"{'' if failing == 'mistake' else 'resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))'}\n"
               f"data = DataConfig(source=({'rows.jsonl' if failing == 'mistake' else 'mybook.txt'!r},), "
               "tokenizer='bytes', dir='out')\n"
               "exit_cleanly(lambda argv: ensure_prepared(data, 64))\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == status and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: source 'rows.jsonl' line 4" if failing == "mistake" else "error: writing ")


def test_a_process_that_is_killed_is_one_line(book, monkeypatch):
    start = subprocess.Popen

    def start_and_kill(*args, **kwargs):
        child = start(*args, **kwargs)
        child.kill()
        return child
    monkeypatch.setattr(subprocess, "Popen", start_and_kill)
    with pytest.raises(MachineError, match=r"preparing 'shards/mybook-.*' was ended by signal 9 \(Killed"):
        ensure_prepared(book, 64)
    with pytest.raises(PreparationStopped, match="stopped while preparing 'shards/mybook"):
        ensure_prepared(book, 64, should_stop=lambda: True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps --ppid: that it goes on without a worker is unchecked")
def test_preparing_goes_on_in_one_process_after_a_worker_died(book, capfd):
    Path("mybook.txt").write_text(SOURCE * (20 * 2 ** 20 // len(SOURCE)))  # enough for workers to start
    killed = []

    def kill_a_worker() -> bool:
        workers = [worker for child in children_of(os.getpid()) for worker in children_of(child)]
        if len(workers) > 1 and not killed:  # the first tracks resources
            killed.append(workers[-1])
            os.kill(workers[-1], signal.SIGKILL)  # as the system does when memory runs out
        return False
    folder = ensure_prepared(book, 64, should_stop=kill_a_worker)
    errors = capfd.readouterr().err
    assert killed and "goes on in a single process" in errors and "error:" not in errors, errors
    prepare(book.source, Path("whole"), tokenizer="bytes")
    assert (folder / "index.json").read_bytes() == Path("whole/index.json").read_bytes()


def test_a_worker_that_dies_again_without_others_ends_it(book, monkeypatch, capfd):
    Path("python").write_text(f"#!/bin/sh\necho started >&2; exit {os.EX_OSERR}\n")  # as prepare.py says it
    Path("python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(Path("python").absolute()))
    with pytest.raises(MachineError, match="ended by signal 9 .*out of memory"):
        ensure_prepared(book, 64)
    assert capfd.readouterr().err.count("started") == 2


def test_a_folder_that_another_process_fills_is_waited_for(book, monkeypatch, capsys):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(module, "NOTE_SECONDS", 0.0)
    waiting = threading.Thread(target=lambda: ensure_prepared(book, 64))

    notes = []

    def while_locked() -> bool:
        if not waiting.ident:
            waiting.start()
            while "waiting for" not in "".join(notes) and len(notes) < 1000:  # the thread's process met the lock
                notes.append(capsys.readouterr().err)
                time.sleep(0.02)
        return False
    prepare(book.source, data_dir_for(book), tokenizer="bytes", should_stop=while_locked)
    waiting.join(10)
    assert not waiting.is_alive() and f"waiting for {data_dir_for(book) / 'index.json'}" in "".join(notes)


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps --ppid: that it ends with train.py is unchecked")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_the_one_that_started_it_and_frees_the_folder(how, book):
    train_bpe([SOURCE], 400).save(Path("tokenizer.json"))
    Path("long.txt").write_text((SOURCE + "\n") * 200)  # seconds of work
    program = ("import signal\nfrom config import DataConfig\nfrom data.prepared import *\nsignals = []\n"
               "signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))\n"
               "data = DataConfig(source=('long.txt',), tokenizer='tokenizer.json', dir='out')\n"
               "try:\n    ensure_prepared(data, 64, should_stop=lambda: bool(signals))\n"
               "except PreparationStopped as stopped:\n    print(stopped)\n")
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    children: list[int] = []
    deadline = time.monotonic() + 60
    while not Path("out", ".train_00000.bin.part").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in children_of(parent.pid):
        children += [child, *children_of(child)]
    assert len(children) > 1
    parent.send_signal(how)
    out, err = parent.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert (parent.returncode, out) == (0, "stopped while preparing 'out'\n") and "rror" not in err, err
    while (left := [child for child in children if Path(f"/proc/{child}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and Path("out", ".progress.json").exists() and not Path("out", "index.json").exists()
    with open(Path("out", ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_waiting_rank_says_so_now_and_then_and_stops_when_asked(book, monkeypatch, capsys):
    monkeypatch.setattr(module, "NOTE_SECONDS", 0.0)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    asked = iter([False, False, True])
    with pytest.raises(PreparationStopped, match="stopped"):
        ensure_prepared(book, 64, local_rank=1, should_stop=lambda: next(asked))
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and "waiting for" in notes[0] and "index.json" in notes[0]


def test_a_prepared_folder_is_taken_without_its_source(mine, no_process, capsys):
    os.unlink("mybook.txt")
    assert ensure_prepared(mine, 64) == Path("mine") and "does not exist" in capsys.readouterr().err


def test_a_folder_made_with_other_settings_is_refused_with_the_list(mine, no_process):
    with pytest.raises(ConfigError, match=r"'mine' was made with other settings \(val_fraction: 0.05 -> 0.2\)"):
        ensure_prepared(dataclasses.replace(mine, val_fraction=0.2), 64)
    Path("mybook.txt").write_text("longer text " * 100)
    with pytest.raises(ConfigError, match=r"sources: .*1000.*1200"):
        ensure_prepared(mine, 64, local_rank=1)


def test_an_edit_of_the_same_size_is_refused_by_the_one_rank_that_reads_the_text(mine, no_process, monkeypatch):
    check_content(Path("mine"), mine)
    os.utime("mybook.txt", (1, 1))  # copies differ in it
    check_content(Path("mine"), mine)
    Path("mybook.txt").write_text("SOME TEXT " * 100)
    assert ensure_prepared(mine, 64) == Path("mine")  # for all ranks: reads no text
    with pytest.raises(ConfigError, match=r"'mine' was made with other settings \(sources: .*\"content\"") as refused:
        check_content(Path("mine"), mine)
    words = re.search(r"to train on it as it is: data.source=\[\] data.dir=(\S+)$", str(refused.value))
    check_content(Path("mine"), DataConfig(source=(), dir=words[1]))  # the advice, followed


def test_a_folder_from_before_content_was_recorded_is_taken(mine, no_process):
    index = json.loads(Path("mine", "index.json").read_text())
    del index["settings"]["sources"][0]["content"], index["settings"]["bad_rows"], index["settings"]["parse_special"]
    del index["bad_rows"], index["separators"]
    Path("mine", "index.json").write_text(json.dumps(index))
    assert ensure_prepared(mine, 64) == Path("mine")
    check_content(Path("mine"), mine)
    prepare(mine.source, Path("mine"), tokenizer="bytes")  # found done
    with pytest.raises(ConfigError, match="parse_special: false -> true"):
        ensure_prepared(dataclasses.replace(mine, parse_special=True), 64)


def test_spellings_of_a_source_share_their_shards(book, no_process, tmp_path):
    folder = data_dir_for(book)
    prepare(book.source, folder, tokenizer="bytes")
    for spelled in ("./mybook.txt", str(tmp_path / "mybook.txt"), f"{tmp_path}/../{tmp_path.name}//mybook.txt"):
        data = dataclasses.replace(book, source=(spelled,))
        assert ensure_prepared(data, 64) == folder
        check_content(folder, data)
    (tmp_path / "other").mkdir()
    assert data_dir_for(dataclasses.replace(book, source=("other/mybook.txt",))) != folder


def test_a_folder_named_by_another_spelling_than_todays_is_found(book, no_process):
    words = [["./mybook.txt"], [], "bytes", 0.05, "text"]  # as folders were named before spellings were one
    folder = Path("shards", f"mybook-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]}")
    prepare(book.source, folder, tokenizer="bytes")
    assert ensure_prepared(dataclasses.replace(book, source=("./mybook.txt",)), 64) == folder


def test_what_becomes_of_bad_rows_matters_where_there_are_some(book, no_process):
    Path("good.jsonl").write_text(jsonl(["text"] * 3))
    Path("bad.jsonl").write_text(jsonl(["text"] * 3) + "{broken\n")
    for name, is_taken in (("good", True), ("bad", False)):
        data = DataConfig(source=(f"{name}.jsonl",), tokenizer="bytes", bad_rows="skip")
        folder = data_dir_for(data)
        prepare(data.source, folder, tokenizer="bytes", bad_rows="skip")
        assert ensure_prepared(data, 64) == folder
        if is_taken:
            assert ensure_prepared(dataclasses.replace(data, bad_rows="error"), 64) == folder
        else:
            with pytest.raises(ConfigError, match='bad_rows: "skip" -> "error"'):
                ensure_prepared(dataclasses.replace(data, bad_rows="error"), 64)


def test_bad_rows_and_parse_special_reach_the_process(book):
    Path("rows.jsonl").write_text(jsonl(["one<|endoftext|>two"] * 3) + "{broken\n")
    folder = ensure_prepared(DataConfig(source=("rows.jsonl",), tokenizer="bytes", val_fraction=0.0, bad_rows="skip",
                                        parse_special=True), 64)
    index = json.loads((folder / "index.json").read_text())
    assert (index["bad_rows"], sum(shard["documents"] for shard in index["shards"])) == (1, 6)


def test_the_tokenizer_left_out_or_named_by_its_file_is_that_of_the_folder(mine, no_process):
    for tokenizer in (None, "mine", "mine/tokenizer.json", "bytes"):
        for source in (mine.source, ()):
            data = DataConfig(source=source, dir="mine", tokenizer=tokenizer)
            assert ensure_prepared(data, 64) == Path("mine")
    with pytest.raises(ConfigError, match='tokenizer: "bytes" -> "gpt2"'):
        ensure_prepared(DataConfig(dir="mine", tokenizer="gpt2"), 64)


def test_documents_end_with_the_end_of_text_that_the_tokenizers_folder_names(book, no_process):
    file = json.loads(train_bpe(["some text"], 258).file_text)
    file["added_tokens"].append(file["added_tokens"][0] | {"id": 258, "content": "<|im_end|>"})
    Path("run").mkdir()
    Path("run", "tokenizer.json").write_text(json.dumps(file))
    Path("run", "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    Path("rows.jsonl").write_text("\n".join(json.dumps({"text": f"some text {i}"}) for i in range(200)))
    prepare(["rows.jsonl"], Path("shards"), tokenizer="run", val_fraction=0.2)
    dataset = open_dataset(Path("shards"))
    stream = open_split(dataset, "train")
    tokens = stream.windows(np.array([0]), stream.tokens)[0]
    assert dataset.index["eot"] == load_tokenizer("shards").eot == tokens[-1] == 258 and 257 not in tokens
    for tokenizer in ("run", "shards"):  # either names what the shards were made with
        ensure_prepared(DataConfig(dir="shards", tokenizer=tokenizer), 64)
    with pytest.raises(ConfigError, match="other settings"):
        Path("run", "tokenizer_config.json").unlink()
        ensure_prepared(DataConfig(source=("rows.jsonl",), val_fraction=0.2, dir="shards", tokenizer="run"), 64)


def test_foreign_shards_need_a_tokenizer_and_other_folders_a_source(book, no_process):
    Path("foreign").mkdir()
    with pytest.raises(ConfigError, match="'foreign' holds neither index.json nor .*set data.source"):
        ensure_prepared(DataConfig(dir="foreign", tokenizer="gpt2"), 64)
    Path("foreign", "fineweb_train_000001.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="'foreign' holds shards without index.json; set data.tokenizer"):
        ensure_prepared(DataConfig(dir="foreign"), 64)
    assert ensure_prepared(DataConfig(dir="foreign", tokenizer="gpt2"), 64) == Path("foreign")
    Path("half").mkdir()
    Path("half", ".progress.json").write_text("{}")
    with pytest.raises(ConfigError, match="'half' is not finished"):
        ensure_prepared(DataConfig(dir="half"), 64)


@pytest.mark.parametrize("template", [b"\xff", b"{% if"], ids=["not UTF-8", "not Jinja"])
def test_a_template_on_stdin_that_is_none_is_one_line(book, template):
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}) + "\n")
    command = [sys.executable, "-m", "data.prepare", "chat.jsonl", "--out=out", "--tokenizer=bytes", "--max-seq-len=9",
               "--chat-template=-"]
    done = subprocess.run(command, input=template, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"error: ")
    assert not Path("out").exists()


def test_a_template_that_renders_nothing_is_one_line_and_leaves_nothing(book):
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}) + "\n")
    with pytest.raises(UserError, match="chat.jsonl' line 1 "):
        prepare(["chat.jsonl"], Path("out"), tokenizer="bytes", max_seq_len=9, chat_template="", val_fraction=0.0)
    assert not Path("out").exists()


def test_rows_prepared_before_there_was_a_choice_are_taken_if_none_was_too_long(book):
    rows = [{"prompt": f"{i}", "response": "yes"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=("rows.jsonl",), tokenizer="bytes", val_fraction=0.2)
    folder = ensure_prepared(data, 64)
    index = json.loads((folder / "index.json").read_text())
    del index["settings"]["too_long"]
    for counts in index["examples"].values():
        del counts["dropped"]
    (folder / "index.json").write_text(json.dumps(index))
    assert ensure_prepared(data, 64) == folder
    index["examples"]["train"]["truncated"] = 1
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r'too_long: null -> "cut"') as refused:
        ensure_prepared(data, 64)
    words = re.search(r"to train on it as it is: data.source=\[\] data.dir=(\S+)$", str(refused.value))
    assert ensure_prepared(DataConfig(source=(), dir=words[1]), 64) == folder  # the advice, followed


def test_chats_of_an_earlier_format_are_taken_and_said_but_not_mixed_with_new_ones(book, capsys):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 20)
    data = DataConfig(source=("chat.jsonl",), tokenizer="bytes", dir="out")
    settings = {"tokenizer": "bytes", "max_seq_len": 64}
    index = prepare(["chat.jsonl"], Path("out"), **settings)
    check_content(Path("out"), data)
    assert "earlier version" not in capsys.readouterr().err
    del index["settings"]["chat_format"]
    Path("out", "index.json").write_text(json.dumps(index))
    for same in (data, DataConfig(dir="out")):
        check_content(ensure_prepared(same, 64), same)
        assert "out was prepared by an earlier version" in capsys.readouterr().err
    prepare(["chat.jsonl"], Path("out"), **settings)  # found done

    with pytest.raises(PreparationStopped):
        prepare(["chat.jsonl"], Path("half"), should_stop=lambda: True, **settings)
    progress = json.loads(Path("half", ".progress.json").read_text())
    del progress["settings"]["chat_format"]
    Path("half", ".progress.json").write_text(json.dumps(progress))
    with pytest.raises(UserError, match="chat_format: null -> 2"):
        prepare(["chat.jsonl"], Path("half"), **settings)


def test_the_way_out_of_a_given_folder_with_another_tokenizer_is_not_what_was_done_already(mine, no_process):
    with pytest.raises(ConfigError, match='"bytes" -> "gpt2".*; leave data.tokenizer out, or name another data.dir$'):
        ensure_prepared(DataConfig(dir="mine", tokenizer="gpt2"), 64)
