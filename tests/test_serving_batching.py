"""batching.py: rows that join and leave a batch get the tokens they get alone; logprobs, stops, limits, the thread."""

import collections
import importlib.util
import json
import math
import queue
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

import sample
from data.tokenizer import load_tokenizer
from kernels.cpu import pack_for_decoding
from model import GPT
from sample import Sampling
from serving import batching
from serving.batching import Batch, Batcher, Closed, Part, QueueFull, Row, Scored
from tests.test_sample import make_model

BYTES = load_tokenizer("bytes")
EOT = BYTES.eot
GREEDY = Sampling(temperature=0.0)
END = frozenset({EOT})


def row(prompt: list[int], max_new_tokens: int, **settings) -> Row:
    return Row(prompt, max_new_tokens, print, **{"sampling": GREEDY} | settings)


def logits_of(model: GPT, tokens: list[int]) -> torch.Tensor:
    """(T, V) float64, without cache or batch."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0].double()


def run(batch: Batch, rows: list[Row], pick: random.Random | None = None) -> dict[Row, list[Part]]:
    """Each row's parts; with pick, rows join a few at a time between steps, as slots come free."""
    parts = collections.defaultdict(list)
    waiting = list(rows)
    while waiting or batch.running:
        count = min(len(waiting), batch.max_rows - len(batch.running), pick.randint(0, 3) if pick else len(waiting))
        made = batch.join([waiting.pop(0) for _ in range(count)]) if count else []
        for one, part in made + (batch.step() if batch.running else []):
            parts[one].append(part)
    return parts


def tokens_of(parts: list[Part]) -> list[int]:
    return [scored.token for part in parts for scored in part.tokens]


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


# ---- Tokens ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(40))
def test_rows_that_join_and_leave_get_the_tokens_they_get_alone(seed):
    pick = random.Random(seed)
    max_seq_len = pick.choice((1, 2, 7, 16, 24, 40))
    model = make_model(
        seed, max_seq_len=max_seq_len, vocab_size=pick.choice((257, 1030)), norm=pick.choice(("layernorm", "rmsnorm")),
        position=pick.choice(("learned", "rope")), mlp=pick.choice(("gelu", "swiglu")), qk_norm=pick.random() < 0.5,
        n_kv_head=pick.choice((None, 1, 2)), window=pick.choice((None, None, 5)), tie_embeddings=pick.random() < 0.5)
    samplings = [GREEDY, Sampling(seed=seed), Sampling(0.7, top_k=9, top_p=0.9, min_p=0.02, seed=5)]
    rows = []
    for number in range(12):
        prompt = [pick.randrange(257) for _ in range(pick.randint(1, max_seq_len))]
        rows.append(row(prompt, pick.randint(1, max_seq_len - len(prompt) + 1), sampling=pick.choice(samplings),
                        number=number))
    parts = run(Batch(model, BYTES, max_rows=4), rows, pick)
    for one in rows:
        context, generator = list(one.prompt), sample.row_generator(one.sampling.seed, one.number)
        for _ in range(one.max_new_tokens):
            context += sample.pick(logits_of(model, context)[-1:].float(), one.sampling, [generator]).tolist()
        assert one.prompt + tokens_of(parts[one]) == context, (len(one.prompt), one.max_new_tokens)
        assert [part.finish for part in parts[one]] == [None] * (one.max_new_tokens - 1) + ["length"]


def test_packed_weights_and_unequal_settings_change_no_greedy_tokens():
    model = make_model(position="rope")
    rows = [row([65] * n, 9) for n in (1, 5, 20)] + [row([66], 9, sampling=Sampling(seed=1), top_logprobs=3)]
    alone = [tokens_of(run(Batch(model, BYTES, max_rows=1), [one])[one]) for one in rows]
    pack_for_decoding(model)
    parts = run(Batch(model, BYTES, max_rows=4), rows)
    assert [tokens_of(parts[one]) for one in rows] == alone


def test_logprobs_are_those_of_the_model_before_any_setting():
    model = make_model()
    settings = {"sampling": Sampling(0.5, top_k=20, seed=3), "presence_penalty": 1.5, "logit_bias": {70: 5.0}}
    one = row([5, 6, 250, 7, 8], 6, scores_prompt=True, top_logprobs=4, **settings)
    other = row([9], 6, scores_prompt=True, top_logprobs=0)
    parts = run(Batch(model, BYTES, max_rows=2), [one, other])
    for asked, k in ((one, 4), (other, 0)):
        scored = [*parts[asked][0].prompt, *(s for part in parts[asked] for s in part.tokens)]
        tokens = [s.token for s in scored]
        assert tokens[:len(asked.prompt)] == asked.prompt and len(tokens) == len(asked.prompt) + 6
        assert scored[0] == Scored(tokens[0], 0)  # nothing precedes it
        expected = logits_of(model, tokens).log_softmax(dim=-1)
        for place in range(1, len(tokens)):
            assert scored[place].logprob == pytest.approx(expected[place - 1, tokens[place]].item(), abs=1e-5)
            values, ids = expected[place - 1].topk(max(k, 1))
            assert [token for token, _ in scored[place].top] == ids.tolist()[:k]
            assert [p for _, p in scored[place].top] == pytest.approx(values.tolist()[:k], abs=1e-5)


def test_a_long_prompt_is_scored_piece_by_piece(monkeypatch):
    model = make_model()
    one = row(list(range(30)), 0, scores_prompt=True, top_logprobs=1)
    whole = run(Batch(model, BYTES, max_rows=1), [one])[one][0].prompt
    monkeypatch.setattr("serving.batching.SCORED_LOGITS", 7 * 257)
    pieces = run(Batch(model, BYTES, max_rows=1), [one])[one][0].prompt
    assert [s.token for s in pieces] == [s.token for s in whole] and len(whole) == 30
    assert [s.logprob for s in pieces[1:]] == pytest.approx([s.logprob for s in whole[1:]], abs=1e-5)


def test_a_prompt_that_is_only_scored_ends_at_once_and_takes_no_slot():
    batch = Batch(make_model(), BYTES, max_rows=1)
    scored, longer = row([1, 2], 0, scores_prompt=True, top_logprobs=1), row([3], 0)
    parts = batch.join([scored, longer])
    told = [(one, part.finish, len(part.prompt)) for one, part in parts]
    assert told == [(scored, "length", 2), (longer, "length", 0)]
    assert batch.running == []


def test_penalties_and_biases_are_added_to_the_logits():
    model = make_model()
    bias = {57: 0.1, 151: -0.2}
    one = row([1, 2, 3], 25, presence_penalty=0.02, frequency_penalty=0.01, logit_bias=bias)
    batch = Batch(model, BYTES, max_rows=2)
    made = tokens_of(run(batch, [one, row([4], 25)])[one])
    context, counts = [1, 2, 3], torch.zeros(257, dtype=torch.float64)
    for token in made:
        logits = logits_of(model, context)[-1] - 0.02 * (counts > 0) - 0.01 * counts
        for biased, value in bias.items():
            logits[biased] += value
        assert token == logits.argmax().item()
        counts[token] += 1
        context.append(token)
    plain = tokens_of(run(batch, [unchanged := row([1, 2, 3], 25)])[unchanged])
    assert plain != made and counts.max() > 1


# ---- Text ------------------------------------------------------------------------------------------------------------

def scripted(monkeypatch, tokens: list[int]) -> None:
    """Let the model choose these tokens, one after the other."""
    script = iter(tokens)
    monkeypatch.setattr(sample, "pick", lambda logits, *rest: torch.tensor([next(script)] * len(logits)))


def parts_of(monkeypatch, tokens: list[int], **settings) -> list[Part]:
    scripted(monkeypatch, tokens)
    one = row([65], len(tokens), **{"stop_tokens": END} | settings)
    return run(Batch(make_model(), BYTES, max_rows=1), [one])[one]


def test_a_token_is_told_with_the_text_in_which_it_begins(monkeypatch):
    parts = parts_of(monkeypatch, [97, *"é".encode(), 98, 0xE2])
    assert [(p.text, [(s.token, s.offset) for s in p.tokens], p.made, p.finish) for p in parts] == [
        ("a", [(97, 0)], 1, None), ("", [], 2, None), ("é", [(0xC3, 1), (0xA9, 1)], 3, None), ("b", [(98, 2)], 4, None),
        ("\ufffd", [(0xE2, 3)], 5, "length")]


def test_tokens_of_a_stop_text_are_left_out_and_counted(monkeypatch):
    parts = parts_of(monkeypatch, [97, *b"ENDx"], stop=("END",))
    assert text_of(parts) == "a" and tokens_of(parts) == [97]
    assert (parts[-1].finish, parts[-1].made) == ("stop", 4)


def test_text_held_for_a_stop_that_does_not_come_is_told_with_its_tokens(monkeypatch):
    parts = parts_of(monkeypatch, [*b"ENx"], stop=("END",))
    assert [(p.text, [s.token for s in p.tokens]) for p in parts] == [("", []), ("", []), ("ENx", [*b"ENx"])]


def test_end_of_text_ends_a_text_and_is_told(monkeypatch):
    parts = parts_of(monkeypatch, [97, EOT, 98])
    assert text_of(parts) == "a" and tokens_of(parts) == [97, EOT]
    assert (parts[-1].finish, parts[-1].made) == ("stop", 2)


def test_only_the_tokens_that_a_row_names_end_it(monkeypatch):
    parts = parts_of(monkeypatch, [EOT, 98, 97], stop_tokens=frozenset({98}))
    assert tokens_of(parts) == [EOT, 98] and parts[-1].finish == "stop"


def test_a_row_past_its_deadline_ends_as_at_its_length():
    parts = run(Batch(make_model(), BYTES, max_rows=1), [one := row([1], 30, deadline=time.monotonic())])[one]
    assert [(part.made, part.finish) for part in parts] == [(1, "length")]


def test_logits_that_are_not_finite_fail_their_row_alone(monkeypatch):
    model = make_model(tie_embeddings=False)
    logits = model.logits
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    sick, well, later = row([1, 7], 5), row([1, 2], 5), row([3], 5)
    batch = Batch(model, BYTES, max_rows=2)
    batch._cache._buffers[0].fill_(math.nan)  # what memory may hold
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden.nan_to_num()))  # it fails at its second token
    first = dict(batch.join([sick, well]))
    monkeypatch.undo()
    parts = dict(batch.step())
    assert parts[sick].finish == "error" and "not finite" in parts[sick].error
    rest = run(batch, [later])  # takes the place of the sick one
    for one, told in ((well, [first[well], parts[well], *rest[well]]), (later, rest[later])):
        assert tokens_of(told) == tokens_of(run(Batch(model, BYTES, max_rows=1), [one])[one])


def fail_in(monkeypatch, what: str, sick: Row) -> None:
    """One row fails from its third token on: in adjusting its logits, drawing, scoring, or turning tokens into text."""
    calls = iter([False, False])
    if what == "drawing":
        pick, its = sample.pick, sample.row_generator(sick.sampling.seed, sick.number).initial_seed()
        def failing(logits, sampling, generators):
            tokens = pick(logits, sampling, generators)
            if its in [generator.initial_seed() for generator in generators] and next(calls, True):
                raise RuntimeError("broken")
            return tokens
        monkeypatch.setattr(sample, "pick", failing)
    else:
        name = {"adjusting": "adjust", "text": "add"}[what]
        method = getattr(batching._Running, name)
        def failing(one, *arguments):
            if one.row is sick and next(calls, True):
                raise RuntimeError("broken")
            return method(one, *arguments)
        monkeypatch.setattr(batching._Running, name, failing)


@pytest.mark.parametrize("what", ["drawing", "adjusting", "text"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_p=0.9)], ids=["greedy", "drawn"])
def test_a_row_that_fails_ends_alone_and_the_others_get_their_tokens(monkeypatch, capsys, what, sampling):
    model = make_model()
    rows = [row([number + 1], 9, sampling=replace(sampling, seed=number), logit_bias={9: 1.0 + number},
                top_logprobs=number % 3) for number in range(8)]
    alone = [run(Batch(model, BYTES, max_rows=1), [one])[one] for one in rows]
    fail_in(monkeypatch, what, sick := rows[3])
    batch = Batch(model, BYTES, max_rows=8)
    parts = run(batch, rows)
    assert parts[sick][-1].finish == "error" and "RuntimeError" in parts[sick][-1].error
    assert tokens_of(parts[sick]) == tokens_of(alone[3])[:2] and batch.running == []
    for one, expected in zip(rows, alone, strict=True):
        if one is not sick:
            assert tokens_of(parts[one]) == tokens_of(expected) and parts[one][-1].finish == "length"
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_prompts_that_cannot_be_read_or_scored_fail_alone(capsys):
    model = make_model(tie_embeddings=False)
    with torch.no_grad():
        model.wte.weight[7] = math.nan
    rows = [row([1, 2], 4), row([3, 257], 4), row([1, 7, 2], 0, scores_prompt=True), row([4], 4, stop=("",)),
            row([5, 6], 4, scores_prompt=True, top_logprobs=1)]
    parts = run(Batch(model, BYTES, max_rows=8), rows)
    assert [parts[one][-1].finish for one in rows] == ["length", "error", "error", "error", "length"]
    assert "not finite" in parts[rows[2]][-1].error
    for one in (rows[0], rows[4]):
        assert tokens_of(parts[one]) == tokens_of(run(Batch(model, BYTES, max_rows=1), [one])[one])
    assert "IndexError" in parts[rows[1]][-1].error and "Traceback" in capsys.readouterr().err


def test_extreme_settings_are_those_of_float64_and_change_no_other_row():
    model = make_model()
    tiny = [Sampling(temperature=t, seed=3) for t in (1e-10, 1e-46, 5e-324)]
    greedy = [*tiny, Sampling(top_p=1e-46), Sampling(top_p=0.0), Sampling(min_p=1.0), Sampling(1e300, top_k=1), GREEDY]
    rows = [row([5, 6], 12, sampling=sampling) for sampling in greedy]
    forced = [row([5, 6], 12, sampling=sampling, logit_bias={70: 100.0}, presence_penalty=-2.0)
              for sampling in (Sampling(), *tiny)]
    others = [row([8], 12, sampling=Sampling(min_p=5e-324, seed=1)), row([8], 12, repetition_penalty=100.0),
              row([8], 12, sampling=Sampling(1e300), repetition_penalty=0.01, frequency_penalty=2.0)]
    parts = run(Batch(model, BYTES, max_rows=16), [*rows, *forced, *others])
    context = [5, 6]
    for _ in range(12):
        context.append(logits_of(model, context)[-1].argmax().item())
    assert all(tokens_of(parts[one]) == context[2:] for one in rows)
    assert all(tokens_of(parts[one]) == [70] * 12 for one in forced)
    for one in others:
        assert tokens_of(parts[one]) == tokens_of(run(Batch(model, BYTES, max_rows=1), [one])[one])


REPETITION = """
import json, sys
import torch
from transformers import RepetitionPenaltyLogitsProcessor
for case in json.load(sys.stdin):
    processor = RepetitionPenaltyLogitsProcessor(penalty=case["penalty"])
    print(json.dumps(processor(torch.tensor([case["tokens"]]), torch.tensor([case["logits"]]))[0].tolist()))
"""


def test_the_repetition_penalty_is_that_of_transformers(tmp_path):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: the repetition penalty is unchecked against its")
    model, cases, ours = make_model(), [], []
    for penalty in (0.5, 1.1, 1.3, 30.0):
        one = row([1, 2, 2, 250], 20, repetition_penalty=penalty)
        made = tokens_of(run(Batch(model, BYTES, max_rows=2), [one, row([4], 20)])[one])
        for step in range(20):
            tokens = one.prompt + made[:step]
            cases.append({"penalty": penalty, "tokens": tokens, "logits": logits_of(model, tokens)[-1].tolist()})
            ours.append(made[step])
    done = subprocess.run([sys.executable, "-I", "-c", REPETITION], cwd=tmp_path, input=json.dumps(cases), text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = [torch.tensor(json.loads(line)).argmax().item() for line in done.stdout.splitlines()]
    assert theirs == ours and len(set(ours)) > 10


def test_the_cache_drops_slots_that_no_row_uses():
    batch = Batch(make_model(max_seq_len=64), BYTES, max_rows=2)
    batch.join([row([1] * 40, 2), row([2], 20)])
    batch.step()  # ends the long one
    assert batch._cache.length == 41 and len(batch.running) == 1
    batch.step()
    assert batch._cache.length == 3


# ---- The thread ------------------------------------------------------------------------------------------------------

class Server:
    """A Batcher over a small model, and what it delivered."""

    def __init__(self, **settings):
        self.batch = Batch(make_model(max_seq_len=settings.pop("max_seq_len", 32), position="rope"), BYTES,
                           max_rows=settings.pop("max_rows", 2))
        self.inbox: queue.Queue = queue.Queue()
        self.batcher = Batcher(self.batch, lambda parts: [self.inbox.put(one) for one in parts],
                               **{"max_waiting": 8} | settings)

    def ends(self, count: int) -> dict[Row, Part]:
        """The last parts of the next rows to end."""
        ended: dict[Row, Part] = {}
        while len(ended) < count:
            one, part = self.inbox.get(timeout=20)
            if part.finish is not None:
                ended[one] = part
        return ended


@pytest.fixture
def serving():
    servers = []

    def start(**settings) -> Server:
        servers.append(Server(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.batcher.close(0.0)
        server.batcher.join()


def paused(server: Server, monkeypatch) -> threading.Event:
    """Steps of the batch wait for this event."""
    gate, step = threading.Event(), server.batch.step
    monkeypatch.setattr(server.batch, "step", lambda: (gate.wait(20), step())[1])
    return gate


def test_rows_that_wait_together_run_together(serving, monkeypatch):
    server = serving(max_rows=3)
    sizes, step = [], server.batch.step
    monkeypatch.setattr(server.batch, "step", lambda: (sizes.append(len(server.batch.running)), step())[1])
    server.batcher.submit([row([n], 10) for n in range(3)])
    assert {part.finish for part in server.ends(3).values()} == {"length"}
    assert sizes == [3] * 9  # the first token comes from the prompt


def test_more_rows_than_slots_are_all_served(serving):
    server = serving(max_rows=2)
    server.batcher.submit([row([n], n) for n in range(1, 9)])
    assert {one.max_new_tokens: part.made for one, part in server.ends(8).items()} == {n: n for n in range(1, 9)}


def test_a_full_queue_refuses_a_request_as_a_whole(serving, monkeypatch):
    server = serving(max_rows=1, max_waiting=3)
    gate = paused(server, monkeypatch)
    server.batcher.submit([row([1], 5)])
    while not server.batch.running:
        time.sleep(0.001)
    server.batcher.submit([row([2], 5), row([3], 5)])
    with pytest.raises(QueueFull):
        server.batcher.submit([row([4], 5), row([5], 5)])
    assert len(server.batcher.waiting) == 2
    gate.set()
    assert sorted(one.prompt[0] for one in server.ends(3)) == [1, 2, 3]


def test_a_cancelled_row_frees_its_slot(serving, monkeypatch):
    server = serving(max_rows=1)
    gate = paused(server, monkeypatch)
    endless, waiting, kept = row([1], 31), row([2], 31), row([3], 2)
    server.batcher.submit([endless])
    server.batcher.submit([waiting])
    server.batcher.submit([kept])
    while not server.batch.running:
        time.sleep(0.001)
    server.batcher.cancel([endless, waiting])
    gate.set()
    ended = server.ends(3)
    assert ended[endless].made < 4 and ended[waiting].finish == "dropped" and ended[kept].finish == "length"


def test_a_row_cancelled_just_before_it_joins_is_cancelled(serving, monkeypatch):
    arriving = Batcher._arriving

    def cancel_what_arrives(batcher: Batcher) -> list[Row] | None:
        rows = arriving(batcher)
        batcher.cancel(rows or [])
        return rows

    monkeypatch.setattr(Batcher, "_arriving", cancel_what_arrives)
    server = serving(max_rows=1)
    server.batcher.submit([one := row([1], 31)])
    assert server.ends(1)[one].made < 4


def test_a_row_that_waited_past_its_deadline_is_dropped(serving, monkeypatch):
    server = serving(max_rows=1)
    gate = paused(server, monkeypatch)
    late = row([2], 5, deadline=time.monotonic() + 0.05)
    server.batcher.submit([row([1], 3)])
    server.batcher.submit([late])
    time.sleep(0.1)
    gate.set()
    dropped = server.ends(2)[late]
    assert dropped.finish == "dropped" and "waited for too long" in dropped.error


def test_closing_lets_running_rows_end_and_drops_those_that_wait(serving, monkeypatch):
    server = serving(max_rows=1)
    gate = paused(server, monkeypatch)
    running, waiting = row([1], 10), row([2], 10)
    server.batcher.submit([running])
    server.batcher.submit([waiting])
    while not server.batch.running:
        time.sleep(0.001)
    server.batcher.close(20.0)
    with pytest.raises(Closed):
        server.batcher.submit([row([3], 1)])
    gate.set()
    ended = server.ends(2)
    assert ended[running].made == 10 and ended[waiting].finish == "dropped"
    assert "shutting down" in ended[waiting].error
    server.batcher.join()


def test_what_runs_beyond_the_grace_ends_there(serving):
    server = serving(max_seq_len=100_000)
    server.batcher.submit([one := row([1], 99_000)])
    server.inbox.get(timeout=20)
    server.batcher.close(0.1)
    ended = server.ends(1)[one]
    assert ended.finish == "length" and ended.made < 99_000
    server.batcher.join()


def test_a_step_that_fails_ends_its_rows_and_the_next_request_is_served(serving, monkeypatch, capsys):
    server = serving()
    step = server.batch.step
    failures = iter([RuntimeError("out of memory")])
    def fail_once():
        for error in failures:
            raise error
        return step()
    monkeypatch.setattr(server.batch, "step", fail_once)
    server.batcher.submit([row([1], 1), row([2], 5)])
    ended = server.ends(2)
    assert sorted(part.finish for part in ended.values()) == ["error", "length"]
    assert "the model failed (RuntimeError)" in [part.error for part in ended.values()]
    server.batcher.submit([row([1], 5)])
    assert [part.made for part in server.ends(1).values()] == [5]
    assert "out of memory" in capsys.readouterr().err
