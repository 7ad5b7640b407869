"""Tasks with right answers: JSONL examples -> requests to the model -> scores and predictions. eval.py calls it.

Multiple choice and classification compare log-likelihoods of continuations; multiple choice is defined as in
lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness: api/task.py, api/model.py, models/huggingface.py,
tasks/hellaswag), so that its numbers can be compared. Generation is greedy. A line's fields tell its kind:

    {"query", "choices", "gold"}                      multiple choice; gold is the index of the right one
    {"ctx", "endings", "label"}                       the same in HellaSwag's words (arXiv:1905.07830), as llm.c reads
    {"activity_label", "ctx_a", "ctx_b", ...}         it; with all of HellaSwag's fields cleaned as the harness does
    {"text", "label"}                                 classification
    {"prompt", "reference"}, {"prompt", "response"}   generation; a reference may be a list of right answers
    {"messages"}                                      generation of the last message, the assistant's, from the others

Dims: Q contexts of a batch, R continuations computed together, T tokens, C width.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cli
import kernels
import sample
from config import ModelConfig, UserError
from data.chat import ChatError, answer_lead
from data.loader import IGNORED
from data.prompts import answer_room, encode_prompt, fit_chat, fit_prompt
from data.rows import ExampleError, plain_messages, refuse_unseen
from data.source_files import to_rows
from data.text import HEAD_BYTES, refuse_formats, row_of, utf8_blocks
from data.tokenizer import Tokenizer
from model import GPT, KVCache
from tasks import scores


class TaskError(UserError):
    """A task's file or line that cannot be read, or fits neither the other lines nor the model."""


# ---- Reading ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Choice:
    line: int
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Labelled:
    line: int
    text: str
    label: str


@dataclass(frozen=True)
class Answer:
    line: int
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    line: int
    messages: tuple[dict, ...]  # those before the answer
    references: tuple[str, ...]


Example = Choice | Labelled | Answer | Chat
KINDS = {Choice: "multiple choice", Labelled: "classification", Answer: "generation", Chat: "chat"}
OPTIONS = {"limit": "any kind", "predictions": "any kind", "labels": "classification", "plot": "classification",
           "max_new_tokens": "generation", "stop": "generation", "metrics": "generation",
           "parse_special": "generation"}  # eval.py's; what each is for


@dataclass(frozen=True)
class Task:
    path: Path
    examples: list[Example]  # of one kind
    parse_special: bool = False  # special tokens that prompts spell are read as such

    @property
    def kind(self) -> str:
        return KINDS[type(self.examples[0])]

    def wrong(self, line: int, text: str) -> TaskError:
        return TaskError(f"task {str(self.path)!r} line {line}: {text}")


def check_options(task: Task | None, names: list[str]) -> None:
    """Raise TaskError if one of the given OPTIONS has no meaning for the task, or there is none."""
    for name in names:
        kind, option = OPTIONS[name], f"--{name.replace('_', '-')}"
        if task is None:
            raise TaskError(f"{option} is for a task of {kind}; name one with --task, or leave it out")
        of_chats = task.kind == "chat" and name != "parse_special"  # what messages hold is text
        if kind not in ("any kind", "generation" if of_chats else task.kind):
            raise TaskError(f"{option} is for {kind}, and {str(task.path)!r} is {task.kind}; leave it out")


def read_task(path: Path) -> Task:
    """The examples of a JSONL file, all of one kind; blank lines are passed over. Raises TaskError."""
    task = Task(path, [])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"task {str(path)!r} cannot be read: {error.strerror}; name a JSONL file") from None
    refuse_formats(data[:HEAD_BYTES], f"task {str(path)!r}", str(path))
    replaced = 0
    for number, line in enumerate(b"".join(utf8_blocks([data])).splitlines(), start=1):
        if not line.strip():
            continue
        is_array = not task.examples and line.lstrip().startswith(b"[")
        hint = f"; make rows of this array: {to_rows(str(path))}" if is_array else ""
        try:
            line.decode()  # what is compared is not guessed at
            row, surrogates = row_of(line.rstrip())
            if not isinstance(row, dict):
                raise ExampleError(f"holds {_shown(row)}, not an object with fields{hint}")
            example = _example(row, number)
            if task.examples and type(example) is not type(task.examples[0]):
                raise ExampleError(f"is {KINDS[type(example)]}, the lines before it {task.kind}; a file holds one kind")
        except UnicodeDecodeError as error:
            raise task.wrong(number, f"is not UTF-8 at byte {error.start}; convert the file first") from None
        except ValueError as error:
            raise task.wrong(number, f"is not JSON: {error}{hint}") from None
        except ExampleError as error:
            raise task.wrong(number, str(error)) from None
        replaced += surrogates
        task.examples.append(example)
    if not task.examples:
        raise TaskError(f"task {str(path)!r} holds no examples; name a JSONL file with one per line")
    if replaced:
        cli.note(f"task {str(path)!r}: {replaced:,} lone surrogates, which are no characters, replaced by U+FFFD")
    return task


def _example(row: dict, line: int) -> Example:
    if {"query", "choices", "gold"} <= row.keys():
        choices = _texts(row["choices"], "choices")
        return Choice(line, _text(row["query"], "query"), choices, _index(row, "gold", choices))
    if {"ctx", "endings", "label"} <= row.keys():
        return _hellaswag(row, line)
    refuse_unseen(row)
    if {"text", "label"} <= row.keys():
        text, label = _text(row["text"], "text"), row["label"]
        label = str(label) if isinstance(label, int) and not isinstance(label, bool) else label
        return Labelled(line, text, _text(label, "label", may_be_empty=False))
    name = next((name for name in ("reference", "response", "completion") if name in row), None)
    if "prompt" in row and name is not None:
        references = _texts(row[name], name, at_least=1) if isinstance(row[name], list) else (
            _text(row[name], name, may_be_empty=False),)
        return Answer(line, _text(row["prompt"], "prompt"), references)
    if "messages" in row:
        return _chat(row["messages"], line)
    raise ExampleError(f"has the fields {', '.join(row) or '(none)'}; an example has query, choices, gold, or ctx, "
                       "endings, label, or text, label, or prompt, reference, or messages")


def _hellaswag(row: dict, line: int) -> Choice:
    query, endings = _text(row["ctx"], "ctx"), _texts(row["endings"], "endings")
    gold = _index(row, "label", endings)
    if {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
        activity, start, end = (_text(row[name], name) for name in ("activity_label", "ctx_a", "ctx_b"))
        # WikiHow's half holds [title], [header], [step]: removed as the harness does, to the same characters
        query, *endings = (re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
                           for text in (f"{activity}: {start} {end.capitalize()}", *endings))
        if "" in endings:
            raise ExampleError(f"endings[{endings.index('')}] is empty without its brackets; remove the line")
    return Choice(line, query, tuple(endings), gold)


def _chat(messages: object, line: int) -> Chat:
    messages = plain_messages(messages)
    if len(messages) < 2:
        raise ExampleError("has one message; it should have at least two, the last one the answer")
    if messages[-1]["role"] != "assistant":
        raise ExampleError(f"the last message is of the role {messages[-1]['role']!r}, not assistant: there is no "
                           "answer to compare with")
    answer = _text(messages[-1]["content"], "the last message's content", may_be_empty=False)
    return Chat(line, tuple(messages[:-1]), (answer,))


def _text(value: object, name: str, *, may_be_empty: bool = True) -> str:
    if not isinstance(value, str):
        raise ExampleError(f"{name} = {_shown(value)} should be a text")
    if not may_be_empty and not value.strip():
        raise ExampleError(f"{name} is empty; fill it in or remove the line")
    return value


def _texts(values: object, name: str, *, at_least: int = 2) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) < at_least:
        some = f"{at_least} text{'s' * (at_least > 1)}"
        raise ExampleError(f"{name} = {_shown(values)} should be a list of at least {some}")
    return tuple(_text(value, f"{name}[{i}]", may_be_empty=False) for i, value in enumerate(values))


def _index(row: dict, name: str, choices: tuple[str, ...]) -> int:
    value = row[name]
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):  # HellaSwag on the Hugging Face hub has texts
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(choices):
        raise ExampleError(f"{name} = {_shown(row[name])} should be the index of the right choice, 0 to "
                           f"{len(choices) - 1}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- Log-likelihoods -------------------------------------------------------------------------------------------------

Request = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a context, at least one, and of what continues it, the same


def log_likelihoods(model: GPT, requests: list[Request], *, batch_size: int) -> list[float]:
    """ln p(continuation | context) of each request, in nats. Raises TaskError if one is not finite.

    A context and a continuation after it have at most max_seq_len + 1 tokens. A context is computed once for all that
    continues it, batch_size contexts and then as many continuations at a time; equal requests get equal numbers.
    """
    continuations: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for context, continuation in requests:
        continuations.setdefault(context, set()).add(continuation)
    nats: dict[Request, float] = {}
    with cli.progress(desc="scoring", total=len(continuations), unit=" contexts") as bar:
        for contexts in _batches(continuations, batch_size, model.config.max_seq_len):
            nats |= _score_batch(model, contexts, [sorted(continuations[c]) for c in contexts], batch_size)
            bar.update(len(contexts))
    if not all(map(math.isfinite, nats.values())):
        raise TaskError("the model's log-likelihoods are not finite; try --dtype float32, or an earlier checkpoint")
    return [-nats[request] for request in requests]


def _batches(continuations: dict[tuple[int, ...], set[tuple[int, ...]]], batch_size: int,
             max_seq_len: int) -> Iterator[list[tuple[int, ...]]]:
    """Contexts in batches of about one length, the longest first: what does not fit into memory fails at once. The
    cache has as many slots as the longest context and the longest continuation of the batch need together."""
    batch: list[tuple[int, ...]] = []
    longest = 0  # tokens that a continuation of the batch adds to the cache
    for context in sorted(continuations, key=len, reverse=True):
        added = max(map(len, continuations[context])) - 1
        if batch and (len(batch) == batch_size or len(batch[0]) + max(longest, added) > max_seq_len):
            yield batch
            batch, longest = [], 0
        batch.append(context)
        longest = max(longest, added)
    yield batch


@torch.inference_mode()
def _score_batch(model: GPT, contexts: list[tuple[int, ...]], continuations: list[list[tuple[int, ...]]],
                 batch_size: int) -> dict[Request, float]:
    """-ln p of each continuation of each context. The contexts pass through the model once, into a cache; rows of it
    are copied for the continuations, which pass without their last tokens."""
    hidden, cache = sample.prefill(model, [list(context) for context in contexts], new_tokens=0)
    last = hidden[:, -1]  # (Q, C)
    pairs = sorted(((q, continuation) for q, several in enumerate(continuations) for continuation in several),
                   key=lambda pair: len(pair[1]))
    nats = {}
    for first in range(0, len(pairs), batch_size):
        part = pairs[first:first + batch_size]
        rows = torch.tensor([q for q, _ in part], device=last.device)  # (R,)
        T = len(part[-1][1])
        targets = torch.tensor([[*c, *[IGNORED] * (T - len(c))] for _, c in part], device=last.device)  # (R, T)
        hidden = last[rows][:, None]  # (R, 1, C) predicts the first token of each continuation
        if T > 1:  # padding stands behind the tokens, where nothing that counts sees it
            following = model.hidden(targets[:, :-1].clamp(min=0), cache=_copy_rows(model, cache, rows, T - 1))
            hidden = torch.cat((hidden, following), dim=1)  # (R, T, C)
        scored = targets != IGNORED
        losses = kernels.linear_cross_entropy(
            hidden[scored], model.head_weight, targets[scored], vocab_size=model.config.vocab_size, reduction="none",
            softcap=model.config.logit_softcap)
        lengths = [len(continuation) for _, continuation in part]
        for (q, continuation), loss in zip(part, losses.cpu().double().split(lengths), strict=True):
            nats[contexts[q], continuation] = loss.sum().item()
    return nats


def _copy_rows(model: GPT, cache: KVCache, rows: Tensor, more_slots: int) -> KVCache:
    """A cache that begins with rows (R,) of another, one of which may be there many times, and has more slots."""
    copy = KVCache(model.config, batch=len(rows), dtype=cache.keys[0].dtype, device=rows.device,
                   slots=cache.length + more_slots, padding=None if cache.padding is None else cache.padding[rows])
    for layer in range(model.config.n_layer):
        copy.append(layer, cache.keys[layer][rows], cache.values[layer][rows])
    copy.length = cache.length
    return copy


# ---- Multiple choice -------------------------------------------------------------------------------------------------

def multiple_choice(model: GPT, tokenizer: Tokenizer, task: Task, *, batch_size: int) -> tuple[dict, list[dict]]:
    """The scores, and of each example the prediction.

    acc: the likeliest choice is right; acc_norm and acc_bytes: the likeliest per character (as the harness's acc_norm)
    and per byte. The lowest index of equals counts. A context too long loses its first tokens, as in the harness.
    """
    config, requests, truncated = model.config, [], set()
    for example in task.examples:
        for i, choice in enumerate(example.choices):
            context, continuation = encode_pair(tokenizer, example.query, f" {choice}", config.vocab_size)
            if not continuation:
                raise task.wrong(example.line, f"choice {i} adds no token to the query; remove the line")
            if len(continuation) > config.max_seq_len:
                raise task.wrong(example.line, f"choice {i} has {len(continuation):,} tokens, more than the context of "
                                               f"{config.max_seq_len:,}; shorten it or remove the line")
            room = config.max_seq_len + 1 - len(continuation)
            requests.append((context[-room:], continuation))
            if len(context) > room:
                truncated.add(example.line)
    values = iter(log_likelihoods(model, requests, batch_size=batch_size))
    rows = []
    for example in task.examples:
        likelihoods = [next(values) for _ in example.choices]
        lengths = {"acc": 1.0, "acc_norm": [len(choice) for choice in example.choices],
                   "acc_bytes": [len(choice.encode()) for choice in example.choices]}
        chosen = {name: int(np.argmax(np.divide(likelihoods, each))) for name, each in lengths.items()}
        rows.append({"line": example.line, "gold": example.gold, "predictions": chosen, "log_likelihoods": likelihoods})
    result = {}
    for name in lengths:
        hits = [float(row["predictions"][name] == row["gold"]) for row in rows]
        result[name], result[f"{name}_stderr"] = scores.mean_and_stderr(hits)
    return result | {"truncated": len(truncated)}, rows


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, vocab_size: int) -> Request:
    """Both texts' ids as the harness splits them: blanks that end the context begin the continuation, the whole is
    encoded, and what follows as many ids as the context alone has is the continuation's. What begins every text, or
    stands for an empty context, is the context's."""
    before, whole = (sample.known_ids(tokenizer.encode(text), vocab_size)
                     for text in (context.rstrip(), context + continuation))
    start = [tokenizer.start] if tokenizer.bos_token is not None or not before else []
    return (*start, *before), tuple(whole[len(before):])


# ---- Classification and generation -----------------------------------------------------------------------------------

def encode_asked(config: ModelConfig, tokenizer: Tokenizer, task: Task, template: str | None = None, *,
                 too_long: str, label_tokens: int = 1, max_new_tokens: int = 1) -> tuple[list[list[int]], int]:
    """The ids of each example's text, prompt or messages, and of how many examples tokens were cut to fit the context:
    a text leaves room for the longest label, a longer prompt answer_room. Raises TaskError, also if too_long = "error"
    and one does not fit."""
    if task.kind == "chat" and template is None:
        raise TaskError(f"task {str(task.path)!r} holds messages, but the run has no chat template: it was not "
                        "trained on chats; give the task as lines of prompt, reference")
    max_seq_len, contexts, cut_examples = config.max_seq_len, [], 0
    room, free = max_seq_len + 1 - label_tokens, answer_room(max_seq_len, max_new_tokens)
    if room < 1:
        raise TaskError(f"the longest label has {label_tokens:,} tokens, more than the context of {max_seq_len:,}; "
                        "shorten it")
    for example in task.examples:
        try:
            if isinstance(example, Chat):
                ids, cut = fit_chat(tokenizer, template, list(example.messages), room, free=free)
            else:
                asked = example.text if isinstance(example, Labelled) else example.prompt
                ids = encode_prompt(tokenizer, asked, parse_special=task.parse_special)
                ids, cut = fit_prompt(tokenizer, ids, room, free=free)
        except ChatError as error:
            raise task.wrong(example.line, str(error)) from None
        if cut and too_long == "error":
            what, label = ("text", f" and the longest label {label_tokens}") if isinstance(example, Labelled) else (
                "prompt", "")
            raise task.wrong(example.line, f"the {what} has {len(ids) + cut:,} tokens{label}, more than the context of "
                             f"{max_seq_len:,}; shorten it or remove the line (the run's data.too_long is error)")
        contexts.append(sample.known_ids(ids, config.vocab_size))
        cut_examples += cut > 0
    return contexts, cut_examples


def classification(model: GPT, tokenizer: Tokenizer, task: Task, labels: list[str], *, batch_size: int,
                   too_long: str = "cut") -> tuple[dict, list[dict]]:
    """The scores, and of each example the prediction. Each label is scored as what follows the text, encoded on its own
    as in fine-tuning; the likeliest is predicted, the first of equals. too_long: the run's, "error" cuts no text."""
    spelled, has_end = encode_labels(tokenizer, labels, model.config.vocab_size)
    contexts, cut = encode_asked(model.config, tokenizer, task, too_long=too_long, label_tokens=max(map(len, spelled)))
    requests = [(tuple(context), label) for context in contexts for label in spelled]
    values = np.reshape(log_likelihoods(model, requests, batch_size=batch_size), (-1, len(labels)))
    predicted, expected = values.argmax(axis=1), [labels.index(example.label) for example in task.examples]
    rows = [{"line": example.line, "text": example.text, "label": example.label, "prediction": labels[choice],
             "log_likelihoods": dict(zip(labels, nats, strict=True))}
            for example, choice, nats in zip(task.examples, predicted, values.tolist(), strict=True)]
    acc, stderr = scores.mean_and_stderr([float(row["label"] == row["prediction"]) for row in rows])
    confusion = scores.confusion_matrix(expected, predicted.tolist(), len(labels))
    by_class = {name: column.tolist() for name, column in scores.class_scores(confusion).items()}
    result = {"acc": acc, "acc_stderr": stderr,
              "macro": {name: math.fsum(by_class[name]) / len(labels) for name in ("precision", "recall", "f1")},
              "classes": {label: {name: column[k] for name, column in by_class.items()}
                          for k, label in enumerate(labels)},
              "labels": labels, "confusion": confusion.tolist(), "end_of_text_scored": has_end, "cut": cut}
    return result, rows


def choose_labels(task: Task, names: list[str] | None) -> list[str]:
    """The set of labels: those of the file, sorted, or of one comma-separated list, or the names as they are if there
    are more. Raises TaskError, also for labels of the file that differ in blanks only."""
    by_words: dict[str, Labelled] = {}
    for example in task.examples:
        other = by_words.setdefault(" ".join(example.label.split()), example)
        if other.label != example.label:
            raise task.wrong(example.line, f"label {example.label!r} differs from {other.label!r} of line {other.line} "
                                           "in blanks only; spell them alike")
    if names is None:
        labels = sorted({example.label for example in task.examples})
        if len(labels) == 1:
            raise TaskError(f"task {str(task.path)!r} has one label only, {labels[0]!r}; name the set with --labels")
        return labels
    labels = [name.strip() for name in names[0].split(",")] if len(names) == 1 else names
    if "" in labels or len(set(labels)) < max(2, len(labels)):
        raise TaskError(f"--labels {' '.join(map(repr, names))} should be two labels or more, no two equal, with "
                        "commas between them or a --labels before each")
    for example in task.examples:
        if example.label not in labels:
            raise task.wrong(example.line, f"label {_shown(example.label)} is not in --labels {','.join(labels)}; add "
                                           "it there or mend the line")
    return labels


def encode_labels(tokenizer: Tokenizer, labels: list[str], vocab_size: int) -> tuple[list[tuple[int, ...]], bool]:
    """The ids of ' label' each behind a text, and whether end-of-text stands behind them: it does if one label's ids
    begin another's, which otherwise could never be the likelier one."""
    spelled = [tuple(sample.known_ids(tokenizer.encode(f" {label}", behind="text"), vocab_size)) for label in labels]
    if len(set(spelled)) < len(labels):
        raise TaskError(f"labels {', '.join(map(repr, labels))}: to the run's tokenizer two of them are the same text")
    needs_end = any(a != b and b[:len(a)] == a for a in spelled for b in spelled)
    return [(*ids, tokenizer.eot) if needs_end else ids for ids in spelled], needs_end


def generation(model: GPT, tokenizer: Tokenizer, task: Task, template: str | None, *, ends: frozenset[int],
               metrics: tuple[str, ...], max_new_tokens: int, stop: tuple[str, ...], batch_size: int,
               too_long: str = "cut") -> tuple[dict, list[dict]]:
    """The scores of the greedy continuations of the prompts, and of each example the prediction. template: the run's,
    for a chat; ends: the run's end_ids; too_long: the run's, "error" cuts no prompt. A continuation ends with one of
    ends, before a stop text, or unfinished: at max_new_tokens, or where the context is full, since a model that no
    longer sees its prompt answers nothing. What a template writes before its answers is no part of one."""
    template = template if task.kind == "chat" else None
    prompts, cut = encode_asked(model.config, tokenizer, task, template, too_long=too_long,
                                max_new_tokens=max_new_tokens)
    texts, finished = continue_greedily(model, tokenizer, prompts, ends=ends, max_new_tokens=max_new_tokens, stop=stop,
                                        batch_size=batch_size)
    if template is not None:
        lead = answer_lead(tokenizer, template)
        texts = [text.removeprefix(lead) for text in texts]
    result, each = scores.text_scores(texts, [example.references for example in task.examples], metrics)
    rows = [{**asdict(example), "prediction": text, "finished": is_finished, **score}
            for example, text, is_finished, score in zip(task.examples, texts, finished, each, strict=True)]
    return result | {"unfinished": finished.count(False), "cut": cut}, rows


def continue_greedily(model: GPT, tokenizer: Tokenizer, contexts: list[list[int]], *, ends: frozenset[int],
                      max_new_tokens: int, stop: tuple[str, ...],
                      batch_size: int) -> tuple[list[str], list[bool]]:
    """The text that follows each context up to one of the tokens that end it, and whether it came to its end."""
    texts, finished = [""] * len(contexts), [False] * len(contexts)
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]), reverse=True)  # alike beside alike
    with cli.progress(desc="generating", total=len(contexts), unit=" prompts") as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first:first + batch_size]
            streams = {i: sample.TextStream(tokenizer, contexts[i], stop, ends) for i in batch}
            room = {i: min(max_new_tokens, model.config.max_seq_len + 1 - len(contexts[i])) for i in batch}
            steps = sample.generate(model, [contexts[i] for i in batch], max_new_tokens=max(room.values()),
                                    sampling=sample.Sampling(temperature=0.0))
            for count, tokens in enumerate(steps, start=1):
                for i, token in zip(batch, tokens, strict=True):
                    if i in streams:
                        texts[i] += streams[i].add(token, is_last=count == room[i])
                        if streams[i].finish is not None:
                            finished[i] = streams.pop(i).finish == "stop"
                            bar.update(1)
                if not streams:
                    break
    return texts, finished
