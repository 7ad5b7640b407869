"""The order of the data against plain Python, and batches against slices of the tokens."""

import hashlib
import itertools
import math
import threading
import time

import numpy as np
import pytest
import torch

from data.loader import TrainLoader, ValLoader, epoch_key, permuted
from data.shards import ShardError, TokenStream, read_header
from tests.test_data_shards import write_shard

T = 15  # odd on purpose


def make_stream(folder, tokens: np.ndarray) -> TokenStream:
    """Two shards of unequal size, so that windows straddle them."""
    cut = len(tokens) // 3
    paths = [folder / "train_00000.bin", folder / "train_00001.bin"]
    for path, part in zip(paths, (tokens[:cut], tokens[cut:]), strict=True):
        write_shard(path, part)
    return TokenStream([read_header(path) for path in paths], "train split of 'shards'")


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, 100 * T + 7)  # 100 windows and a tail


@pytest.fixture
def stream(tmp_path, tokens) -> TokenStream:
    return make_stream(tmp_path, tokens)


def make_loader(stream, *, windows_per_step=8, micro_batch=3, seed=1337, **options) -> TrainLoader:
    return TrainLoader(stream, seq_len=T, tokens_per_step=windows_per_step * T, micro_batch=micro_batch, seed=seed,
                       **options)


def same(left, right) -> bool:
    """Whether two lists of micro-batches are equal in every field."""
    return len(left) == len(right) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.first_window == b.first_window
        and (a.document_ids is None) == (b.document_ids is None)
        and (a.document_ids is None or torch.equal(a.document_ids, b.document_ids))
        for a, b in zip(left, right, strict=True))


# ---- The permutation -------------------------------------------------------------------------------------------------

def permuted_by_plain_python(index: int, size: int, key: int) -> int:
    """The same network written with Python's integers, which cannot overflow."""
    mask = 2**64 - 1
    width = math.ceil(math.sqrt(size))
    height = math.ceil(size / width)
    digest = hashlib.blake2b(str(key).encode(), digest_size=64).digest()

    def mix(number: int, round_number: int) -> int:
        round_key = int.from_bytes(digest[8 * round_number:8 * round_number + 8], "little")
        z = (number * 0x9E3779B97F4A7C15 + round_key) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z >> 1

    while True:
        left, right = divmod(index, width)
        for number in range(8):
            if number % 2 == 0:
                left = (left + mix(right, number)) % height
            else:
                right = (right + mix(left, number)) % width
        index = left * width + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 63, 64, 65, 1000, 10_007])
def test_it_is_a_permutation(size):
    for key in range(20):
        assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 10, 1009, 10**6, 2**31 + 11, 10**12])
def test_it_equals_plain_python(size):
    random = np.random.default_rng(size)
    index = random.integers(0, size, 40)
    key = int(random.integers(0, 2**63))
    assert permuted(index, size, key).tolist() == [permuted_by_plain_python(int(i), size, key) for i in index]


def test_the_order_of_the_data_is_the_one_of_the_first_release():
    order = permuted(np.arange(10), 1_000_000, epoch_key(1337, 0))
    assert order.tolist() == [882567, 824579, 224728, 658438, 695068, 701201, 973967, 289689, 781394, 680603]


def test_a_number_gives_a_number_and_an_array_its_shape():
    index = np.array([[0, 1, 2], [3, 4, 5]])
    result = permuted(index, 100, 7)
    assert result.shape == (2, 3) and result.dtype == np.int64
    assert [permuted(i, 100, 7) for i in range(6)] == result.reshape(-1).tolist()
    assert type(permuted(3, 100, 7)) is int


def test_all_places_are_equally_likely_over_keys():
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permuted(np.arange(size), size, key)] += 1
    chi_squared = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert 40 < chi_squared < 140  # 81 degrees of freedom: 81 +- 12.7, this is beyond 3 and 4.6 deviations


def test_neighbours_do_not_stay_together():
    size = 100_000
    order = permuted(np.arange(size), size, 1).astype(float)
    correlations = [np.corrcoef(order[:-lag], order[lag:])[0, 1] for lag in (1, 2, 316, 317)]  # 317 is the width
    assert max(abs(c) for c in correlations) < 0.015  # 1/sqrt(size) = 0.003, times five
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.015


# ---- The order of windows --------------------------------------------------------------------------------------------

def test_each_epoch_has_every_window_once_in_an_order_of_its_own(stream):
    loader = make_loader(stream)
    order = np.concatenate([loader.window_ids(step) for step in range(25)])  # 200 windows: two epochs of 100
    epochs = order.reshape(2, 100)
    assert loader.windows_per_epoch == 100
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(100))] * 2
    assert (epochs[0] != epochs[1]).mean() > 0.9


def test_a_step_can_hold_several_epochs(tmp_path, tokens):
    loader = make_loader(make_stream(tmp_path, tokens[:3 * T + 1]), windows_per_step=8)
    order = np.concatenate([loader.window_ids(step) for step in range(3)])
    assert [sorted(epoch) for epoch in order.reshape(8, 3).tolist()] == [[0, 1, 2]] * 8


def test_another_seed_gives_another_order_and_the_same_seed_the_same(stream):
    ids = [make_loader(stream, seed=seed).window_ids(3).tolist() for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_ranks_and_micro_batches_together_are_the_batch_in_order(stream, tokens, world_size, micro_batch):
    for step in (0, 12, 13):  # step 12 straddles two epochs
        ids = make_loader(stream).window_ids(step)
        expected = np.stack([tokens[i * T:i * T + T + 1] for i in ids])
        batches = [make_loader(stream, rank=rank, world_size=world_size, micro_batch=micro_batch).batch(step)
                   for rank in range(world_size)]
        micro_batches = list(itertools.chain(*batches))
        np.testing.assert_array_equal(torch.cat([m.tokens for m in micro_batches]).numpy(), expected[:, :-1])
        np.testing.assert_array_equal(torch.cat([m.targets for m in micro_batches]).numpy(), expected[:, 1:])
        sizes = [len(m.tokens) for m in batches[0]]
        assert sum(sizes) == 8 // world_size and all(size == micro_batch for size in sizes[:-1])


def test_first_window_is_the_place_in_the_order_of_the_run(stream):
    places = [m.first_window for step in (5, 6) for rank in (0, 1)
              for m in make_loader(stream, rank=rank, world_size=2, micro_batch=3).batch(step)]
    assert places == [40, 43, 44, 47, 48, 51, 52, 55]  # 8 windows a step, 4 a rank, micro-batches of 3 and 1


def test_batches_land_on_the_device_that_was_asked_for(stream):
    # "meta" stands for MPS: a device that is neither the CPU nor CUDA
    train = TrainLoader(stream, seq_len=16, tokens_per_step=64, micro_batch=2, seed=0, device="meta", eot=0)
    val = ValLoader(stream, seq_len=16, eval_tokens=64, micro_batch=2, device="meta", eot=0)
    for batch in (train.batch(0)[0], next(train.batches(0, 1))[0], next(val.micro_batches())):
        assert {t.device.type for t in (batch.tokens, batch.targets, batch.document_ids)} == {"meta"}


def test_an_id_that_the_tokenizer_does_not_know_is_named_before_the_first_step(tmp_path, tokens):
    tokens[500:502] = 2000  # in the windows 33 and 34
    stream = make_stream(tmp_path, tokens)
    unknown = "train split of 'shards' holds token 2000 but the tokenizer has 1999 ids; .*name it in data.tokenizer"
    for vocab_size, eval_tokens in ((1999, 33 * T), (2001, 10**6)):
        ValLoader(stream, seq_len=T, eval_tokens=eval_tokens, micro_batch=2, vocab_size=vocab_size)
    with pytest.raises(ShardError, match=unknown):
        ValLoader(stream, seq_len=T, eval_tokens=34 * T, micro_batch=2, vocab_size=1999)
    with pytest.raises(ShardError, match=unknown):
        make_loader(stream, windows_per_step=100, vocab_size=1999)
    make_loader(stream, windows_per_step=100, vocab_size=2001)


def test_an_id_that_the_tokenizer_does_not_know_is_named_when_it_is_met(tmp_path, tokens):
    tokens[500] = 2000
    loader = make_loader(make_stream(tmp_path, tokens), vocab_size=1999)
    assert 33 not in loader.window_ids(0)
    met = next(step for step in range(13) if 33 in loader.window_ids(step))
    batches = loader.batches(met - 1, 13)
    next(batches)
    with pytest.raises(ShardError, match="holds token 2000"):
        next(batches)


def test_tensors_are_contiguous_and_int64(stream):
    batch = make_loader(stream, eot=3).batch(0)[0]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.document_ids.dtype == torch.int32
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous() and batch.document_ids.is_contiguous()
    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (3, T)


def test_a_document_opens_with_end_of_text_as_a_prompt_does_and_ends_in_it_as_a_target(tmp_path):
    """No token is predicted from another document, and what sampling begins with (end-of-text at position 0) is met."""
    eot = 9
    tokens = np.random.default_rng(5).choice([1, 2, 3, 9], 40 * T + 1)
    loader = make_loader(make_stream(tmp_path, tokens), eot=eot)
    for micro_batch in loader.batch(2):
        for row, targets, ids in zip(*(t.tolist() for t in (micro_batch.tokens, micro_batch.targets,
                                                            micro_batch.document_ids)), strict=True):
            documents = [[i for i in range(T) if ids[i] == number] for number in sorted(set(ids))]
            assert [i for document in documents for i in document] == list(range(T))
            assert all(row[document[0]] == eot for document in documents[1:])
            assert all(row[i] != eot for document in documents for i in document[1:])
            assert all(targets[document[-1]] == eot for document in documents[:-1])


def test_no_document_numbers_are_made_unless_wanted(stream):
    assert make_loader(stream).batch(0)[0].document_ids is None


def test_a_far_step_is_as_quick_as_the_first(stream):
    loader = make_loader(stream, windows_per_step=32, micro_batch=32)
    seconds = []
    for step in range(10**6, 10**6 + 20):
        started = time.perf_counter()
        loader.batch(step)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1e-3  # 0.08 ms when the machine is idle


# ---- Errors ----------------------------------------------------------------------------------------------------------

def test_a_split_without_one_full_window_is_an_error_with_the_way_out(tmp_path):
    for count in (0, T):
        (tmp_path / str(count)).mkdir()
        short = make_stream(tmp_path / str(count), np.zeros(count, dtype=np.int64))
        for kind in (lambda: make_loader(short),  # noqa: B023
                     lambda: ValLoader(short, seq_len=T, eval_tokens=100, micro_batch=1)):  # noqa: B023
            with pytest.raises(ShardError, match=f"'shards' holds {count} tokens.* needs 16; lower model.max_seq_len"):
                kind()


def test_one_token_more_than_seq_len_is_one_window(tmp_path):
    loader = make_loader(make_stream(tmp_path, np.arange(T + 1)), windows_per_step=1)
    assert loader.windows_per_epoch == 1
    assert loader.batch(0)[0].targets.tolist() == [list(range(1, T + 1))]


# ---- The thread ------------------------------------------------------------------------------------------------------

def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_prepared_ahead_are_the_batches_asked_for_one_by_one(stream):
    loader = make_loader(stream, eot=3)
    ahead = list(loader.batches(4, 20))
    assert len(ahead) == 16
    assert all(same(batch, loader.batch(step)) for step, batch in zip(range(4, 20), ahead, strict=True))
    assert loader_threads() == []


def test_an_empty_range_of_steps_gives_no_batches(stream):
    assert list(make_loader(stream).batches(5, 5)) == []


def test_the_next_batch_is_prepared_while_the_current_one_is_used(stream, monkeypatch):
    loader = make_loader(stream)
    second_prepared = threading.Event()
    prepare = loader._prepare

    def watched(step):
        prepared = prepare(step)
        if step == 1:
            second_prepared.set()
        return prepared

    monkeypatch.setattr(loader, "_prepare", watched)
    batches = loader.batches(0, 10)
    next(batches)
    assert second_prepared.wait(10)
    batches.close()


def test_closing_the_iterator_ends_the_thread(stream):
    batches = make_loader(stream).batches(0, 1000)
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert loader_threads() == []


def test_an_exception_in_the_thread_reaches_the_consumer(stream, monkeypatch):
    loader = make_loader(stream)
    read = stream.windows
    calls = itertools.count()

    def fails_at_the_third(starts, length):
        if next(calls) == 2:
            raise ShardError("shard 'x' became shorter")
        return read(starts, length)

    monkeypatch.setattr(stream, "windows", fails_at_the_third)
    batches = loader.batches(0, 10)
    next(batches)
    next(batches)
    with pytest.raises(ShardError, match="became shorter"):
        next(batches)
    assert loader_threads() == []


def test_the_thread_sleeps_while_it_waits(stream):
    batches = make_loader(stream).batches(0, 10)
    next(batches)
    time.sleep(0.05)  # until the batch ahead is made
    started = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - started < 0.1  # a spinning thread would use 0.3
    batches.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: the copy on a side stream is unchecked here")
def test_on_cuda_batches_arrive_whole_and_are_not_overwritten_while_in_use(stream):
    device = torch.device("cuda", torch.cuda.current_device())
    loader, expected = make_loader(stream, device=device, eot=3), make_loader(stream, eot=3)
    sums = []
    for batch in loader.batches(0, 200):
        torch.cuda._sleep(1_000_000)  # the current stream lags behind the copies
        sums.append(sum(m.tokens.sum() * 7 + m.targets.sum() + m.document_ids.sum() for m in batch))
        assert batch[0].tokens.device == device
    assert [int(s) for s in sums] == [int(sum(m.tokens.sum() * 7 + m.targets.sum() + m.document_ids.sum()
                                              for m in expected.batch(step))) for step in range(200)]


# ---- Validation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_validation_reads_the_first_tokens_in_order_at_any_world_size(stream, tokens, world_size, micro_batch):
    loader = ValLoader(stream, seq_len=T, eval_tokens=10 * T + 14, micro_batch=micro_batch)  # 10 full windows
    micro_batches = [m for rank in range(world_size) for m in loader.micro_batches(rank, world_size)]
    assert torch.cat([m.tokens for m in micro_batches]).reshape(-1).tolist() == tokens[:10 * T].tolist()
    assert torch.cat([m.targets for m in micro_batches]).reshape(-1).tolist() == tokens[1:10 * T + 1].tolist()
    starts = np.cumsum([0, *(len(m.tokens) for m in micro_batches)])[:-1]
    assert [m.first_window for m in micro_batches] == starts.tolist()


def test_validation_has_at_least_one_window_and_at_most_the_split(stream):
    counts = [ValLoader(stream, seq_len=T, eval_tokens=n, micro_batch=8).windows for n in (1, T, 2 * T, 10**9)]
    assert counts == [1, 1, 2, 100]


def test_a_rank_without_windows_has_no_micro_batches(stream):
    loader = ValLoader(stream, seq_len=T, eval_tokens=T, micro_batch=8)
    assert sorted(len(list(loader.micro_batches(rank, 3))) for rank in range(3)) == [0, 0, 1]


def test_validation_numbers_documents_when_wanted(stream):
    eot = 3
    [micro_batch] = ValLoader(stream, seq_len=T, eval_tokens=4 * T, micro_batch=8, eot=eot).micro_batches(0, 1)
    assert torch.equal(micro_batch.document_ids, (micro_batch.tokens == eot).cumsum(1).int())
