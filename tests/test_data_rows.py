"""What rows say: messages in their plain form, what is refused by name, and the commands that convert other shapes."""

import codecs
import gzip
import json
import subprocess
import sys

import pytest

from config import UserError
from data.prepare import prepare
from data.rows import ExampleError, plain_messages
from tests.test_data_examples import prepared, refusal


@pytest.mark.parametrize(("message", "words"), [
    ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, "message 1 has tool_calls, which is not"),
    ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "message 1 has function_call"),
    ({"role": "tool", "content": "x", "tool_call_id": "1"}, "message 1 has tool_call_id"),
    ({"role": "assistant", "content": "a", "weight": 0.5}, "message 1 has the weight 0.5; it should be 0 "),
    ({"role": "assistant", "content": "a", "weight": True}, "message 1 has the weight true"),
    ({"role": "user", "content": "a", "weight": 1}, "has the weight 1, but it is the user's"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, 'a part of the type "image_url"; only'),
    ({"role": "user", "content": [{"type": "text"}]}, "message 1 is not"),
    ({"role": "user", "content": 3}, "message 1 is not"), ({"role": "user"}, "message 1 is not"),
    ("hi", "message 1 is not"),
    ({"role": "gpt", "content": "a"}, "the role 'gpt', which is called assistant here; convert the file: python -c"),
    ({"role": "User", "content": "a"}, "the role 'User', which is called user here"),
])
def test_a_message_that_would_be_misunderstood_is_refused_by_name(message, words):
    with pytest.raises(ExampleError, match=words):
        plain_messages([message])


def test_parts_of_text_are_their_text_and_what_says_nothing_is_gone():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "user", "content": parts, "name": None, "tool_calls": []},
                           {"role": "assistant", "content": "c", "weight": 0}]) == [
        {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c", "weight": 0}]


SHAREGPT = {"conversations": [{"from": "human", "value": "é \"q\"'"}, {"from": "gpt", "value": "b\n"}]}
ROLES = {"messages": [{"role": "Human", "content": "a"}, {"role": "gpt", "content": "b"}]}


@pytest.mark.parametrize(("row", "expected"), [
    (SHAREGPT, {"messages": [{"role": "user", "content": "é \"q\"'"}, {"role": "assistant", "content": "b\n"}]}),
    (ROLES, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "Add.\n\n1 2\n\n", "response": "3"}),
    ({"instruction": "Hi", "output": "Ho"}, {"prompt": "Hi\n\n", "response": "Ho"}),
    ({"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": "p", "response": "good"}),
], ids=["sharegpt", "roles", "alpaca", "alpaca without input", "preferences"])
def test_rows_of_another_shape_are_refused_with_a_command_that_converts_them(row, expected, tmp_path):
    text = refusal(tmp_path, [row, row], max_seq_len=100)
    command = text[text.index("python -c "):].replace("IN.jsonl", str(tmp_path / "in.jsonl"))
    assert "line 1" in text or str(tmp_path / "in.jsonl") in command
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    converted = tmp_path / "OUT.jsonl"
    assert [json.loads(line) for line in converted.read_text().splitlines()] == [expected] * 2
    prepared(str(converted), tmp_path / "done", max_seq_len=100, val_fraction=0.0)


def test_the_command_reads_what_may_be_a_source(tmp_path):
    (tmp_path / "it's.jsonl.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + json.dumps(SHAREGPT).encode() + b"\r\n\n"))
    with pytest.raises(UserError, match="has rows of conversations; convert it first") as refused:
        prepare([str(tmp_path / "it's.jsonl.gz")], tmp_path / "out", tokenizer="bytes", max_seq_len=100)
    command = str(refused.value).partition("first: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert list(json.loads((tmp_path / "OUT.jsonl").read_text())) == ["messages"]
