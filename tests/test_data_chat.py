"""Chat templates against transformers' apply_chat_template, and tokens against strings spelled by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data.chat import (
    DEFAULT_TEMPLATE,
    ChatError,
    encode_chat,
    encode_conversation,
    load_template,
    read_template,
    render,
    save_template,
    turn_end,
)
from data.tokenizer import Tokenizer, load_tokenizer, train_bpe

# The shapes that models in use have (own wording): headers of special tokens; Llama's; loops, filters and conditions.
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
          " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
BRACKETS = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns should alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + ((system + '\n\n') if system is defined and loop.first else '') + message.content | trim }}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TALK = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "What is 2 + 2? <é中😀>"},
        {"role": "assistant", "content": " It is 4.\n"}, {"role": "user", "content": "{{ 7 * 7 }}?"},
        {"role": "assistant", "content": "49"}]


def chatml_tokenizer() -> Tokenizer:
    """A small BPE with the special tokens of ChatML beside end-of-text."""
    trained = train_bpe(["It is 4. What is the answer? Be brief. user assistant system\n"] * 3, 280)
    file = json.loads(trained.file_text)
    for number, token in enumerate(("<|im_start|>", "<|im_end|>", "<|im|>"), start=trained.vocab_size):
        file["added_tokens"].append(file["added_tokens"][0] | {"id": number, "content": token})
        file["model"]["vocab"][token] = number
    return loaded(file)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chatml_tokenizer()


def loaded(file: dict) -> Tokenizer:
    from data.tokenizer import _from_file_text
    return _from_file_text(json.dumps(file), "small")


ORACLE = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
for case in json.load(sys.stdin):
    text, _ = render_jinja_template([case["messages"]], chat_template=case["template"],
                                    add_generation_prompt=case["prompt"], bos_token="<B>", eos_token="<E>")
    print(json.dumps(text[0]))
"""


def test_rendering_equals_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is missing: rendering is unchecked")
    cases = [{"messages": messages, "template": template, "prompt": prompt}
             for template in (DEFAULT_TEMPLATE, CHATML, BRACKETS, "{{ messages | tojson }}")
             for messages in (TALK, TALK[1:], TALK[1:2]) for prompt in (False, True)]
    done = subprocess.run([sys.executable, "-c", ORACLE], input=json.dumps(cases), cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    ours = [render(c["template"], c["messages"], add_generation_prompt=c["prompt"], bos_token="<B>", eos_token="<E>")
            for c in cases]
    assert ours == [json.loads(line) for line in done.stdout.splitlines()]


def test_the_default_template_is_names_newlines_and_end_of_text():
    assert render(DEFAULT_TEMPLATE, TALK[1:3], add_generation_prompt=True, eos_token="<E>") == (
        "User:\nWhat is 2 + 2? <é中😀>\n\nAssistant:\nIt is 4.<E>\n\nAssistant:\n")


@pytest.mark.parametrize(("template", "messages", "words"), [
    (BRACKETS, TALK[2:], "turns should alternate"),
    (DEFAULT_TEMPLATE, [{"role": "tool", "content": "x"}], "role tool is none of system, user, assistant"),
    ("{{ messages[0].name.first }}", TALK, "cannot render"),
    ("{% for m in messages %}", TALK, "not valid Jinja at line 1"),
    ("{{ messages.append(1) }}", TALK, "unsafe"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", TALK, "unsafe"),
    ("{{ messages[0].content / 2 }}", TALK, "cannot render"),
], ids=["own-objection", "role", "undefined", "syntax", "change", "escape", "type"])
def test_what_cannot_be_rendered_is_one_error(template, messages, words):
    with pytest.raises(ChatError, match="chat template.*" + words):
        render(template, messages, add_generation_prompt=False)


def test_a_template_is_saved_and_read_back_to_the_letter(tmp_path):
    assert load_template(tmp_path) is None
    save_template(tmp_path, CHATML + "\n é\n")
    assert load_template(tmp_path) == CHATML + "\n é\n"
    assert [path.name for path in tmp_path.iterdir()] == ["chat_template.jinja"]


def test_a_template_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ChatError, match="nowhere.jinja' cannot be read"):
        read_template(tmp_path / "nowhere.jinja")
    (tmp_path / "half.jinja").write_text("{% if %}")
    with pytest.raises(ChatError, match="not valid Jinja"):
        read_template(tmp_path / "half.jinja")


def test_special_tokens_of_the_template_are_ids_and_those_in_messages_are_text(tokenizer):
    start, end, short = (tokenizer.special_ids[t] for t in ("<|im_start|>", "<|im_end|>", "<|im|>"))
    said = "a<|im_end|>\n<|im|><|endoftext|>b"
    ids = encode_chat(tokenizer, CHATML, [{"role": "user", "content": said}])
    assert [i for i in ids if i in (start, end, short, tokenizer.eot)] == [start, end, start]
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    expected = [start, *tokenizer.encode("user\n" + said), end, *tokenizer.encode("\n"), start,
                *tokenizer.encode("assistant\n")]
    assert ids.tolist() == expected and ids.dtype == np.uint32


@pytest.mark.parametrize(("template", "written"), [
    (CHATML, [" It is 4.\n<|im_end|>", "49<|im_end|>"]),
    (BRACKETS, [" It is 4.<|endoftext|>", " 49<|endoftext|>"]),
    (DEFAULT_TEMPLATE, ["It is 4.<|endoftext|>", "49<|endoftext|>"]),
    # no generation prompt and no special token: the turn without its header, to its end
    ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n---\n' }}{% endfor %}",
     [" It is 4.\n\n---\n", "49\n---\n"]),
], ids=["chatml", "brackets", "default", "plain"])
def test_the_assistant_wrote_its_contents_and_the_tokens_that_end_them(tokenizer, template, written):
    ids, mask = encode_conversation(tokenizer, template, TALK)
    whole = render(template, TALK, add_generation_prompt=False, eos_token="<|endoftext|>")
    assert tokenizer.decode(ids) == whole and mask.dtype == bool
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    spans = [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]
    assert [s.strip(" ") for s in spans] == [w.strip(" ") for w in written]


def test_an_answer_begins_after_the_tokens_that_the_model_is_asked_with(tokenizer):
    for template in (CHATML, BRACKETS, DEFAULT_TEMPLATE):
        ids, mask = encode_conversation(tokenizer, template, TALK)
        asked = encode_chat(tokenizer, template, TALK[:2])
        assert ids[:int(mask.argmax())].tolist() == asked.tolist()


def test_a_template_that_renders_old_turns_otherwise_is_refused_for_training(tokenizer):
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    with pytest.raises(ChatError, match="first 3 messages otherwise when others follow.*data.chat_template"):
        encode_conversation(tokenizer, forgetful, TALK)


def test_a_tokenizer_without_a_token_for_the_beginning_says_so():
    assert (load_tokenizer("bytes").bos_token, load_tokenizer("bytes").eot_token) == (None, "<|endoftext|>")


def test_a_token_that_begins_every_text_is_the_templates_bos_token(tokenizer):
    file = json.loads(tokenizer.file_text)
    single = [{"SpecialToken": {"id": "<|im|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    file["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    begun = loaded(file)
    assert begun.bos_token == "<|im|>" and begun.start == tokenizer.special_ids["<|im|>"]
    assert encode_chat(begun, BRACKETS, TALK[1:2])[0] == begun.start


def test_the_end_of_a_turn_is_the_special_token_that_the_template_puts_there(tokenizer):
    assert turn_end(tokenizer, CHATML) == tokenizer.special_ids["<|im_end|>"]
    assert turn_end(tokenizer, DEFAULT_TEMPLATE) == turn_end(tokenizer, BRACKETS) == tokenizer.eot
    assert turn_end(tokenizer, "{% for m in messages %}{{ m.content + '--' }}{% endfor %}") == tokenizer.eot
    assert turn_end(tokenizer, "{{ raise_exception('no') }}") == tokenizer.eot
    headed = "{% for m in messages %}<|im_start|>{{ m.content }}<|im|>\n<|im_end|>{% endfor %}<|im_start|>"
    assert turn_end(tokenizer, headed) == tokenizer.special_ids["<|im|>"]


def test_tokenizers_that_give_the_same_ids_are_alike_however_they_are_spelled(tokenizer):
    respelled = json.dumps(json.loads(tokenizer.file_text), indent=3)
    other = loaded(json.loads(respelled) | {"padding": None, "truncation": None, "version": "1.1"})
    assert other.fingerprint != tokenizer.fingerprint and other.encodes_like(tokenizer)
    assert not load_tokenizer("bytes").encodes_like(tokenizer)
