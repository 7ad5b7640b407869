"""Chat templates against transformers' apply_chat_template, and tokens against strings spelled by hand."""

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.chat import (
    DEFAULT_TEMPLATE,
    ChatError,
    answer_lead,
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


# Shapes of chat templates in use, in our own words: special tokens are written <|so|>, or <s> and </s>.
THINKING = r"""
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- set is_last = loop.last %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if is_last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
SHAPES = {
    "chatml": CHATML,
    "brackets": BRACKETS,
    "headers": """{{ bos_token }}{% if tools is not none %}tools!{% endif %}{% for m in messages %}
{{- '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}""",
    "strict": """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must take turns') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}""",
    "turns": """{{ bos_token }}{% if messages and messages[0].role == 'system' %}
{{- raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{{ '<|start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}
{{- '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}""",
    "taking": """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "thinking": THINKING,
    "lines": """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "capitals": """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}
{%- elif m.role == 'user' %}
{{- 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    "names": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{{- bos_token }}
{%- for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}
{{- 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "marked": """{{ bos_token }}{% if documents %}{{ documents | tojson }}{% endif %}{% for m in messages %}
{%- if m.role not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
{{- '<|start|><|' + m.role + '|>' }}{% generation %}{{ m.content.strip() + '<|end|>' }}{% endgeneration %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|><|assistant|>' }}{% endif %}""",
    "sections": """{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}
{{- '### Instruction:\n' + m.content + '\n\n' }}{% else %}
{{- '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}""",
    "tables": """{{ (bos_token, eos_token, unk_token, pad_token, sep_token is defined) | tojson }}
{{- strftime_now('%%') }}
{%- for m in messages %}{{ m | tojson(indent=1) }}{{ '<|end|>' if m.role == 'assistant' }}{% endfor %}""",
}
TALKS = [TALK, TALK[1:], TALK[1:2], TALK[:2], [{"role": "system", "content": ""}, *TALK[1:3]],
         [{"role": "user", "content": ""}], [{"role": "user", "content": "\n  hi \n"}],
         [*TALK[1:3], {"role": "user", "content": "So?"},
          {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}],
         [*TALK[1:3], {"role": "user", "content": "So?"}]]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|user|>",
            "<|assistant|>", "<|system|>", "<|pad|>"]
TAKERS = {"<|user|>": "rstrip", "<|assistant|>": "rstrip", "<|eot|>": "lstrip"}  # of blanks beside them
METASPACE = {"type": "Metaspace", "replacement": "▁"}
KINDS = {  # normalizer, pre_tokenizer
    "byte-level": (None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
    "metaspace first": (None, METASPACE | {"prepend_scheme": "first", "split": False}),
    "metaspace always": (None, METASPACE | {"prepend_scheme": "always", "split": True}),
    "prepend": ({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, None)}


def hugging_face_folder(folder: Path, kind: str) -> Path:
    """tokenizer.json and tokenizer_config.json of a small tokenizer of one of the KINDS, which knows what TALKS say."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers
    normalizer, splits = KINDS[kind]
    hf = HuggingFace(models.BPE(unk_token=None if kind == "byte-level" else "<unk>"))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "byte-level" else \
        pre_tokenizers.Metaspace()
    texts = [message["content"] for talk in TALKS for message in talk] * 3 + [*SHAPES.values(), string.printable]
    alphabet = [*string.printable, "▁", "中", "😀"]
    if kind == "byte-level":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=520, initial_alphabet=sorted(alphabet),
                                                      show_progress=False))
    file = json.loads(hf.to_str()) | {"normalizer": normalizer, "pre_tokenizer": splits}
    size = len(file["model"]["vocab"])
    file["added_tokens"] = [
        {"id": size + i, "content": token, "single_word": False, "lstrip": TAKERS.get(token) == "lstrip",
         "rstrip": TAKERS.get(token) == "rstrip", "normalized": False, "special": True}
        for i, token in enumerate(SPECIALS)]
    file["model"]["vocab"] |= {token: size + i for i, token in enumerate(SPECIALS)}
    if kind != "byte-level":
        file["decoder"] = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}]}
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        file["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {
            "<s>": {"id": "<s>", "ids": [size + SPECIALS.index("<s>")], "tokens": ["<s>"]}}}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|pad|>"}), encoding="utf-8")
    return folder


ORACLE = """
import json, sys
from transformers import AutoTokenizer
shapes, talks, folders = json.load(sys.stdin)
for kind, folder in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for shape, template in shapes.items():
        for number, messages in enumerate(talks):
            def rendered(**options):
                try:
                    return tokenizer.apply_chat_template(messages, chat_template=template, **options)
                except Exception as error:
                    return type(error).__name__
            ids = rendered(add_generation_prompt=True)
            print(json.dumps([kind, shape, number, rendered(tokenize=False), rendered(tokenize=False,
                              add_generation_prompt=True), ids if isinstance(ids, str) else ids["input_ids"]]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: hugging_face_folder(folder / kind.replace(" ", "-"), kind) for kind in KINDS}


def test_rendered_texts_and_ids_are_those_of_transformers(folders):
    pytest.importorskip("transformers", reason="transformers is missing: rendering is unchecked")
    given = json.dumps([SHAPES, TALKS, {kind: str(folder) for kind, folder in folders.items()}])
    done = subprocess.run([sys.executable, "-I", "-c", ORACLE], input=given, cwd=folders["prepend"], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    tokenizers, refused = {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}, 0
    for kind, shape, number, told, asked, ids in map(json.loads, done.stdout.splitlines()):
        tokenizer, template, messages = tokenizers[kind], SHAPES[shape], TALKS[number]
        if ids == "TemplateError":
            with pytest.raises(ChatError):
                encode_chat(tokenizer, template, messages)
            refused += 1
            continue
        named = tokenizer.named
        assert render(template, messages, add_generation_prompt=False, **named) == told, (shape, number)
        assert render(template, messages, add_generation_prompt=True, **named) == asked, (shape, number)
        assert encode_chat(tokenizer, template, messages).tolist() == ids, (kind, shape, number, asked)
    assert refused == len(KINDS) * 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_before_each_answer_stand_the_tokens_that_a_model_is_asked_with(kind, shape, folders):
    """The one principle, for every shape, kind of tokenizer and turn; what follows is the answer and its end."""
    tokenizer, template = load_tokenizer(str(folders[kind])), SHAPES[shape]
    end = turn_end(tokenizer, template)
    for talk in TALKS:
        turns = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
        try:
            prompts = [encode_chat(tokenizer, template, talk[:number]).tolist() for number in turns]
            found = [(ids.tolist(), written) for ids, written in encode_conversation(tokenizer, template, talk)] \
                if turns else []
        except ChatError as error:
            assert re.search("take turns|no system|turns should alternate|has no generation prompt", str(error))
            continue
        spans = [(ids, start, stop) for ids, written in found for start, stop in
                 np.flatnonzero(np.diff([0, *written, 0])).reshape(-1, 2)]
        assert len(spans) == len(turns)
        assert sorted(ids[:start] for ids, start, _ in spans) == sorted(prompts)
        for number, (ids, start, stop) in zip(turns, spans, strict=True):
            answer = tokenizer.decode(ids[start:stop])
            content = talk[number]["content"].strip()
            assert ids[stop - 1] == end and content.split("\n")[-1] in answer and "user" not in answer.lower()


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
    # names in which the contents stand too, a thought before each
    ("{% for m in messages %}<|im|>{{ m.role[0] * 49 }}49: {{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}<|im|>{% endif %}",
     ["a" * 49 + "49:  It is 4.\n<|im_end|>", "a" * 49 + "49: 49<|im_end|>"]),
], ids=["chatml", "brackets", "default", "names"])
def test_the_assistant_writes_all_behind_the_generation_prompt_and_the_token_that_ends_it(tokenizer, template, written):
    [(ids, mask)] = encode_conversation(tokenizer, template, TALK)
    whole = render(template, TALK, add_generation_prompt=False, eos_token="<|endoftext|>")
    assert tokenizer.decode(ids) == whole.rstrip("\n") and mask.dtype == bool
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    assert [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)] == written


def test_where_the_template_writes_no_end_end_of_text_ends_an_answer(tokenizer):
    plain = "{% for m in messages %}{{ m.content + '\n---\n' }}{% endfor %}"
    found = encode_conversation(tokenizer, plain, TALK)
    assert [(tokenizer.decode(ids), tokenizer.decode(ids[mask])) for ids, mask in found] == [
        ("Be brief. \n---\nWhat is 2 + 2? <é中😀>\n---\n It is 4.\n<|endoftext|>", " It is 4.\n<|endoftext|>"),
        ("Be brief. \n---\nWhat is 2 + 2? <é中😀>\n---\n It is 4.\n\n---\n{{ 7 * 7 }}?\n---\n49<|endoftext|>",
         "49<|endoftext|>")]


def test_a_template_that_rewrites_earlier_turns_gives_one_example_for_each_turn(tokenizer):
    thought = [*TALK[1:4], {"role": "assistant", "content": "<think>\n7 * 7\n</think>\n\n49"}]
    first, second = encode_conversation(tokenizer, THINKING, thought)
    assert tokenizer.decode(first[0][first[1]]) == "<think>\n\n</think>\n\n It is 4.\n<|im_end|>"
    assert tokenizer.decode(second[0][second[1]]) == "<think>\n7 * 7\n</think>\n\n49<|im_end|>"
    assert "assistant\n It is 4.\n<|im_end|>" in tokenizer.decode(second[0])  # the earlier turn, without its thought
    assert answer_lead(tokenizer, THINKING) == "<think>\n\n</think>\n\n" and answer_lead(tokenizer, CHATML) == ""


def test_a_turn_is_encoded_as_what_follows_its_prompt_also_where_the_whole_merges_over_its_start(folders):
    tokenizer = load_tokenizer(str(folders["prepend"]))
    merging = "{% for m in messages %}{{ m.content }}{% endfor %}"
    [(ids, mask)] = encode_conversation(tokenizer, merging, [{"role": "user", "content": "Wh"},
                                                             {"role": "assistant", "content": "at"}])
    assert tokenizer.decode(ids[mask]) == "at</s>" and ids.tolist()[:-1] != tokenizer.encode("What").tolist()


def test_the_end_of_an_answer_is_found_though_what_follows_depends_on_it(tokenizer):
    template = CHATML.replace("'<|im_end|>'", "'<|im_end|>' + '!' * (message['content'] | length)")
    [(ids, mask)] = encode_conversation(tokenizer, template, TALK[1:3])
    assert tokenizer.decode(ids[mask]) == " It is 4.\n<|im_end|>"


def test_a_turn_of_weight_0_is_given_and_not_learnt(tokenizer):
    talk = [message | {"weight": 0} if message["role"] == "assistant" else message for message in TALK]
    talk[-1] = TALK[-1] | {"weight": 1}
    [(ids, mask)] = encode_conversation(tokenizer, CHATML, talk)
    assert tokenizer.decode(ids[mask]) == "49<|im_end|>"
    assert ids.tolist() == encode_conversation(tokenizer, CHATML, TALK)[0][0].tolist()


@pytest.mark.parametrize(("template", "talk", "words"), [
    ("{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}", TALK,
     "asks for message 3 with .* but writes .* once it is answered"),
    (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", TALK,
     "asks for message 3 with '<think>' but writes ' It"),
    (BRACKETS.replace("messages[0]", "messages[1]"), TALK[2:3],
     "message 1 is the assistant's, and .*begin with the user"),
    (CHATML, [TALK[1] | {"name": "Ann"}, TALK[2]], "has 'name' in its messages, which the chat template does not show"),
])
def test_what_cannot_be_trained_as_it_is_asked_is_refused_with_the_reason(tokenizer, template, talk, words):
    with pytest.raises(ChatError, match=words):
        encode_conversation(tokenizer, template, talk)


def test_a_header_without_generation_prompt_is_refused_and_following_the_advice_trains_it(tokenizer):
    template = "{% for m in messages %}{{ m.role + ':\n' + m.content + eos_token + '\n' }}{% endfor %}"
    with pytest.raises(ChatError, match="turns with 'assistant:.n' but has no generation prompt") as error:
        encode_conversation(tokenizer, template, TALK)
    template += re.search("write ({{.*}}) at the end", str(error.value))[1]
    [(ids, mask)] = encode_conversation(tokenizer, template, TALK)
    assert tokenizer.decode(ids[mask]) == " It is 4.\n<|endoftext|>49<|endoftext|>"


def test_a_field_that_the_template_shows_is_honoured(tokenizer):
    named = CHATML.replace("message['role'] +", "message['role'] + (' ' + message.name if message.name else '') +")
    [(ids, _)] = encode_conversation(tokenizer, named, [TALK[1] | {"name": "Ann"}, TALK[2]])
    assert tokenizer.decode(ids).startswith("<|im_start|>user Ann\n")


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
