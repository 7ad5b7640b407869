"""Data made ready for train.py: which folder of shards it is, whether it is prepared, and if not, prepare.py run on it.

prepare.py runs in a process of its own, for its workers import what their parent's main module imports: here torch.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cli
from config import ConfigError, DataConfig, MachineError
from data.chat import DEFAULT_TEMPLATE
from data.dataset import INDEX_FILE, load_index
from data.examples import Packing, template_hash
from data.output_folder import PROGRESS_FILE, another_folder, refuse_differences
from data.prepare import DEFAULT_TOKENIZER, PreparationStopped
from data.rows import CHAT, PROMPT_RESPONSE, TEXT, find_kind
from data.sources import STDLIB, SourceError, describe, find_files
from data.tokenizer import TOKENIZER_FILE, tokenizer_identity

CHECKOUT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 1.0
CHILD_POLL_SECONDS = 0.05
NOTE_SECONDS = 30.0


def data_dir_for(data: DataConfig, max_seq_len: int | None = None, chat_template: str = DEFAULT_TEMPLATE) -> Path:
    """The folder of shards: data.dir, else shards/<name of the first source>-<hash of the data settings>; of examples
    with max_seq_len, data.too_long and (chat) the template among the settings."""
    if data.dir is not None:
        return Path(data.dir)
    if not data.source:
        raise ConfigError("data.source and data.dir are both left out; name text (data.source=mybook.txt) or a folder "
                          "of shards (data.dir=shards/mybook)")
    tokenizer = tokenizer_identity(data.tokenizer or DEFAULT_TOKENIZER)  # a copied or moved file is the same
    name = re.sub(r"[*?[\]]", "", Path(os.path.abspath(data.source[0])).name.partition(".")[0]) or "text"
    for sources in ((data.source, data.val_source), tuple(map(_one_spelling, (data.source, data.val_source)))):
        settings = [*sources, tokenizer, data.val_fraction, data.text_field]
        settings += [data.kind] * (data.kind == TEXT) + ["parse_special"] * data.parse_special
        of_examples = [*settings, max_seq_len, *([] if data.too_long == "cut" else [data.too_long])]
        of_chats = [*of_examples, template_hash(chat_template)]
        folders = {kind: Path("shards", f"{name}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]}")
                   for kind, words in ((TEXT, settings), (PROMPT_RESPONSE, of_examples), (CHAT, of_chats))}
        for folder in folders.values():
            if (folder / INDEX_FILE).exists():  # its source may be gone; as typed: it may be older than one spelling
                return folder
    try:
        kind = find_kind([file for source in data.source for file in find_files(source)], data.text_field, data.kind,
                         skip_bad=data.bad_rows == "skip")
    except SourceError:  # prepare() says it
        kind = TEXT
    return folders.get(kind, folders[PROMPT_RESPONSE])


def _one_spelling(sources: tuple[str, ...]) -> list[str]:
    """book.txt for book.txt, ./book.txt and $PWD/book.txt: below this folder relative to it, else absolute."""
    here = os.getcwd()
    full = {source: os.path.abspath(source) for source in sources if source != STDLIB}
    return [source if source == STDLIB else os.path.relpath(full[source]) if Path(full[source]).is_relative_to(here)
            else full[source] for source in sources]


def ensure_prepared(data: DataConfig, max_seq_len: int, chat_template: str | None = None, *, local_rank: int = 0,
                    should_stop: Callable[[], bool] = lambda: False) -> Path:
    """The folder of shards, prepared first if it is not: by a process that local rank 0 starts, while the other ranks
    wait for index.json. max_seq_len, chat_template (its text; None: the plain one): for examples.

    For every rank to call before the process group exists. Raises ConfigError if the folder was made with other
    settings or holds nothing, PreparationStopped if should_stop() says so, SystemExit with its status if the process
    failed and said why.
    """
    template = DEFAULT_TEMPLATE if chat_template is None else chat_template
    folder = data_dir_for(data, max_seq_len, template)
    if not data.source:
        _check_given_folder(folder, data)
        return folder
    started = noted = time.monotonic()
    while not _is_prepared(folder, data, max_seq_len, template):
        if local_rank == 0 and _prepare_in_a_process(folder, data, max_seq_len, template, should_stop):
            break
        if should_stop():
            raise PreparationStopped(f"stopped while {str(folder)!r} was being prepared")
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            cli.note(f"waiting for {folder / INDEX_FILE}, {noted - started:.0f} s so far")
        time.sleep(POLL_SECONDS)
    return folder


def _prepare_in_a_process(folder: Path, data: DataConfig, max_seq_len: int, chat_template: str,
                          should_stop: Callable[[], bool], *workers: str) -> bool:
    """Run prepare.py, whose notes and error go to our stderr and which ends when this process does; False if another
    process, of another node or job, is at it. If one of its workers dies, it goes on without any."""
    val = [f"--val={source}" for source in data.val_source] or [f"--val-fraction={data.val_fraction}"]
    command = [sys.executable, "-P", "-m", "data.prepare", f"--out={folder}", f"--parent={os.getpid()}",
               f"--tokenizer={data.tokenizer or DEFAULT_TOKENIZER}", *val, f"--text-field={data.text_field}",
               f"--kind={data.kind}", f"--max-seq-len={max_seq_len}", "--chat-template=-",
               f"--too-long={data.too_long}", f"--bad-rows={data.bad_rows}",
               *["--parse-special"] * data.parse_special, *workers, "--", *data.source]
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path},
                             process_group=0)  # Ctrl-C is for this process, which stops the other in order
    with suppress(BrokenPipeError), child.stdin:
        child.stdin.write(chat_template.encode())
    while child.poll() is None and not should_stop():
        time.sleep(CHILD_POLL_SECONDS)
    child.terminate()  # unless it has ended
    status = child.wait()
    if status in (0, os.EX_TEMPFAIL):
        return status == 0
    if status == os.EX_OSERR and not workers:
        cli.note("a worker process died (out of memory?): preparing goes on in a single process, which takes less")
        return _prepare_in_a_process(folder, data, max_seq_len, chat_template, should_stop, "--workers=1")
    number = signal.SIGKILL if status == os.EX_OSERR else -status if status < 0 else status - 128
    if number < 0:
        sys.exit(status)  # it has said why
    if should_stop():
        raise PreparationStopped(f"stopped while preparing {str(folder)!r}")
    raise MachineError(f"preparing {str(folder)!r} was ended by signal {number} ({signal.strsignal(number)}; out of "
                       "memory?); the same command goes on from there")


def _is_prepared(folder: Path, data: DataConfig, max_seq_len: int, chat_template: str) -> bool:
    """Whether the folder is finished. Raises ConfigError if it was made with other settings."""
    index = load_index(folder)
    if index is None:
        return False
    ours = {"val_fraction": None if data.val_source else data.val_fraction, "text_field": data.text_field,
            "bad_rows": data.bad_rows, "parse_special": data.parse_special, **_tokenizer_setting(index, data)}
    kind = index.get("settings", {}).get("kind")
    if TEXT in (kind, data.kind):
        ours |= {"kind": data.kind}
    elif kind is not None:
        ours |= Packing(kind, max_seq_len, chat_template, data.too_long).settings
    try:
        ours |= _described(data, content=False)
    except SourceError as error:
        cli.note(f"{error}; using {folder}, which was made from it")
    refuse_differences(folder, index, ours, way_out=another_folder(folder))
    return True


def check_content(folder: Path, data: DataConfig) -> None:
    """For one rank to call when ensure_prepared() is through, for it reads the sources: raise ConfigError if what is in
    them is not what the folder was made from. Folders from before content was recorded are taken as they are; those
    from before CHAT_FORMAT, too, and it says so."""
    made = (load_index(folder) or {}).get("settings", {})
    if made.get("kind") == CHAT and "chat_format" not in made:
        cli.note(f"{folder} was prepared by an earlier version, for which the loss counted other tokens of a chat: a "
                 "run that goes on keeps to it; for a new run prepare the chats anew (name another data.dir, or remove "
                 "this folder)")
    if any("content" in source for key in ("sources", "val_sources") for source in made.get(key, [])) and data.source:
        with suppress(SourceError):  # it is gone: ensure_prepared() said so
            refuse_differences(folder, {"settings": made}, _described(data, content=True),
                               way_out=another_folder(folder))


def _described(data: DataConfig, *, content: bool) -> dict:
    return {"sources": [describe(source, content=content) for source in data.source],
            "val_sources": [describe(source, content=content) for source in data.val_source]}


def _tokenizer_setting(index: dict, data: DataConfig) -> dict:
    """The tokenizer to compare with that of an index: none if it is left out or the index's own tokenizer.json."""
    if data.tokenizer is None:
        return {}
    identity = tokenizer_identity(data.tokenizer)
    _, plus, end_of_text = index.get("tokenizer", "").partition("+")  # see tokenizer_identity
    own = f"{TOKENIZER_FILE}:{index.get('tokenizer_sha256', '')[:12]}{plus}{end_of_text}"
    return {} if identity == own else {"tokenizer": identity}


def _check_given_folder(folder: Path, data: DataConfig) -> None:
    """Raise ConfigError unless the folder holds shards, ours or (with data.tokenizer) foreign ones."""
    index = load_index(folder)
    if index is not None:
        refuse_differences(folder, index, _tokenizer_setting(index, data),
                           way_out="leave data.tokenizer out, or name another data.dir")
    elif (folder / PROGRESS_FILE).exists():
        raise ConfigError(f"data.dir = {str(folder)!r} is not finished; give the command that began it again")
    elif not any(folder.glob("*train*.bin")):
        raise ConfigError(f"data.dir = {str(folder)!r} holds neither {INDEX_FILE} nor *train*.bin; set data.source to "
                          "prepare text into it")
    elif data.tokenizer is None:
        raise ConfigError(f"data.dir = {str(folder)!r} holds shards without {INDEX_FILE}; set data.tokenizer to the "
                          "one they were made with (gpt2, most often)")
