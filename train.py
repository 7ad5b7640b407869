"""Train a GPT: config -> data, model, optimizer -> the loop: batch, step, log, stop?, evaluate, sample, save.

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
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import nn

import checkpoint
import config as configuration
import devices
import distributed
import eval as evaluation
import files
import gpus
import kernels
import metrics
import plan
import sample
import start as starting
import trackers
from cli import StopRequest, commit, note
from config import Config, ConfigError, MachineError, UserError
from data.chat import DEFAULT_TEMPLATE, save_template
from data.dataset import Dataset, open_dataset, open_split
from data.loader import MicroBatch, TrainLoader, ValLoader
from data.prepare import PreparationStopped
from data.prepared import check_content, ensure_prepared
from data.rows import CHAT
from data.tokenizer import Tokenizer, load_tokenizer
from data.verify_shards import BackgroundVerifier
from devices import Machine
from distributed import World
from finetune.runs import end_ids, files_to_save, kept_template, run_lock, save_generation
from kernels.attention_backends import SDPA
from model import GPT, flops_per_token
from optim import LossScale, Optimizer, SpikeGuard, gradient_norm, learning_rate
from start import Progress, Resume
from watchdog import Watchdog

DEMO = Path(__file__).parent / "configs" / "demo.toml"
MAX_SKIPS_IN_A_ROW = 10
SAMPLE_TOKENS = 128


# ---- One optimizer step ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the global batch, nats per token; may be inf or nan
    grad_norm: float  # before clipping; may be inf or nan
    skipped: bool  # nothing was updated: loss or gradient was not finite, or a spike
    flags: Sequence[float] = ()  # the sums over all ranks


def train_step(model: nn.Module, optimizer: Optimizer, micro_batches: list[MicroBatch], *, lr: float,
               tokens_per_step: int, grad_clip: float, scale: LossScale, step: int, seed: int = 0,
               dropout: float = 0.0, flags: Callable[[], list[float]] = list, guard: SpikeGuard | None = None,
               world: World = World()) -> StepResult:  # noqa: B008
    """Forward and backward over this rank's micro_batches, then one update with the gradient of the global mean loss.

    model is a GPT, or one wrapped by distributed.wrap. tokens_per_step counts the targets of all ranks' micro-batches;
    where a loss mask leaves some out, the mean is over those that remain, of all ranks together. step counts completed
    steps. A loss or gradient that is not finite on any rank, or that the guard leaves out, changes nothing on any rank,
    but for the scale and the guard themselves. flags() are this rank's numbers for all ranks; they travel with the
    loss, because the host waits for the device once a step.
    """
    optimizer.zero_grad()
    nats = torch.zeros((), device=micro_batches[0].tokens.device)
    for i, batch in enumerate(micro_batches):
        if dropout > 0.0:
            torch.manual_seed(dropout_seed(seed, step, batch.first_window))
        # Gradients meet the other ranks' only in the last backward; no_sync must cover the forward too.
        with distributed.gradient_sync(model, sync=i == len(micro_batches) - 1):
            batch_nats = model(batch.tokens, batch.targets, document_ids=batch.document_ids, reduction="sum")
            # Ranks' gradients are averaged: times world.size they are summed, over all targets that is the mean.
            (batch_nats * (scale.scale * world.size / tokens_per_step)).backward()
        nats += batch_nats.detach()
    # One sum over ranks and one read-back: fills need no copy from the host, which would wait for the device.
    scored = sum(batch.targets.numel() if batch.scored is None else batch.scored for batch in micro_batches)
    mine = torch.stack([nats, *(torch.full_like(nats, number) for number in (scored, *flags()))])
    gradients = [p.grad for p in optimizer.parameters]
    nats, scored, *flags_of_all, norm = torch.cat(
        [distributed.sum_over_ranks(mine, world), gradient_norm(gradients).reshape(1)]).tolist()
    to_mean = tokens_per_step / max(1.0, scored) / scale.scale  # of no scored target at all, loss and gradients are 0
    loss, grad_norm = nats / max(1.0, scored), norm * to_mean
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    skipped = not finite or (guard is not None and guard.leaves_out(loss, grad_norm))
    if not skipped:
        factor = to_mean * min(1.0, grad_clip / (grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        if factor != 1.0:
            torch._foreach_mul_([distributed.local(gradient) for gradient in gradients], factor)
        optimizer.step(lr)
    scale.update(finite)
    return StepResult(loss, grad_norm, skipped, flags_of_all)


def dropout_seed(seed: int, step: int, first_window: int) -> int:
    """63 bits that depend on nothing but where in the run a micro-batch stands."""
    digest = hashlib.blake2b(f"dropout {seed} {step} {first_window}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---- The loop --------------------------------------------------------------------------------------------------------

@dataclass
class Training:
    """What one rank holds while it trains; wrapped is the model as train_step takes it, compiled and in DDP."""

    config: Config
    machine: Machine
    world: World
    model: GPT
    wrapped: nn.Module
    optimizer: Optimizer
    progress: Progress
    tokenizer: Tokenizer
    dataset: Dataset
    train_data: TrainLoader
    val_data: ValLoader | None  # None: data.val_fraction = 0 left nothing to validate on
    ends: frozenset[int]  # the tokens that end a sample
    log: metrics.RunLog
    stop: StopRequest
    watchdog: Watchdog
    saver: checkpoint.BackgroundSaver  # for train.async_save


def loop(run: Training) -> None:
    """Steps until max_steps or a stop signal, each followed by what is due after it. Every rank does the same."""
    config, train, progress, world, log = run.config, run.config.train, run.progress, run.world, run.log
    losses, steps_since_line = [], 0
    # Frozen weights have no gradient to compute, and tiles between documents are skipped: the count would be too high.
    is_examples = run.train_data.stream.row_tokens is not None
    counts_flops = not (config.lora.rank or config.data.document_mask or is_examples)
    peak_flops = gpus.peak_flops(run.machine.name, "tf32" if train.tf32 else train.dtype) if counts_flops else None
    # Shards are hashed once per run: by the first process of each node, while the first epoch goes on.
    first_epoch = progress.tokens < run.train_data.stream.tokens
    verifier = BackgroundVerifier(run.dataset) if first_epoch and world.local_rank == 0 else None

    def due(every: int) -> bool:  # 0 = never, but for the last step
        return progress.step == train.max_steps or (every > 0 and progress.step % every == 0)

    def flags() -> list[float]:  # of this rank: a signal to stop came; a shard is damaged; it is writing a checkpoint
        return [float(run.stop()), float(verifier is not None and verifier.error is not None),
                float(run.saver.is_writing())]

    def stop_asked_for(flags_of_all: Sequence[float]) -> bool:
        """On any rank. A damaged shard that any rank found ends the run on all."""
        stops, damages, _ = flags_of_all
        if damages:
            succeeds(run, run.saver.finish)
            with distributed.raise_on_all_ranks(world):
                if verifier is not None and verifier.error is not None:
                    raise verifier.error
        return stops > 0

    is_owed = progress.val_due  # the evaluation that a stop signal cut short before this start
    is_cut = is_owed and not evaluate(run)  # it was again: no step before it is made
    save_failed = is_owed and not is_cut and not save(run)
    started, last = time.perf_counter(), progress.step if is_cut else train.max_steps
    with contextlib.closing(run.train_data.batches(progress.step, last)) as batches:
        for micro_batches in batches:
            # 1. Batch and step.
            run.watchdog.mark(f"step {progress.step + 1}")
            lr = learning_rate(progress.step, config.optim)
            traced = progress.step + 1 in train.profile_steps and world.is_main
            with metrics.profiled(Path(train.out_dir), progress.step + 1, log) if traced else contextlib.nullcontext():
                result = train_step(
                    run.wrapped, run.optimizer, micro_batches, lr=lr, tokens_per_step=train.tokens_per_step,
                    grad_clip=config.optim.grad_clip, scale=progress.scale, step=progress.step, seed=train.seed,
                    dropout=max(config.model.dropout, config.lora.dropout), flags=flags, guard=progress.guard,
                    world=world)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + train.tokens_per_step
            is_spike = result.skipped and math.isfinite(result.loss) and math.isfinite(result.grad_norm)
            progress.skips_in_a_row = progress.skips_in_a_row + 1 if result.skipped and not is_spike else 0

            # 2. Log: a line and a row, also for the first step and for a skipped one.
            steps_since_line += 1
            losses += [] if result.skipped else [result.loss]
            if due(train.log_every) or result.skipped or progress.step == 1:
                now = time.perf_counter()
                seconds, started = now - started, now
                rate = steps_since_line * train.tokens_per_step / seconds
                row = {"step": progress.step, "tokens": progress.tokens,
                       "loss": None if result.skipped and not is_spike else result.loss, "lr": lr,
                       "grad_norm": None if result.skipped and not is_spike else result.grad_norm,
                       "tokens_per_second": rate,
                       "mfu": metrics.mfu(rate, flops_per_token(config.model), peak_flops, world.size),
                       "seconds": seconds, "skipped": result.skipped}
                log.train(row, train.max_steps, mean_loss=statistics.fmean(losses) if losses else row["loss"],
                          seconds_left=(train.max_steps - progress.step) * seconds / steps_since_line)
                losses, steps_since_line = [], 0
            if progress.skips_in_a_row == MAX_SKIPS_IN_A_ROW:
                fail(run)

            # 3. Stop?
            flags_of_all = result.flags if world.size > 1 else flags()
            stopping = stop_asked_for(flags_of_all)
            paused = time.perf_counter()  # what follows is no training
            if run.saver.pending is not None and not flags_of_all[2]:
                save_failed = not succeeds(run, run.saver.finish)
            # 4. Evaluate.
            progress.val_loss, progress.val_due = None, run.val_data is not None and due(train.eval_every)
            if progress.val_due and not stopping:
                evaluate(run)
            # 5. Sample: a text from nothing; none after examples, which are about answers.
            is_sharded = distributed.is_sharded(run.model)  # then all ranks make the same text together
            if due(train.sample_every) and not stopping and (world.is_main or is_sharded) and not is_examples:
                run.watchdog.mark(f"the sample of step {progress.step}")
                try:
                    with distributed.tables_whole(run.model):
                        text = sample.sample_text(run.model, run.tokenizer, "", max_new_tokens=SAMPLE_TOKENS,
                                                  temperature=0.8, top_k=200, seed=train.seed, ends=run.ends)
                except sample.SampleError as error:  # logits that are not finite: the run itself may recover
                    text = f"(none: {error})"
                log.note(f"--- sample at step {progress.step}\n{text}\n---")
            # 6. Save, at once if a signal came meanwhile.
            if due(train.eval_every) or due(train.sample_every):
                late = distributed.gather(flags(), world)
                stopping = stopping or stop_asked_for([sum(numbers) for numbers in zip(*late, strict=True)])
            if due(train.save_every) or stopping:
                save_failed = not save(run)
            started += time.perf_counter() - paused
            if stopping:
                break
            run.watchdog.mark(f"the wait for the batch of step {progress.step + 1}")
    if not succeeds(run, run.saver.finish) or save_failed:
        raise MachineError("the last checkpoint could not be saved (see above); make room and start again with the "
                           "same command")
    if progress.step == train.max_steps and (progress.skips_in_a_row or not math.isfinite(progress.val_loss or 0.0)):
        fail(run)
    if progress.step < train.max_steps or progress.val_due:
        log.note(f"stopped at step {progress.step} ({run.stop.signal or 'another rank'}); the same command goes on "
                 "from here")
        if world.is_main:
            row = {"step": progress.step, "signal": run.stop.signal}
            try:
                files.write_whole(Path(train.out_dir) / "STOPPED", json.dumps(row) + "\n")
            except OSError as error:
                log.note(f"warning: STOPPED could not be written: {error.strerror}")


def fail(run: Training) -> None:
    """Raise MachineError on all ranks: losses are not finite any more. The weights are still those of the first skipped
    step, so a checkpoint that holds them is no way out."""
    succeeds(run, run.saver.finish)
    train, step, skips = run.config.train, run.progress.step, run.progress.skips_in_a_row
    with distributed.raise_on_all_ranks(run.world):
        if run.world.is_main:
            found = f"loss or gradient was not finite for {skips} steps in a row, none of them changed the weights" \
                if skips else "the validation loss is not finite"
            good = checkpoint.newest_before(Path(train.out_dir), step - skips)
            way_out = "no checkpoint from before is left; start again with another train.out_dir" if good is None else \
                f"go on from the newest checkpoint before that, {starting.fork_words(run.config, None, good)}"
            raise MachineError(f"step {step} of {train.max_steps}: {found}; {way_out} and a lower optim.lr (now "
                               f"{run.config.optim.lr:g}) or optim.grad_clip (now {run.config.optim.grad_clip:g})"
                               + (", or train.dtype=float32" if train.dtype != "float32" else "")
                               + (", or train.kernels=triton" if kernels.backend("attention") in SDPA else ""))


def evaluate(run: Training) -> bool:
    """Score the validation windows and log it; False if a stop signal cut it short."""
    world, is_sharded = run.world, distributed.is_sharded(run.model)

    def should_stop() -> bool:  # sharded ranks compute together, so they stop together
        run.watchdog.mark(f"the evaluation of step {run.progress.step}")
        asked = torch.tensor(float(run.stop()), device=run.machine.device if is_sharded else "cpu")
        return bool(distributed.sum_over_ranks(asked, world) if is_sharded else asked)

    score = evaluation.evaluate(
        run.model, run.val_data.micro_batches(world.rank, world.size, equal=is_sharded),
        token_bytes=run.tokenizer.scored_bytes(), device=run.machine.device, world=world, should_stop=should_stop)
    if score is None:
        return False
    run.progress.val_loss, run.progress.val_due = score.loss, not math.isfinite(score.loss)
    run.log.val({"step": run.progress.step, "loss": score.loss, "bits_per_byte": score.bits_per_byte},
                run.config.train.max_steps)
    return True


def save(run: Training) -> bool:
    """Write a checkpoint; with train.async_save begin to, once the one before is there. False as succeeds."""
    run.watchdog.mark(f"the save of step {run.progress.step}")
    tensors, texts = files_to_save(run.model, run.config.lora)
    state = run.progress.as_state(updates=run.optimizer.updates, data_hash=run.dataset.hash, world=run.world)
    succeeds(run, run.saver.finish)
    write = run.saver.start if run.config.train.async_save else partial(checkpoint.save, world=run.world)
    return succeeds(run, partial(write, Path(run.config.train.out_dir), run.progress.step, state=state, texts=texts,
                                 tensors={"optimizer": run.optimizer.state_tensors()} | tensors,
                                 keep=run.config.train.keep))


def succeeds(run: Training, write: Callable[[], object]) -> bool:
    """False on all ranks if a checkpoint cannot be written: a warning here, it is tried again at the next save."""
    try:
        write()
    except checkpoint.SaveError as error:
        run.log.note(f"warning: {error}; training goes on and tries again at the next save")
        return False
    return True


def report(run: Training) -> None:
    """Last words of a finished run: what general compressors make of the validation text, memory, what to do next."""
    out_dir = Path(run.config.train.out_dir)
    for line in evaluation.yardsticks(run.val_data, run.tokenizer):
        run.log.note(line)
    best = checkpoint.best_of(out_dir)
    state = None if best is None else checkpoint.load_state(best)
    if state is not None and state["step"] != run.progress.step:
        run.log.note(f"best validation loss: {state['val_loss']:.4f}, kept as {best}")
    peak = metrics.peak_memory_bytes(run.machine.device)
    memory = "" if peak is None else f"peak memory {peak / 2 ** 20:.0f} MiB; "
    words = ' --chat --prompt "Hello"' if run.dataset.index.get("settings", {}).get("kind") == CHAT else ""
    run.log.note(f"finished {run.progress.step} steps; {memory}run folder {out_dir}: "
                 f"python sample.py {quote(str(out_dir))}{words}")


# ---- From the command line to the loop -------------------------------------------------------------------------------

def train(config: Config, given: set[str], *, world: World, stop: StopRequest) -> None:
    """The whole run, from raw text to the last checkpoint."""
    # 1. What can be refused before any work, and the data. Preparing may take longer than a collective waits, so it
    #    comes before ranks meet.
    machine = devices.choose_machine(config.train, world)
    trackers.check(config.train.tracker)
    if config.train.kernels == "triton" and (why := kernels.why_no_triton(machine.device)) is not None:
        raise ConfigError(f"train.kernels = 'triton' but {why}; kernels=auto takes PyTorch where Triton cannot run")
    distributed.ranks_per_copy(config.train.shard, world)
    parent = starting.read_parent(config)
    config = starting.inherit(config, given, parent, world)
    try:
        data_dir = ensure_prepared(config.data, config.model.max_seq_len,
                                   kept_template(config, None, parent) or DEFAULT_TEMPLATE,
                                   local_rank=world.local_rank, should_stop=stop)
    except PreparationStopped as stopped:
        note(f"{stopped} ({stop.signal}); the same command goes on from there")
        return

    with contextlib.ExitStack() as stack:
        # 2. Ranks meet and agree on config, data and the checkpoint to start from; rank 0 locks the run folder.
        stack.enter_context(distributed.process_group(world, machine.device, config.train.timeout_s))
        with distributed.raise_on_all_ranks(world):
            dataset = open_dataset(data_dir)
            own = (data_dir / "tokenizer.json").exists()  # a foreign folder of shards has none
            tokenizer = load_tokenizer(str(data_dir) if own else config.data.tokenizer)
            config = starting.resolve(config, tokenizer=tokenizer, parent=parent, machine=machine, data_dir=data_dir)
            common = {"seq_len": config.model.max_seq_len, "device": machine.device,
                      "eot": tokenizer.eot if config.data.document_mask else None, "vocab_size": tokenizer.vocab_size}
            train_data = TrainLoader(open_split(dataset, "train"), tokens_per_step=config.train.tokens_per_step,
                                     seed=config.train.seed, rank=world.rank, world_size=world.size, **common)
            has_val = config.data.val_fraction > 0.0 or any(s["split"] == "val" for s in dataset.index["shards"])
            val_data = ValLoader(open_split(dataset, "val"), eval_tokens=config.train.eval_tokens, **common) \
                if has_val else None
        checked = plan.check_kernels(config, machine, train_data, world)
        with distributed.raise_on_all_ranks(world):
            starting.check_same_on_all_ranks(config, dataset, world)
            if world.is_main:
                check_content(data_dir, config.data)
                stack.enter_context(run_lock(Path(config.train.out_dir)))
        notes: list[str] = []
        start = starting.agree_on_start(config, parent, dataset, world, lambda line: (notes.append(line), note(line)))
        if isinstance(start, Resume) and start.step >= config.train.max_steps and start.is_settled:
            if world.is_main:
                print(f"run {config.train.out_dir!r} is finished: step {start.step} of {config.train.max_steps}; "
                      f"{starting.when_finished(config)}, or choose another train.out_dir")
            return

        # 3. Model and optimizer, the log, the loop, the last words.
        with _one_line(config, world):
            model, optimizer, progress = starting.build(start, config, parent, machine, world)
        train_data.go_on_after(progress.step, progress.tokens // config.model.max_seq_len)
        with distributed.raise_on_all_ranks(world):
            template, generation = kept_template(config, data_dir, parent), {} if parent is None else parent.generation
            if world.is_main:
                write_run_files(config, tokenizer, template, generation)
            log = metrics.RunLog(Path(config.train.out_dir), resume_step=start.step, enabled=world.is_main,
                                 tracker=config.train.tracker, config=dataclasses.asdict(config))
        stack.callback(log.close)
        with _one_line(config, world, log.write):
            whole = machine.compiles and not distributed.is_sharded(model)  # a sharded one's blocks are, see build()
            compiled = torch.compile(model, dynamic=False) if whole else model
            micro_batch_reason, kernels_line = plan.settle(
                config, progress, checked, model, compiled, train_data, world)
        config = replace(config, train=replace(config.train, micro_batch=progress.micro_batch))
        for loader in filter(None, (train_data, val_data)):
            loader.micro_batch = progress.micro_batch
        with _one_line(config, world, log.write):
            run = Training(config, machine, world, model, distributed.wrap(compiled, machine.device, world), optimizer,
                           progress, tokenizer, dataset, train_data, val_data,
                           end_ids(tokenizer, template, generation), log, stop,
                           Watchdog(Path(config.train.out_dir), world, config.train.timeout_s),
                           checkpoint.BackgroundSaver(world))
            stack.callback(run.watchdog.close)
            for line in notes:  # printed already
                log.write(line)
            for line in [*_first_lines(run, kernels_line, micro_batch_reason), starting.describe(start, config)]:
                log.note(line)
            loop(run)
            if progress.step == config.train.max_steps and not progress.val_due and world.is_main:
                report(run)


def write_run_files(config: Config, tokenizer: Tokenizer, chat_template: str | None, generation: dict) -> None:
    """config.toml, tokenizer.json, the template of a chat and generation_config.json into the run folder, each whole
    and durably; a STOPPED left behind goes away."""
    out_dir = Path(config.train.out_dir)
    with files.disk_errors(out_dir):
        tokenizer.save(out_dir / "tokenizer.json")
        save_template(out_dir, chat_template)
        save_generation(out_dir, generation)
        files.write_whole(out_dir / "config.toml", configuration.to_toml(config))
        (out_dir / "STOPPED").unlink(missing_ok=True)


def _first_lines(run: Training, kernels_line: str, micro_batch_reason: str) -> list[str]:
    """What a run says of itself before its first step: versions, choices and why, sizes, data."""
    config, train, dataset, model = run.config, run.config.train, run.dataset, run.config.model
    accumulation = math.ceil(train.tokens_per_step / (model.max_seq_len * train.micro_batch * run.world.size))
    train_tokens, val_tokens = run.train_data.stream.tokens, run.val_data.stream.tokens if run.val_data else 0
    steps_left = train.max_steps - run.progress.step
    lines = [
        f"flatgpt {commit(Path(__file__).parent)} | python {platform.python_version()} | torch {torch.__version__} | "
        f"numpy {np.__version__} | {platform.platform()}",
        *run.machine.lines,
        kernels_line,
        f"data: {config.data.dir} (hash {dataset.hash[:16]}), {train_tokens:,} training and {val_tokens:,} "
        f"validation tokens{'' if val_tokens else ' (nothing is evaluated)'}, vocabulary {model.vocab_size:,}"
        + (f"; no header in {', '.join(dataset.raw_files)}: read as bare uint16 ids" if dataset.raw_files else ""),
        f"model: {run.model.parameter_count():,} parameters, {flops_per_token(model) / 1e6:.1f} MFLOPs per token"]
    if config.lora.rank:
        learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        lines.append(f"lora: rank {config.lora.rank}, alpha {config.lora.alpha:g} on {', '.join(config.lora.targets)}: "
                     f"{learning:,} of the parameters learn, the others are kept in {train.out_dir}/base")
    if "examples" in dataset.index:
        counts = dataset.index["examples"]["train"]
        lines.append(f"examples: {counts['examples']:,} of {dataset.index['settings']['kind']}, "
                     f"{counts['truncated']:,} cut to fit, {counts.get('dropped', 0):,} left out; the loss counts "
                     f"{counts['response_tokens']:,} of {counts['tokens']:,} tokens")
    return [*lines, f"batch: {train.tokens_per_step:,} tokens a step = {run.world.size} ranks x {accumulation} "
                    f"micro-batches of up to {train.micro_batch} x {model.max_seq_len} ({micro_batch_reason}); "
                    f"{train.max_steps} steps = "
                    f"{(run.progress.tokens + steps_left * train.tokens_per_step) / train_tokens:.2f} epochs"]


@contextlib.contextmanager
def _one_line(config: Config, world: World, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """An error that ends the run stands in its log, as one line that says what to do; a defect of ours still shows its
    traceback."""
    try:
        yield
    except (MachineError, UserError) as error:
        log(f"error: {error}")
        raise
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if plan.is_out_of_memory(error):
            line = (f"out of memory: lower train.micro_batch (now {config.train.micro_batch}; the batch stays the "
                    "same), or set train.activation_checkpointing=true, or lower model.max_seq_len")
        elif any(word in text for word in ("Connection closed by peer", "Timed out", "NCCL", "gloo")):
            line = (f"lost contact with another rank ({text.splitlines()[0][:160]}); the same command goes on from the "
                    "newest checkpoint")
        else:
            log(f"error: {error}")
            raise
        log(f"error: {line}")
        if world.local_rank > 0:  # the others only see that this rank is gone; exit_cleanly prints a node's first
            files.warn(f"error: rank {world.rank}: {line}")
        raise MachineError(line) from error


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(configuration.help_text())
        return
    faulthandler.enable()  # a shard that is cut short while mapped ends in SIGBUS: show where
    config, given = configuration.parse_arguments(argv, default_file=DEMO)
    train(config, given, world=distributed.read_world(), stop=StopRequest())


if __name__ == "__main__":
    configuration.exit_cleanly(main)
