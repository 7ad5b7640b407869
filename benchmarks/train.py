"""bench.py train: our train.py beside nanoGPT's, in speed and in loss."""

import argparse
import itertools
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
import cli
import convert
import devices
import eval as evaluation
import sample
from benchmarks import measure
from benchmarks.measure import CHECKOUT, CPU, NANOGPT
from config import MachineError, ModelConfig, UserError, parse_arguments
from data.sources import STDLIB
from model import GPT, padded_vocab_size

DEFAULT_CONFIGS = (("shakespeare_nanogpt.toml",), ("shakespeare_nanogpt.toml", "train.dtype=float32"),
                   ("shakespeare.toml",))
DEFAULT_TEXT_BYTES = 1_115_394  # of python-stdlib where no text is named: as much as tinyshakespeare has
WARMUP_STEPS = 20
VAL_FRACTION = 0.1  # nanoGPT's, the end of the text
SCORE_WINDOW = 64  # characters of context that every model is scored with
NANOGPT_HEADS, NANOGPT_CONTEXT, NANOGPT_BATCH = 4, 64, 12

# Runs a script that leaves `model` in its globals, without its fixed seed; says when it ended, then saves the weights.
NANOGPT_TRAIN = """
import runpy, sys, time, torch
seed, weights_file, *sys.argv[1:] = sys.argv[1:]
set_seed = torch.manual_seed
torch.manual_seed = lambda _: set_seed(int(seed))
model = runpy.run_path("train.py", run_name="__main__")["model"]
print("ended at", time.monotonic())
from safetensors.torch import save_file
tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}  # tied to wte
save_file(tensors, weights_file)
"""


def add_to(commands) -> None:
    parser = measure.command(commands, run, "Speed and loss of train.py, beside nanoGPT.", repeats=1, peer=True)
    parser.add_argument("--config", nargs="+", action="append", metavar="WORD",
                        help="FILE.toml and overrides of one contender; may be given again (default: "
                             + "; ".join(" ".join(words) for words in DEFAULT_CONFIGS) + ")")
    parser.add_argument("--data", metavar="SOURCE", help=f"text, all of it used; left out = 1.1 MB of {STDLIB}")
    parser.add_argument("--seeds", nargs="+", type=cli.whole, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    parser.add_argument("--peer-steps", type=cli.count, default=2000, metavar="N", help="nanoGPT's; default 2000")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    """Every config and the peer, trained once per seed and repeat, timed from outside and scored alike."""
    configs = args.config or [[str(CHECKOUT / "configs" / name), *overrides] for name, *overrides in DEFAULT_CONFIGS]
    words_of = {measure.label(words): words for words in configs}
    if len(words_of) < len(configs):
        raise UserError("--config names the same contender twice; leave one out (--repeats repeats all)")
    for words in configs:
        parse_arguments(words)  # a mistake ends the benchmark before the first run
    text = read_text(args.data)
    val_text = text[int(len(text) * (1 - VAL_FRACTION)):]
    setting = {
        "dtype": "float32, or where a config says auto: {} ({})".format(*devices.choose_dtype("auto", CPU)),
        "text": f"{args.data or STDLIB}, {len(text):,} characters, {len(set(text))} different ones",
        "loss": f"the last {len(val_text):,} characters but the first, windows of {SCORE_WINDOW}, float32",
        "seeds": args.seeds}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as temporary:
        text_file = Path(temporary, "input.txt")
        text_file.write_text(text, encoding="utf-8", newline="")
        contenders = {name: partial(_train_ours, words, itertools.cycle(args.seeds), text_file, val_text)
                      for name, words in words_of.items()}
        if args.peer:
            copy = Path(temporary, "nanogpt")
            for name in measure.NANOGPT_FILES:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(args.peer / name, copy / name)
            prepare = copy / measure.NANOGPT_FILES[-1]
            shutil.copy(text_file, prepare.with_name("input.txt"))
            contenders[NANOGPT] = partial(_train_nanogpt, copy, args.peer_steps, itertools.cycle(args.seeds),
                                          sorted(set(text)), val_text)
            setting["peer"] = f"{args.peer}, commit {cli.commit(args.peer)}"
            try:
                seconds = measure.run_to_end(sys.executable, str(prepare), cwd=copy).seconds
                setting["peer"] += f", its data prepared apart in {seconds:.2f} s"
            except MachineError as error:
                figures.leave_out(NANOGPT, str(error), is_ours=False)
        figures.take_turns(contenders, args.repeats * len(args.seeds), peers=(NANOGPT,))
    for name in words_of:
        figures.add_ratios(f"{name} / {NANOGPT}", name, NANOGPT, "steps/s", "tokens/s", "wall s", "peak MiB",
                           "val nats/char")
    return setting


def read_text(source: str | None) -> str:
    """All text of a source, lines ended by a newline alone, as Python reads text files (nanoGPT does)."""
    limit = DEFAULT_TEXT_BYTES if source is None else float("inf")
    text = "".join(measure.read_documents(source or STDLIB, limit_bytes=limit))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _train_ours(words: list[str], seeds: Iterator[int], text_file: Path, val_text: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=text_file.parent) as folder:
        run_dir = Path(folder, "run")
        done = measure.run_to_end(
            sys.executable, str(CHECKOUT / "train.py"), "train.device=cpu", *words, "train.log_every=1",
            f"train.seed={next(seeds)}", f"train.out_dir={run_dir}", f"data.dir={folder}/shards",
            f"data.source={text_file}", "data.val_source=[]", f"data.val_fraction={VAL_FRACTION}", cwd=Path.cwd())
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        model, tokenizer = sample.load_model(run_dir, device=CPU, dtype="float32", note=lambda line: None)
    return {**speed([row for row in rows if row["kind"] == "train"], parse_arguments(words)[0].train.tokens_per_step),
            "wall s": done.seconds, "peak MiB": done.peak_bytes / 2 ** 20,
            "val nats/char": nats_per_character(model, tokenizer.encode(val_text), tokenizer.token_bytes(), val_text)}


def speed(steps: list[dict], tokens_per_step: int) -> dict[str, float]:
    """Medians of all steps but the first 20, of a short run at least half. "seconds" of each, and "mfu" if known."""
    steps = steps[min(WARMUP_STEPS, len(steps) // 2):]
    seconds = statistics.median(step["seconds"] for step in steps)
    mfu = [100 * step["mfu"] for step in steps if step.get("mfu") is not None]
    return {"ms/step": 1e3 * seconds, "steps/s": 1 / seconds, "tokens/s": tokens_per_step / seconds,
            **({"mfu %": statistics.median(mfu)} if mfu else {})}


def nats_per_character(model: GPT, ids: np.ndarray, token_bytes: np.ndarray, text: str) -> float:
    """Loss over all of a text but its first token, in windows that do not overlap; ids (n,) encode it."""
    window = min(SCORE_WINDOW, model.config.max_seq_len)
    batches = evaluation.text_batches(ids[1:], eot=int(ids[0]), seq_len=window, batch_size=64, device=CPU)
    score = evaluation.evaluate(model, batches, token_bytes=token_bytes, device=CPU)
    characters = score.bytes * len(text) / len(text.encode())
    return score.loss * score.tokens / characters


def _train_nanogpt(copy: Path, steps: int, seeds: Iterator[int], alphabet: list[str],
                   val_text: str) -> dict[str, float]:
    """README's CPU demo of nanoGPT."""
    weights = copy / "weights.safetensors"
    done = measure.run_to_end(
        sys.executable, "-c", NANOGPT_TRAIN, str(next(seeds)), str(weights), "config/train_shakespeare_char.py",
        "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", f"--block_size={NANOGPT_CONTEXT}",
        f"--batch_size={NANOGPT_BATCH}", "--n_layer=4", "--n_embd=128", f"--n_head={NANOGPT_HEADS}",
        f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--dropout=0.0", cwd=copy)
    steps_ms = re.findall(r"^iter \d+: loss .*?, time ([\d.]+)ms", done.output, re.MULTILINE)
    if not steps_ms:
        raise MachineError(f"nanoGPT printed no step times: {measure.last_line(done.output)}")
    model = gpt_from_nanogpt(load_file(weights), n_head=NANOGPT_HEADS)
    return {**speed([{"seconds": float(ms) / 1e3} for ms in steps_ms], NANOGPT_BATCH * NANOGPT_CONTEXT),
            "wall s": float(re.search(r"ended at ([\d.]+)", done.output)[1]) - done.started,
            "peak MiB": done.peak_bytes / 2 ** 20,
            "val nats/char": nats_per_character(model, *encode_characters(val_text, alphabet), val_text)}


def encode_characters(text: str, alphabet: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """nanoGPT's ids of characters, their places in the sorted alphabet (n,); bytes of each id (V,)."""
    places = {character: place for place, character in enumerate(alphabet)}
    return (np.array([places[character] for character in text]),
            np.array([len(character.encode()) for character in alphabet], dtype=np.int32))


def gpt_from_nanogpt(tensors: dict[str, Tensor], *, n_head: int) -> GPT:
    """Our model, in float32 and eval mode, with the weights of nanoGPT's state_dict (without its tied lm_head)."""
    wte, wpe = tensors["transformer.wte.weight"], tensors["transformer.wpe.weight"]
    model = GPT(ModelConfig(
        n_layer=sum(name.endswith(".attn.c_attn.weight") for name in tensors), n_head=n_head, n_embd=wte.shape[1],
        vocab_size=len(wte), max_seq_len=len(wpe), mlp="gelu_exact", bias="transformer.ln_f.bias" in tensors))
    names = {theirs: rule.ours for rule in convert.rules(model.config, "gpt2") for theirs in rule.theirs}
    ours = {names[theirs]: tensor for theirs, tensor in tensors.items()}  # named as in transformers, not transposed
    ours["wte.weight"] = F.pad(wte, (0, 0, 0, padded_vocab_size(len(wte)) - len(wte)))
    checkpoint.load_into(model, ours, "nanoGPT's model")
    return model.eval()
