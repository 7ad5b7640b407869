"""Prompts and chats cut to fit: against texts put together by hand, and all shorter versions of random chats."""

import json
import random

import numpy as np
import pytest

from data import prompts
from data.chat import DEFAULT_TEMPLATE
from data.prompts import answer_room, encode_prompt, fit_chat, fit_conversation, fit_prompt, kept_tokens
from data.tokenizer import Tokenizer, load_tokenizer
from tests.test_data_chat import BRACKETS, CHATML, KINDS, SPECIALS, chatml_tokenizer, hugging_face_folder, loaded

BYTES = load_tokenizer("bytes")


def with_bos(plain: Tokenizer, token: str) -> Tokenizer:
    file = json.loads(plain.file_text)
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    file["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    return loaded(file)


def spelled(ids: np.ndarray) -> str:
    """Of the bytes tokenizer; end-of-text as #."""
    return "".join("#" if i == BYTES.eot else chr(i) for i in ids)


@pytest.mark.parametrize(("prompt", "response", "room", "expected"), [
    ("abcdef", "XYZ", 9, "abcdefXYZ"), ("abcdef", "XYZ", 8, "bcdefXYZ"), ("abcdef", "XYZ", 4, "fXYZ"),
    ("abcdef", "XYZ", 3, "fXY"),  # the response does not fit: it loses its end, the prompt keeps half the room
    ("abcdef", "XYZ", 2, "fX"), ("ab", "UVWXYZ", 6, "abUVWX"), ("abcdef", "UVWXYZ", 6, "defUVW"),
    ("abcdef", "", 4, "cdef"), ("abcdef", "", 1, "f"), ("", "XYZ", 2, "XY"),
])
def test_the_front_of_a_prompt_goes_then_the_end_of_the_response(prompt, response, room, expected):
    ids = BYTES.encode(prompt + response)
    stay = kept_tokens(BYTES, ids, room, response=len(response))
    assert spelled(ids[stay]) == expected
    if not response:
        fitted, cut = fit_prompt(BYTES, ids, room)
        assert (spelled(fitted), cut) == (expected, len(ids) - len(expected))


@pytest.mark.parametrize(("prompt", "response", "room", "expected"), [
    ("#abcdef", "XYZ", 8, "#cdefXYZ"), ("#abcdef", "XYZ", 4, "#XYZ"), ("#abcdef", "XYZ", 3, "#XY"),
    ("#abcdef", "WXYZ", 4, "#fWX"), ("#abcdef", "", 3, "#ef"), ("abcdef", "", 3, "def"), ("#abcdef", "", 1, "#")])
def test_the_token_that_begins_every_text_stays(prompt, response, room, expected):
    begun = with_bos(BYTES, "<|endoftext|>")
    ids = np.array([BYTES.eot if char == "#" else ord(char) for char in prompt + response], dtype=np.uint32)
    assert spelled(ids[kept_tokens(begun, ids, room, response=len(response))]) == expected


def test_a_plain_prompt_is_behind_what_begins_a_text_and_an_empty_one_is_its_start():
    begun = with_bos(BYTES, "<|endoftext|>")
    assert [spelled(encode_prompt(some, text)) for some in (BYTES, begun) for text in ("ab", "")] == [
        "ab", "#", "#ab", "#"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_text_has_the_ids_that_it_has_in_the_whole(kind, tmp_path):
    """Cut at each border of the whole's tokens: no kind of tokenizer puts its mark before a part."""
    from tokenizers import Tokenizer as HuggingFace
    folder = hugging_face_folder(tmp_path / "hf", kind)
    ours, hf = load_tokenizer(str(folder)), HuggingFace.from_file(str(folder / "tokenizer.json"))
    for text in ("What is 2 + 2? It is 4.", "  It  is\n\n4.\n It", "Be brief.", "\nis", "é中😀 is"):
        whole = hf.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == whole.ids
        for number, ((_, end), (start, _)) in enumerate(zip(whole.offsets, whole.offsets[1:], strict=False), start=1):
            if start == end and len(ours.encode(text[:end])) == number:  # else the part before reads otherwise alone
                assert [*ours.encode(text[:end]), *ours.encode(text[end:], behind="text")] == whole.ids, text[end:]
        behind = hf.encode("<s>" + text, add_special_tokens=False).ids
        assert [ours.special_ids["<s>"], *ours.encode(text, behind="special")] == behind
    assert set(SPECIALS) == set(ours.special_ids)


def test_a_chat_too_long_keeps_the_token_that_its_template_begins_with(tmp_path):
    """Also where tokenizer_config.json alone names it, as for Llama 3's shape of a file without post_processor."""
    ours = load_tokenizer(str(hugging_face_folder(tmp_path / "hf", "byte-level")))
    assert ours.bos_token is None and ours.named["bos_token"] == "<s>"
    talk = [{"role": "system", "content": "Be brief. " * 9}, {"role": "user", "content": "It is"},
            {"role": "assistant", "content": "4"}]
    template = "{{ bos_token }}" + CHATML
    for ids in (fit_chat(ours, template, talk[:2], 20)[0], fit_conversation(ours, template, talk, 20)[0][0]):
        assert len(ids) == 20 and ids[0] == ours.special_ids["<s>"]


def test_where_text_merges_over_the_start_of_a_turn_each_turn_is_an_example_and_is_learnt_once():
    tokenizer = chatml_tokenizer()
    merging = ("{% for m in messages %}{{ ('th' if m.role == 'assistant' else 'Q') + m.content + eos_token }}"
               "{% endfor %}{{ 'th' if add_generation_prompt }}")
    talk = [{"role": role, "content": text} for q, a in (("1", "e answer"), ("2", "49"), ("3", "It is"))
            for role, text in (("user", q), ("assistant", a))]
    whole = fit_conversation(tokenizer, merging, talk)
    asked = [fit_chat(tokenizer, merging, talk[:end], 10**6)[0].tolist() for end in (1, 3, 5)]
    assert [ids[:int(written.argmax())].tolist() for ids, written, _ in whole] == asked
    assert len(tokenizer.encode("the")) < len(tokenizer.encode("th")) + len(tokenizer.encode("e"))  # it merges indeed
    for room in range(8, len(whole[-1][0]) + 1):  # the last loses turns: of those left, its own alone is learnt
        found = fit_conversation(tokenizer, merging, talk, room)
        learnt = [tokenizer.decode(ids[written]) for ids, written, _ in found]
        assert learnt == [f"{text}<|endoftext|>" for text in ("e answer", "49", "It is")], room


def test_whatever_the_lengths_the_ends_of_prompt_and_response_stay():
    draw, begun = random.Random(0), with_bos(BYTES, "<|endoftext|>")
    for _ in range(2000):
        prompt, response, room = draw.randrange(1, 30), draw.randrange(0, 30), draw.randrange(2, 40)
        has_bos = draw.random() < 0.5
        stay = kept_tokens(begun if has_bos else BYTES, np.full(prompt + response, BYTES.eot), room, response=response)
        assert len(stay) == min(room, prompt + response) and (np.diff(stay) > 0).all()
        assert stay[0] == 0 or not has_bos
        of_prompt = stay[stay < prompt][has_bos:]
        assert of_prompt.tolist() == list(range(prompt - len(of_prompt), prompt))
        of_response = stay[stay >= prompt]
        assert of_response.tolist() == list(range(prompt, prompt + len(of_response)))
        assert len(of_response) == response or response >= room


LONG_TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "first"},
             {"role": "assistant", "content": "one"}, {"role": "user", "content": "second"},
             {"role": "assistant", "content": "two"}, {"role": "user", "content": "third"}]
SHORT = ("{% for m in messages %}{{ m.role[0] + ':' + m.content + (eos_token if m.role == 'assistant' else '/') }}"
         "{% endfor %}{% if add_generation_prompt %}a:{% endif %}")


@pytest.mark.parametrize(("room", "expected"), [
    (100, "s:S/u:first/a:one#u:second/a:two#u:third/a:"), (43, "s:S/u:first/a:one#u:second/a:two#u:third/a:"),
    (42, "s:S/u:second/a:two#u:third/a:"), (29, "s:S/u:second/a:two#u:third/a:"), (28, "s:S/u:third/a:"),
    (14, "s:S/u:third/a:"), (13, "s:S/u:hird/a:"), (9, "s:S/u:/a:"), (8, ":S/u:/a:"), (1, ":")])
def test_whole_oldest_turns_go_then_the_front_of_what_the_user_says(room, expected):
    ids, cut = fit_chat(BYTES, SHORT, LONG_TALK, room)
    assert (spelled(ids), cut) == (expected, 43 - len(expected))


@pytest.mark.parametrize(("room", "expected", "learnt"), [
    (99, "s:S/u:first/a:one#u:second/a:two#", "one#two#"),  # what follows the last answer teaches nothing
    (40, "s:S/u:first/a:one#u:second/a:two#", "one#two#"), (33, "s:S/u:first/a:one#u:second/a:two#", "one#two#"),
    (32, "s:S/u:second/a:two#", "two#"), (19, "s:S/u:second/a:two#", "two#"), (18, "s:S/u:econd/a:two#", "two#"),
    (13, "s:S/u:/a:two#", "two#"), (12, ":S/u:/a:two#", "two#"), (5, ":two#", "two#"), (4, "a:tw", "tw")])
def test_of_a_conversation_to_learn_from_the_last_answer_stays(room, expected, learnt):
    [(ids, written, cut)] = fit_conversation(BYTES, SHORT, LONG_TALK, room)
    assert (spelled(ids), cut, spelled(ids[written])) == (expected, 33 - len(expected), learnt)


@pytest.mark.parametrize(("room", "free", "expected"), [
    (43, 20, "s:S/u:first/a:one#u:second/a:two#u:third/a:"), (42, 13, "s:S/u:second/a:two#u:third/a:"),
    (42, 14, "s:S/u:third/a:"), (29, 28, ":")])
def test_what_is_cut_leaves_room_free_and_what_fits_stays_whole(room, free, expected):
    ids, cut = fit_chat(BYTES, SHORT, LONG_TALK, room, free=free)
    assert (spelled(ids), cut) == (expected, 43 - len(expected))
    plain, cut = fit_prompt(BYTES, BYTES.encode("x" * 43), room, free=free)
    assert (len(plain), cut) == ((43, 0) if room == 43 else (room - free, 43 - room + free))


@pytest.mark.parametrize(("max_seq_len", "max_new_tokens", "free"), [
    (32, 1, 0), (32, 5, 4), (32, 17, 16), (32, 1000, 16), (3, 1000, 1), (1, 1000, 0)])
def test_an_answer_is_left_what_it_may_need_but_at_most_half_the_context(max_seq_len, max_new_tokens, free):
    assert answer_room(max_seq_len, max_new_tokens) == free


def test_a_system_message_that_is_too_long_itself_is_not_encoded_for_every_shorter_user_text(monkeypatch):
    encode, calls = prompts.encode_chat, []
    monkeypatch.setattr(prompts, "encode_chat", lambda *words: calls.append(1) or encode(*words))
    talk = [{"role": "system", "content": "S" * 99}, {"role": "user", "content": "u" * 10_000}]
    assert spelled(fit_chat(BYTES, SHORT, talk, 9)[0]) == "SS/u:/a:"[-9:].rjust(9, "S")
    assert len(calls) == 2


def test_a_conversation_without_a_user_and_one_that_begins_with_the_assistant_fit():
    greeting = [{"role": "assistant", "content": "hello"}, *LONG_TALK[1:3]]
    assert spelled(fit_conversation(BYTES, SHORT, greeting, 17)[0][0]) == "u:first/a:one#"
    assert spelled(fit_conversation(BYTES, SHORT, greeting[:1], 5)[0][0]) == "a:hel"
    assert spelled(fit_chat(BYTES, SHORT, [{"role": "system", "content": "sysadmin"}], 6)[0]) == "min/a:"


@pytest.mark.parametrize("template", [CHATML, BRACKETS, DEFAULT_TEMPLATE], ids=["chatml", "brackets", "default"])
def test_whatever_the_room_a_chat_is_one_without_its_oldest_turns_and_the_front_of_a_users_text(template):
    def to_learn(messages: list[dict], room: int = 10**6) -> tuple:
        [found] = fit_conversation(tokenizer, template, messages, room)
        return found

    def to_answer(messages: list[dict], room: int = 10**6) -> tuple:
        return fit_chat(tokenizer, template, messages[:-1], room)

    draw, tokenizer = random.Random(1), chatml_tokenizer()
    words = ["the", "answer", "é中😀", "<|im_end|>", "\n\n", "  ", "42?", "<|endoftext|>"]
    for _ in range(40):
        turns = [[{"role": role, "content": " ".join(draw.choices(words, k=draw.randrange(1, 12))) + "."}
                  for role in ("user", "assistant")] for _ in range(draw.randrange(1, 5))]
        system = [{"role": "system", "content": "Be brief."}] * (draw.random() < 0.5)
        user, answer = turns[-1]
        shorter = [system + sum(turns[i:], []) for i in range(len(turns))] + [
            [*system, user | {"content": user["content"][i:]}, answer] for i in range(len(user["content"]) + 1)]
        for encode in (to_learn, to_answer):
            all_ids = [encode(messages)[0].tolist() for messages in shorter]
            room = draw.randrange(len(all_ids[-1]), len(all_ids[0]) + 2)
            ids, *_, cut = encode(shorter[0], room)
            assert len(ids) <= room and len(ids) + cut == len(all_ids[0])
            found = all_ids.index(ids.tolist())
            assert found == 0 or len(all_ids[min(found, len(turns)) - 1]) > room  # no turn goes without need
            assert found < len(turns) or len(all_ids[found - 1]) > room  # nor a character


@pytest.mark.parametrize("template", [SHORT, CHATML, BRACKETS, DEFAULT_TEMPLATE],
                         ids=["short", "chatml", "brackets", "default"])
def test_what_is_asked_has_the_tokens_that_training_has_before_the_answer_also_when_both_are_cut(template):
    draw, tokenizer = random.Random(2), chatml_tokenizer()
    tokenizer = with_bos(tokenizer, "<|endoftext|>") if template == BRACKETS else tokenizer
    cuts = 0
    for _ in range(60):
        talk = [{"role": role, "content": " ".join(draw.choices(["the", "é中😀", "<|im_end|>", "42?"], k=9)) + "."}
                for _ in range(draw.randrange(1, 4)) for role in ("user", "assistant")]
        talk = [{"role": "system", "content": "Be brief."}] * (draw.random() < 0.5) + talk
        [(whole, written, _)] = fit_conversation(tokenizer, template, talk)
        start = int(np.flatnonzero(written & ~np.roll(written, 1))[-1])  # of the last answer
        answer = len(whole) - start
        room = draw.randrange(answer + 1, len(whole) + 2)
        [(ids, _, cut)] = fit_conversation(tokenizer, template, talk, room)
        asked, cut_of_asked = fit_chat(tokenizer, template, talk[:-1], room - answer)
        assert asked.tolist() == ids[:-answer].tolist() and cut_of_asked == cut
        assert whole[start:].tolist() == ids[-answer:].tolist()
        cuts += cut > 0
    assert cuts > 30
