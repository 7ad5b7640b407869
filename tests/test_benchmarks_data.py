"""What both sides of data.py data encode."""

import itertools
import json

from benchmarks import data, measure
from data.tokenizer import load_tokenizer


def test_texts_are_repeated_and_shared_out_evenly():
    texts = measure.take(itertools.cycle(["aaaa", "é"]), size=11)
    assert texts == ["aaaa", "é", "aaaa", "é"]  # 4 + 2 bytes, twice
    shares = data.shared_out(["x" * n for n in range(1, 9)], 2)
    assert [sum(map(len, share)) for share in shares] == [18, 18] and len(sum(shares, [])) == 8


def test_both_sides_of_the_data_benchmark_make_the_same_tokens(tmp_path):
    texts = ["the cat sat on a mat", "naïve café, 123 don't"]
    name, description = data.tokenizer_for_both("bpe:262", texts, tmp_path)
    (tmp_path / "encoding.json").write_text(json.dumps(description))
    data.write_jsonl(tmp_path / "part.jsonl", texts)
    expected = sum(len(load_tokenizer(name).encode(text)) for text in texts)
    with measure.Worker(data.TIKTOKEN_WORKER, str(tmp_path / "part.jsonl"), str(tmp_path / "encoding.json"),
                      cwd=tmp_path) as worker:
        assert worker.receive() == {} and worker.receive() == {}  # started, loaded
        assert measure.ask(worker) == [{"tokens": expected}]
