"""What the benchmarks share: figures and their ratios, turns, other processes' share of the CPU, processes, texts."""

import argparse
import json
import sys
import weakref

import pytest
import torch

from benchmarks import measure
from config import MachineError, UserError


def test_figures_have_medians_and_spreads_and_ratios_are_paired_by_repeat():
    figures = measure.Figures()
    ours, theirs = iter((1.0, 2.0, 30.0)), iter((2.0, 8.0, 30.0))
    figures.take_turns({"ours": lambda: {"wall s": next(ours), "tokens/s": 1234567.0},
                        "peer": lambda: {"wall s": next(theirs)}}, 3)
    figures.add_ratios("ours / peer", "ours", "peer", "wall s", "tokens/s")
    rows = {(row["subject"], row["quantity"]): row for row in figures.rows()}
    assert rows["ours", "wall s"]["median"] == 2.0 and rows["ours", "wall s"]["repeats"] == 3
    assert rows["ours", "wall s"]["p10"] == pytest.approx(1.2)  # a fifth of the way from the first to the second
    assert rows["ours / peer", "ratio of wall s"]["samples"] == [0.5, 0.25, 1.0]
    assert ("ours / peer", "ratio of tokens/s") not in rows  # the peer has none
    assert figures.table() == "\n".join([
        "median (p10-p90) of 3 repeats",
        "",
        "            wall s                         tokens/s",
        "ours  2 (1.2-24.4)  1,234,567 (1,234,567-1,234,567)",
        "",
        "            wall s",
        "peer  8 (3.2-25.6)",
        "",
        "             ratio of wall s",
        "ours / peer    0.5 (0.3-0.9)"])


def test_contenders_take_turns_and_begin_in_turn(capsys):
    calls, figures = [], measure.Figures()
    figures.take_turns({name: lambda name=name: calls.append(name) or {"s": float(len(calls))} for name in "ab"}, 2)
    assert calls == ["a", "b", "b", "a"]
    assert figures.samples == {"a": {"s": [1.0, 4.0]}, "b": {"s": [2.0, 3.0]}}
    assert capsys.readouterr().err == "a, repeat 1: 1 s\nb, repeat 1: 2 s\nb, repeat 2: 3 s\na, repeat 2: 4 s\n"


def test_a_contender_that_fails_is_left_out_with_its_figures_and_ratios(capsys):
    tensors = []

    def out_of_memory() -> dict[str, float]:
        if len(tensors) == 1:
            held = torch.ones(10)
            tensors.append(weakref.ref(held))
            cycle = [held]
            cycle.append(cycle)
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 12 GiB")
        tensors.append(None)
        return {"s": 1.0}

    def is_free() -> dict[str, float]:
        assert len(tensors) < 2 or tensors[1]() is None, "what the one before held is still held"
        return {"s": 2.0}

    figures = measure.Figures()
    figures.take_turns({"ours": is_free, "peer": out_of_memory}, 4, peers=["peer"])
    figures.add_ratios("ours / peer", "ours", "peer", "s")
    assert len(tensors) == 2  # it is not asked again
    assert figures.samples == {"ours": {"s": [2.0] * 4}}
    assert figures.left_out == {"peer": "OutOfMemoryError: CUDA out of memory."} and figures.failed == []
    assert "peer left out: OutOfMemoryError: CUDA out of memory.\n" in capsys.readouterr().err
    figures.take_turns({"ours": lambda: 1 / 0}, 1)
    assert figures.failed == ["ours"] and figures.samples == {}


def test_the_reason_of_a_process_that_failed_is_kept_to_its_end():
    def fail() -> dict[str, float]:
        raise MachineError("python -c " + "--option=1 " * 100 + "failed: ValueError: no luck")

    figures = measure.Figures()
    figures.take_turns({"peer": fail}, 1, peers=["peer"])
    assert figures.left_out["peer"].endswith("failed: ValueError: no luck")


def test_a_users_mistake_ends_the_turns():
    def refuse() -> dict[str, float]:
        raise UserError("name another")

    with pytest.raises(UserError, match="name another"):
        measure.Figures().take_turns({"ours": refuse}, 1)


@pytest.mark.parametrize("all_fail", [False, True])
def test_what_was_measured_is_reported_before_our_own_failure(all_fail, tmp_path, monkeypatch, capsys):
    def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
        figures.take_turns({"ours": lambda: 1 / 0, "peer": (lambda: {}[0]) if all_fail else (lambda: {"s": 1.0})}, 1,
                           peers=["peer"])
        return {"device": "cpu"}

    monkeypatch.setattr(measure, "WATCHED_S", 0.0)
    args = argparse.Namespace(json=str(tmp_path / "result.json"), run=run)
    with pytest.raises(MachineError, match="^ours failed: ZeroDivisionError: division by zero$"):
        measure.report(["train"], args)
    content, out = json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out
    reasons = {"ours": "ZeroDivisionError: division by zero"} | ({"peer": "KeyError: 0"} if all_fail else {})
    assert content["setting"]["left out"] == reasons and content["setting"]["device"] == "cpu"
    assert [row["subject"] for row in content["figures"]] == ([] if all_fail else ["peer"])
    assert "left out: ours: ZeroDivisionError: division by zero\n" in out
    assert ("nothing was measured" in out) is all_fail


def test_json_that_could_not_be_written_is_refused_before_anything_is_measured(tmp_path):
    args = argparse.Namespace(json=str(tmp_path), run=lambda args, figures: pytest.fail("it measured"))
    with pytest.raises(UserError, match=f"--json '{tmp_path}' is no regular file; name another"):
        measure.report(["train"], args)


def test_cpu_time_of_others_is_what_is_busy_and_not_ours(monkeypatch, capsys):
    snapshots = iter([(50.0, 1000.0), (56.0, 1020.0), (0.0, 0.0), (0.0, 0.0)])  # busy for others, in all; not known
    monkeypatch.setattr(measure, "cpu_seconds", lambda: next(snapshots))
    setting = {}
    for when in ("before", "during"):
        with measure.others_watched(setting, when):
            pass
    assert setting == {"others' CPU % before": 30.0, "others' CPU % during": None}
    assert capsys.readouterr().err == ("warning: other processes took 30 % of the CPU before the measurements; do not "
                                       "trust figures taken now\n")


def test_the_peak_memory_of_a_process_is_its_own(tmp_path):
    done = measure.run_to_end(sys.executable, "-c", "print('done')", cwd=tmp_path)
    assert done.output == "done\n" and done.seconds > 0
    assert done.peak_bytes < 100 * 2 ** 20  # this process, with torch in it, has more


def test_a_process_that_fails_is_reported_with_its_last_line(tmp_path):
    with pytest.raises(MachineError, match="failed: ValueError: no luck"):
        measure.run_to_end(sys.executable, "-c", "raise ValueError('no luck')", cwd=tmp_path)
    with measure.Worker("raise ValueError('no luck')", cwd=tmp_path) as worker:
        with pytest.raises(MachineError, match="ended early: ValueError: no luck"):
            worker.receive()


def test_a_request_to_a_process_that_died_is_reported_each_time(tmp_path):
    with measure.Worker("serve(lambda: 1 / 0)", cwd=tmp_path) as worker:
        worker.receive()
        for _ in range(3):
            with pytest.raises(MachineError, match="ended early: ZeroDivisionError: division by zero"):
                measure.ask(worker)
            worker.wait()


def test_documents_are_read_up_to_a_limit(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert measure.read_documents(str(tmp_path / "rows.jsonl"), limit_bytes=5) == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        measure.read_documents(str(tmp_path / "rows.jsonl"), limit_bytes=5)
