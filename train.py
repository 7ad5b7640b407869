"""Train a GPT: config -> data, model, optimizer -> train_step() -> log, evaluate, sample, save.

python train.py [FILE.toml ...] [section.key=value ...]                 one process; configs/demo.toml if no FILE
torchrun --standalone --nproc_per_node=N train.py [FILE.toml ...] ...   the same run on N ranks

The same command again goes on where the run stopped. Batch k is a pure function of (seed, k), so there is no loader
state and no RNG state to save: a checkpoint is weights, moments, and counters.
"""

import contextlib
import dataclasses
import faulthandler
import hashlib
import json
import math
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoint
import config as configuration
import distributed
import eval as evaluation
import metrics
import sample
from config import Config, ConfigError, MachineError, UserError
from data.chat import TEMPLATE_FILE, load_template, save_template
from data.loader import MicroBatch, TrainLoader, ValLoader
from data.prepare import PreparationStopped
from data.prepared import ensure_prepared
from data.shards import Dataset, open_dataset, open_split
from data.tokenizer import Tokenizer, load_tokenizer
from data.verify_shards import BackgroundVerifier
from distributed import World
from finetune import lora
from model import GPT, flops_per_token
from optim import LossScale, Optimizer, clip_gradients, learning_rate
from start import (
    Progress,
    Start,
    agree_on_start,
    base_tensors,
    chat_template_for,
    check_kernels_can_run,
    check_same_tokenizer,
    choose_kernels,
    describe,
    inherit,
    load_start,
    parent_of,
    resolve_config,
)

DEMO = Path(__file__).parent / "configs" / "demo.toml"
MAX_SKIPS_IN_A_ROW = 10
SAMPLE_TOKENS = 128
YARDSTICK_TOKENS = 1_000_000  # of validation text for gzip and xz, which need a second per 2 MB


# ----------------------------------------------------------------------------------------------------------------------
# One optimizer step

@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the global batch, nats per token; may be inf or nan
    grad_norm: float  # before clipping; may be inf or nan
    skipped: bool  # loss or gradient was not finite: nothing was updated


def train_step(model: nn.Module, optimizer: Optimizer, micro_batches: list[MicroBatch], *, lr: float,
               tokens_per_step: int, grad_clip: float, scale: LossScale, step: int, seed: int = 0,
               dropout: float = 0.0, world: World = World()) -> StepResult:  # noqa: B008
    """Forward and backward over this rank's micro_batches, then one update with the gradient of the global mean loss.

    model is a GPT, or one wrapped by distributed.wrap. tokens_per_step counts the targets of all ranks' micro-batches;
    where a loss mask leaves some out, the mean is over those that remain, of all ranks together. step counts completed
    steps. A loss or gradient that is not finite on any rank changes nothing on any rank.
    """
    model.zero_grad(set_to_none=True)
    scored = tokens_per_step
    if micro_batches[0].scored is not None:
        counts = torch.tensor(sum(batch.scored for batch in micro_batches), device=micro_batches[0].tokens.device)
        scored = max(1, int(distributed.sum_over_ranks(counts, world)))  # of none at all, loss and gradients are 0
    nats = torch.zeros((), device=micro_batches[0].tokens.device)
    for i, batch in enumerate(micro_batches):
        if dropout > 0.0:
            torch.manual_seed(dropout_seed(seed, step, batch.first_window))
        # Gradients meet the other ranks' only in the last backward; no_sync must cover the forward too.
        with distributed.gradient_sync(model, sync=i == len(micro_batches) - 1):
            batch_nats = model(batch.tokens, batch.targets, document_ids=batch.document_ids, reduction="sum")
            # Ranks' gradients are averaged: times world.size they are summed, over the scored targets that is the mean.
            (batch_nats * (scale.scale * world.size / scored)).backward()
        nats += batch_nats.detach()
    loss = (distributed.sum_over_ranks(nats, world) / scored).item()
    if scale.scale != 1.0:
        torch._foreach_mul_([p.grad for p in model.parameters() if p.requires_grad], 1.0 / scale.scale)
    grad_norm = clip_gradients(model, grad_clip).item()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        optimizer.step(lr)
    scale.update(finite)
    return StepResult(loss, grad_norm, skipped=not finite)


def dropout_seed(seed: int, step: int, first_window: int) -> int:
    """63 bits that depend on nothing but where in the run a micro-batch stands."""
    digest = hashlib.blake2b(f"dropout {seed} {step} {first_window}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ----------------------------------------------------------------------------------------------------------------------
# Stopping: SIGTERM, SIGINT and SIGUSR1 end the run at the next step boundary, on all ranks together

class StopRequest:
    """Set by a signal, polled by the loop. A second Ctrl-C does not wait."""

    def __init__(self):
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __call__(self) -> bool:
        return self.signal is not None


# ----------------------------------------------------------------------------------------------------------------------
# The run

class Run:
    """Everything that one rank holds while it trains, and what it does between steps."""

    def __init__(self, config: Config, *, model: GPT, wrapped: nn.Module, optimizer: Optimizer, progress: Progress,
                 tokenizer: Tokenizer, dataset: Dataset, loader: TrainLoader, val_loader: ValLoader,
                 device: torch.device, world: World, log: metrics.RunLog, stop: StopRequest):
        self.config, self.world, self.device, self.log, self.stop = config, world, device, log, stop
        self.model, self.wrapped, self.optimizer, self.progress = model, wrapped, optimizer, progress
        self.tokenizer, self.dataset, self.loader, self.val_loader = tokenizer, dataset, loader, val_loader
        self.token_bytes = tokenizer.token_bytes()
        self.flops_per_token = flops_per_token(config.model)
        # Frozen weights have no gradient to compute: flops_per_token would count too much for adapters.
        self.peak_flops = None if config.lora.rank else metrics.peak_flops(_device_name(device), config.train.dtype)
        # Shards are hashed once per run: by the first process of each node, while the first epoch goes on.
        first_epoch = progress.step * loader.windows_per_step < loader.windows_per_epoch
        self.verifier = BackgroundVerifier(dataset) if first_epoch and world.local_rank == 0 else None
        self.clock = metrics.StepClock()
        self.steps_since_row = 0
        self.last_save_failed = False

    def train(self) -> None:
        """Steps until max_steps or a stop signal, each followed by what is due at it."""
        train = self.config.train
        if self.progress.val_due:
            self._make_up_for_evaluation()
        with contextlib.closing(self.loader.batches(self.progress.step, train.max_steps)) as batches:
            for micro_batches in batches:
                lr = learning_rate(self.progress.step, self.config.optim)
                with self._profiled(self.progress.step + 1):
                    result = train_step(
                        self.wrapped, self.optimizer, micro_batches, lr=lr, tokens_per_step=train.tokens_per_step,
                        grad_clip=self.config.optim.grad_clip, scale=self.progress.scale, step=self.progress.step,
                        seed=train.seed, dropout=max(self.config.model.dropout, self.config.lora.dropout),
                        world=self.world)
                self.progress.step += 1
                self._log(result, lr)
                self._count_skips(result)
                if self._end_of_step():
                    break
        if self.last_save_failed:
            raise MachineError("the last checkpoint could not be saved (see above); make room and start again with the "
                               "same command")

    def _end_of_step(self) -> bool:
        """Evaluate, sample and save if they are due; True if the run is to stop here."""
        train = self.config.train
        evaluates, samples, saves = (self._due(n) for n in (train.eval_every, train.sample_every, train.save_every))
        stopping = self._agree_to_stop()
        with self.clock.paused():
            self.progress.val_loss, self.progress.val_due = None, evaluates
            if evaluates and not stopping:
                self._evaluate()
            if samples and not stopping:
                self._sample()
            if evaluates or samples:
                stopping = stopping or self._agree_to_stop()
            if saves or stopping:
                self._save()
        if stopping and self.progress.step < train.max_steps:
            self._stopped()
        return stopping

    def _due(self, every: int) -> bool:
        """Whether this step is a multiple of every (0 = never), or the last."""
        step = self.progress.step
        return step == self.config.train.max_steps or (every > 0 and step % every == 0)

    def _log(self, result: StepResult, lr: float) -> None:
        """One line and row per log step; also for the first step and for a skipped one."""
        train, step = self.config.train, self.progress.step
        self.steps_since_row += 1
        if not (self._due(train.log_every) or result.skipped or step == 1):
            return
        seconds = self.clock.take()
        rate = self.steps_since_row * train.tokens_per_step / seconds
        row = {"step": step, "tokens": step * train.tokens_per_step, "loss": None if result.skipped else result.loss,
               "lr": lr, "grad_norm": None if result.skipped else result.grad_norm, "tokens_per_second": rate,
               "mfu": metrics.mfu(rate, self.flops_per_token, self.peak_flops, self.world.size), "seconds": seconds,
               "skipped": result.skipped}
        seconds_left = (train.max_steps - step) * seconds / self.steps_since_row
        self.log.train(row, train.max_steps, seconds_left)
        self.steps_since_row = 0

    def _count_skips(self, result: StepResult) -> None:
        self.progress.skips_in_a_row = self.progress.skips_in_a_row + 1 if result.skipped else 0
        if self.progress.skips_in_a_row < MAX_SKIPS_IN_A_ROW:
            return
        with distributed.raise_on_all_ranks(self.world):
            raise MachineError(
                f"loss or gradient was not finite for {MAX_SKIPS_IN_A_ROW} steps in a row, up to step "
                f"{self.progress.step}; none of them changed the weights, the newest checkpoint in "
                f"{self.config.train.out_dir} is good. Lower optim.lr (now {self.config.optim.lr}), raise "
                "optim.warmup_steps, lower optim.grad_clip, or use train.dtype=float32")

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop. A damaged shard found by any rank ends the run on all."""
        damaged = self.verifier is not None and self.verifier.error is not None
        # One rank alone need not wait for the device: the optimizer's step is still running there.
        flags = torch.tensor([float(self.stop()), float(damaged)], device=self.device if self.world.size > 1 else "cpu")
        stopping, any_damaged = distributed.sum_over_ranks(flags, self.world).tolist()
        if any_damaged:
            with distributed.raise_on_all_ranks(self.world):
                if damaged:
                    raise self.verifier.error
        return stopping > 0

    def _evaluate(self) -> None:
        score = evaluation.evaluate(
            self.model, self.val_loader.micro_batches(self.world.rank, self.world.size), token_bytes=self.token_bytes,
            device=self.device, world=self.world, should_stop=self.stop)
        if score is not None:
            self.progress.val_loss, self.progress.val_due = score.loss, False
            row = {"step": self.progress.step, "loss": score.loss, "bits_per_byte": score.bits_per_byte}
            self.log.val(row, self.config.train.max_steps)

    def _make_up_for_evaluation(self) -> None:
        """The evaluation that a stop signal cut short before this start."""
        with self.clock.paused():
            self._evaluate()
            if not self.progress.val_due:
                self._save()

    def _sample(self) -> None:
        """A text from nothing; none after examples, which are about answers."""
        if not self.world.is_main or self.val_loader.stream.row_tokens is not None:
            return
        try:
            text = sample.sample_text(self.model, self.tokenizer, "", max_new_tokens=SAMPLE_TOKENS, temperature=0.8,
                                      top_k=200, seed=self.config.train.seed)
        except sample.SampleError as error:  # logits that are not finite: the run itself may recover
            text = f"(none: {error})"
        self.log.note(f"--- sample at step {self.progress.step}\n{text}\n---")

    def _save(self) -> None:
        """Rank 0 writes a checkpoint. A failure is a warning here, and ends the run only if it was the last save."""
        if self.world.is_main:
            state = self.progress.as_state(updates=self.optimizer.updates, data_hash=self.dataset.hash,
                                           world=self.world)
            tensors, adapter_config = self.model.state_dict(), None
            if self.config.lora.rank:
                tensors = lora.peft_tensors(self.model)
                adapter_config = lora.peft_config(self.model.config, self.config.lora)
            try:
                checkpoint.save(Path(self.config.train.out_dir), self.progress.step, model=tensors,
                                optimizer=self.optimizer.state_tensors(), state=state, keep=self.config.train.keep,
                                adapter_config=adapter_config)
                self.last_save_failed = False
            except checkpoint.SaveError as error:
                self.last_save_failed = True
                self.log.note(f"warning: {error}; training goes on and tries again at the next save")
        self.last_save_failed = distributed.gather(self.last_save_failed, self.world)[0]

    def _stopped(self) -> None:
        if self.last_save_failed:
            return  # train() ends with the error; STOPPED would say that all is saved
        reason = self.stop.signal or "another rank"
        self.log.note(f"stopped at step {self.progress.step} ({reason}); the same command goes on from here")
        if self.world.is_main:
            row = {"step": self.progress.step, "signal": self.stop.signal}
            try:
                (Path(self.config.train.out_dir) / "STOPPED").write_text(json.dumps(row) + "\n")
            except OSError as error:
                self.log.note(f"warning: STOPPED could not be written: {error.strerror}")

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        """Trace one step on rank 0 into RUN/profile/step_N.json, which chrome://tracing and perfetto.dev show."""
        if step not in self.config.train.profile_steps or not self.world.is_main:
            yield
            return
        from torch.profiler import profile
        path = Path(self.config.train.out_dir) / "profile" / f"step_{step:08d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with profile(record_shapes=True) as profiler:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        self.log.note(f"profiled step {step}: {path}")

    def report(self) -> None:
        """Last words of a finished run: what general compressors make of the validation text."""
        if not self.world.is_main:
            return
        text = self.tokenizer.decode_bytes(_val_tokens(self.val_loader, limit=YARDSTICK_TOKENS))
        if text and self.val_loader.stream.row_tokens is None:  # of examples only the responses are scored
            sizes = evaluation.compressed_bits_per_byte(text)
            self.log.note(f"yardsticks on the same validation text ({len(text) / 1e6:.2f} MB): "
                          + ", ".join(f"{name} {bits:.4f} bits/byte" for name, bits in sizes.items()))
        peak = metrics.peak_memory_bytes(self.device)
        memory = "" if peak is None else f"peak memory {peak / 2 ** 20:.0f} MiB; "
        out_dir = Path(self.config.train.out_dir)
        best = checkpoint.best_of(out_dir)
        state = None if best is None else checkpoint.load_state(best)
        if state is not None and state["step"] != self.progress.step:
            self.log.note(f"best validation loss: {state['val_loss']:.4f}, kept as {best}")
        words = ' --chat --prompt "Hello"' if (out_dir / TEMPLATE_FILE).exists() else ""
        self.log.note(f"finished {self.progress.step} steps; {memory}run folder {self.config.train.out_dir}: "
                      f"python sample.py {self.config.train.out_dir}{words}")


def _val_tokens(loader: ValLoader, limit: int) -> np.ndarray:
    """The targets of the evaluated validation windows in order, about limit at most."""
    windows = np.arange(min(loader.windows, max(1, limit // loader.seq_len)))
    return loader.stream.windows(windows * loader.seq_len + 1, loader.seq_len).reshape(-1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type


def _first_lines(config: Config, chosen: dict[str, str], *, device: torch.device, dataset: Dataset, model: GPT,
                 world: World) -> list[str]:
    """What a run says of itself before its first step: versions, choices and why, sizes, data."""
    train = config.train
    accumulation = math.ceil(train.tokens_per_step / (config.model.max_seq_len * train.micro_batch * world.size))
    tokens = {split: open_split(dataset, split).tokens for split in ("train", "val")}
    return [
        f"flatgpt {_git_commit()} | python {platform.python_version()} | torch {torch.__version__} | "
        f"numpy {np.__version__} | {platform.platform()}",
        f"device: {device} ({chosen['device']}), ranks {world.size}, threads {torch.get_num_threads()}",
        f"dtype: {train.dtype} ({chosen['dtype']}) | compile: {chosen['compile']}",
        chosen["kernels"],
        f"data: {config.data.dir} (hash {dataset.hash[:16]}), {tokens['train']:,} training and {tokens['val']:,} "
        f"validation tokens, vocabulary {config.model.vocab_size:,}"
        + (f"; no header in {', '.join(dataset.raw_files)}: read as bare uint16 ids" if dataset.raw_files else ""),
        f"model: {model.parameter_count():,} parameters, {flops_per_token(config.model) / 1e6:.1f} MFLOPs per token",
        *_lines_on_fine_tuning(config, dataset, model),
        f"batch: {train.tokens_per_step:,} tokens a step = {world.size} ranks x {accumulation} micro-batches of up to "
        f"{train.micro_batch} x {config.model.max_seq_len}; {train.max_steps} steps = "
        f"{train.max_steps * train.tokens_per_step / tokens['train']:.2f} epochs",
        chosen["start"],
    ]


def _lines_on_fine_tuning(config: Config, dataset: Dataset, model: GPT) -> list[str]:
    lines = []
    if config.lora.rank:
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines.append(f"lora: rank {config.lora.rank}, alpha {config.lora.alpha:g} on {', '.join(config.lora.targets)}: "
                     f"{learning:,} of the parameters learn, the others are kept in {config.train.out_dir}/base")
    if "examples" in dataset.index:
        counts = dataset.index["examples"]["train"]
        lines.append(f"examples: {counts['examples']:,} of {dataset.index['settings']['kind']}, "
                     f"{counts['truncated']:,} of them cut at the end to fit; the loss counts "
                     f"{counts['response_tokens']:,} of {counts['tokens']:,} tokens")
    return lines


def _git_commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "(no git)"
    if commit.returncode:
        return "(not a git checkout)"
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


# ----------------------------------------------------------------------------------------------------------------------
# From the command line to the loop

def train(config: Config, given: set[str], *, world: World, stop: StopRequest) -> None:
    """The whole run, from raw text to the last checkpoint."""
    # 1. What can be refused before any work, and the data. Preparing may take longer than a collective waits, so it
    #    comes before ranks meet.
    distributed.set_deterministic(config.train.deterministic)
    device, device_reason = distributed.choose_device(config.train.device, world)
    dtype, dtype_reason = distributed.choose_dtype(config.train.dtype, device)
    compiles, compile_reason = distributed.choose_compile(config.train.compile, device)
    chosen = {"device": device_reason, "dtype": dtype_reason,
              "compile": f"{'on' if compiles else 'off'} ({compile_reason})"}
    distributed.prepare_cpu(device, world)
    metrics.check_tracker(config.train.tracker)
    check_kernels_can_run(config, device)
    parent = parent_of(config)
    config = inherit(config, given, parent, world)
    try:
        data_dir = ensure_prepared(config.data, config.model.max_seq_len, chat_template_for(config, parent),
                                   local_rank=world.local_rank, should_stop=stop)
    except PreparationStopped as stopped:
        _note(f"{stopped} ({stop.signal}); the same command goes on from there")
        return

    with contextlib.ExitStack() as stack:
        # 2. Ranks meet and agree on config, data and the checkpoint to start from; rank 0 locks the run folder.
        stack.enter_context(distributed.process_group(world, device, config.train.timeout_s))
        with distributed.raise_on_all_ranks(world):
            dataset = open_dataset(data_dir)
            tokenizer = find_tokenizer(config, data_dir)
            if parent is not None:
                check_same_tokenizer(parent, tokenizer)
            config = resolve_config(config, tokenizer=tokenizer, dtype=dtype, data_dir=data_dir)
            loaders = make_loaders(config, dataset, tokenizer, device, world)
        chosen["kernels"] = choose_kernels(config, dtype=dtype, device=device, world=world)
        with distributed.raise_on_all_ranks(world):
            check_same_on_all_ranks(config, dataset, world)
            if world.is_main:
                stack.enter_context(checkpoint.RunLock(Path(config.train.out_dir)))
        notes: list[str] = []
        start = agree_on_start(config, dataset, world, lambda line: (notes.append(line), _note(line)))
        if start.is_finished:
            if world.is_main:
                print(f"run {config.train.out_dir!r} is finished: step {start.step} of {config.train.max_steps}; raise "
                      "train.max_steps to go on, or choose another train.out_dir")
            return

        # 3. Model and optimizer, the log, the loop, the last words.
        with _advice(config, world):
            model, wrapped, optimizer, progress = build(start, config, dtype, device, compiles=compiles, world=world)
            with distributed.raise_on_all_ranks(world):
                if world.is_main:
                    write_run_files(config, tokenizer, load_template(data_dir))
                    if config.lora.rank and not start.is_resume:
                        base = base_tensors(start, config.model.max_seq_len)
                        progress.base_sha256 = checkpoint.save_base(Path(config.train.out_dir), base)
                log = metrics.RunLog(Path(config.train.out_dir), resume_step=progress.step, enabled=world.is_main,
                                     tracker=config.train.tracker, config=dataclasses.asdict(config))
            stack.callback(log.close)
            chosen["start"] = describe(start, progress)
            for line in notes + _first_lines(config, chosen, device=device, dataset=dataset, model=model, world=world):
                log.note(line)
            run = Run(config, model=model, wrapped=wrapped, optimizer=optimizer, progress=progress,
                      tokenizer=tokenizer, dataset=dataset, loader=loaders[0], val_loader=loaders[1], device=device,
                      world=world, log=log, stop=stop)
            with _logged(log):
                run.train()
        if progress.step == config.train.max_steps:
            run.report()


def build(start: Start, config: Config, dtype: torch.dtype, device: torch.device, *, compiles: bool,
          world: World) -> tuple[GPT, nn.Module, Optimizer, Progress]:
    """The model, the same compiled and wrapped for this world, its optimizer and its progress: from the seed or the
    checkpoint, the same on every rank."""
    torch.manual_seed(config.train.seed)
    model = GPT(config.model, compute_dtype=dtype, activation_checkpointing=config.train.activation_checkpointing)
    if config.lora.rank:
        with distributed.raise_on_all_ranks(world):
            checkpoint.load_into(model, base_tensors(start, config.model.max_seq_len), str(start.path))
        lora.add_adapters(model, config.lora)
    model = model.to(device)
    # Muon's products may be rough, but in a float32 run a rounding to bfloat16 would turn last bits into steps.
    rough = distributed.computes_bfloat16(device) and dtype != torch.float32
    optimizer = Optimizer(model, config.optim, newton_schulz_dtype=torch.bfloat16 if rough else torch.float32)
    progress = Progress(scale=LossScale.for_dtype(dtype))
    with distributed.raise_on_all_ranks(world):
        load_start(start, model, optimizer, progress, config)
    return model, distributed.wrap(torch.compile(model) if compiles else model, device, world), optimizer, progress


def find_tokenizer(config: Config, data_dir: Path) -> Tokenizer:
    """The tokenizer beside the shards, or for a foreign folder of shards the one that data.tokenizer names."""
    return load_tokenizer(str(data_dir) if (data_dir / "tokenizer.json").exists() else config.data.tokenizer)


def make_loaders(config: Config, dataset: Dataset, tokenizer: Tokenizer, device: torch.device,
                 world: World) -> tuple[TrainLoader, ValLoader]:
    """Raises ShardError if a split has no full window, ConfigError if the batch cannot be shared among the ranks."""
    train, T = config.train, config.model.max_seq_len
    if dataset.vocab_size is not None and dataset.vocab_size > config.model.vocab_size:
        raise ConfigError(f"model.vocab_size = {config.model.vocab_size} but the shards in {config.data.dir!r} have "
                          f"{dataset.vocab_size} ids; leave model.vocab_size out")
    eot = tokenizer.eot if config.data.document_mask else None
    return (TrainLoader(open_split(dataset, "train"), seq_len=T, tokens_per_step=train.tokens_per_step,
                        micro_batch=train.micro_batch, seed=train.seed, rank=world.rank, world_size=world.size,
                        device=device, eot=eot, vocab_size=tokenizer.vocab_size),
            ValLoader(open_split(dataset, "val"), seq_len=T, eval_tokens=train.eval_tokens,
                      micro_batch=train.micro_batch, device=device, eot=eot,
                      vocab_size=tokenizer.vocab_size))


def check_same_on_all_ranks(config: Config, dataset: Dataset, world: World) -> None:
    """Raise MachineError if ranks would train differently: another config, or an old or incomplete copy of the data."""
    with_paths_left_out = replace(config, data=replace(config.data, dir=None))
    for what, mine in (("config", hashlib.sha256(configuration.to_toml(with_paths_left_out).encode()).hexdigest()),
                       ("data", dataset.hash)):
        hashes = distributed.gather(mine, world)
        if len(set(hashes)) > 1:
            odd = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
            way_out = "copy the shards to every node again" if what == "data" else \
                "give every node the same command, checkout and kind of device"
            raise MachineError(f"rank {odd} has another {what} than rank 0 (hash {hashes[odd][:16]} against "
                               f"{hashes[0][:16]}, data {str(dataset.dir)!r}); {way_out}")


def write_run_files(config: Config, tokenizer: Tokenizer, chat_template: str | None) -> None:
    """config.toml, tokenizer.json and the template of a chat into the run folder, whole or not at all; a STOPPED left
    behind goes away."""
    out_dir = Path(config.train.out_dir)
    try:
        tokenizer.save(out_dir / "tokenizer.json")
        if chat_template is not None:
            save_template(out_dir, chat_template)
        temporary = out_dir / ".config.toml.tmp"
        temporary.write_text(configuration.to_toml(config), encoding="utf-8")
        temporary.replace(out_dir / "config.toml")
        (out_dir / "STOPPED").unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"run folder {str(out_dir)!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _advice(config: Config, world: World) -> Iterator[None]:
    """Runs that end badly end with one line that says what to do; a defect of ours still shows its traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            line = (f"out of memory: lower train.micro_batch (now {config.train.micro_batch}; the batch stays the "
                    "same), or set train.activation_checkpointing=true, or lower model.max_seq_len")
        elif any(word in text for word in ("Connection closed by peer", "Timed out", "NCCL", "gloo")):
            line = (f"lost contact with another rank ({text.splitlines()[0][:160]}); the same command goes on from the "
                    "newest checkpoint")
        else:
            raise
        if not world.is_main:  # the others only see that this rank is gone
            _note(f"rank {world.rank}: error: {line}")
        raise MachineError(line) from error


@contextlib.contextmanager
def _logged(log: metrics.RunLog) -> Iterator[None]:
    """The error that ends the run also stands in its log."""
    try:
        yield
    except (MachineError, UserError, RuntimeError, MemoryError) as error:
        log.note(f"error: {error}")
        raise


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    if any(word in ("-h", "--help") for word in argv):
        print(configuration.help_text())
        return
    faulthandler.enable()  # a shard that is cut short while mapped ends in SIGBUS: show where
    config, given = configuration.parse_arguments(argv, default_file=DEMO)
    train(config, given, world=distributed.read_world(), stop=StopRequest())


if __name__ == "__main__":
    configuration.exit_cleanly(main)
