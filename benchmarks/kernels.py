"""bench.py kernels: each operation beside PyTorch, torch.compile, FlexAttention, Liger-Kernel and the roofline.

On CUDA at the shapes of GPT-2 in training, in bfloat16 with float32 weights; on the CPU at smaller ones, where the
plain PyTorch versions are measured. A figure of a repeat is the mean of as many calls as take 0.1 s; on CUDA they are
queued first and run then, because a norm takes 70 to 140 us and its launch from Python 20 to 30, for which a model that
is compiled does not wait.

Dims: N rows, C width, V vocabulary; B batch, T sequence, H heads, D head dim.
"""

import argparse
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cli
import devices
import kernels
import metrics
import sample
from benchmarks import measure
from config import ModelConfig
from kernels import self_check

GPT2_WIDTHS = (768, 1024, 1600)  # of 124M, 350M, 1.5B
CONTEXTS = (512, 1024, 2048, 4096, 8192)
DOCUMENT_TOKENS = 512  # on average; lengths are distributed geometrically
VOCAB_SIZE, TABLE_ROWS = 50_257, 50_304
QUEUED_CALLS = 30  # at most: CUDA's queue holds 1,024 launches
WAIT_HZ = 2e9  # of the kernel that waits: cycles of the device's clock, which is slower on most
Run = Callable[[], Tensor | tuple[Tensor, ...]]
Clock = Callable[[str, Callable[[], object]], float]  # of a contender's work: seconds of one call


@dataclass(frozen=True)
class Comparison:
    """One operation at one shape."""

    label: str
    runs: dict[str, Run]  # contender -> forward pass; ours comes first
    inputs: list[Tensor]  # those that get gradients
    work: dict[str, float]  # forward, backward or both in one: rate -> GB moved (a copy's bound) or TFLOP (a matmul's)

    def measure(self, clock: Clock, who: str, run: Run) -> dict[str, float]:
        if len(self.work) == 1:
            def step() -> None:
                torch.autograd.grad(run(), self.inputs)
            seconds, peak = [clock(who, step)], peak_growth_bytes(step, self.inputs[0].device)
            values = {"forward + backward ms": 1e3 * seconds[0]}
        else:
            outputs, peak = run(), None
            gradients = [torch.randn_like(out) for out in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
            seconds = [clock(who, run), clock(
                who, lambda: torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True))]
            values = {"forward ms": 1e3 * seconds[0], "backward ms": 1e3 * seconds[1]}
        values |= {rate: work / s for (rate, work), s in zip(self.work.items(), seconds, strict=True)}
        return values if peak is None else values | {"peak memory MiB": peak / 2 ** 20}


def add_to(commands) -> None:
    parser = measure.command(commands, run, "Each operation of kernels/ beside PyTorch's.", repeats=5)
    parser.add_argument("--ops", nargs="+", choices=kernels.TRITON, default=list(kernels.TRITON), help="default: all")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", choices=sample.DTYPES, help="default bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--rows", type=cli.count, metavar="N", help="default 65,536 on CUDA, 1,024 on the CPU")
    parser.set_defaults(widths=GPT2_WIDTHS, contexts=CONTEXTS, head_dims=(64, 128))


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    *_, setting = measured(args, figures)
    return setting


def measured(args: argparse.Namespace, figures: measure.Figures) -> Iterator[dict]:
    """Each operation beside PyTorch's, and what the machine could reach at best, in turns. The setting, each time that
    there are more figures."""
    device = devices.choose_device(args.device, option="--device ")[0]
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_cuda else "float32"))
    setting = {"device": torch.cuda.get_device_name(device) if on_cuda else str(device),
               "dtype": f"{dtype}, weights float32"}
    setting |= {package: measure.version(package) for package in ("triton", "liger_kernel", "flash_attn") if on_cuda}
    setting["kernels"] = choose_backends(device, dtype)
    clock, setting["time"], exceptions = choose_clock(device)
    setting |= {"time, launches included": exceptions} if on_cuda else {}
    ceilings = _ceilings(device, dtype, clock)
    for compared in comparisons(args.ops, device, dtype, rows=args.rows or (65_536 if on_cuda else 1024),
                                widths=args.widths, contexts=args.contexts, head_dims=args.head_dims):
        names = {who: f"{who}: {compared.label}" for who in compared.runs}
        ceiling = "copy" if next(iter(compared.work)).endswith("GB/s") else "matmul"
        bound = f"{ceiling}, beside {compared.label}"
        ours, *peers = names
        figures.take_turns({names[who]: partial(compared.measure, clock, names[who], call)
                            for who, call in compared.runs.items()}
                           | {bound: partial(ceilings[ceiling], compared.work)}, args.repeats,
                           peers=[bound, *(names[peer] for peer in peers)])
        for peer in peers:
            figures.add_ratios(f"{names[ours]} / {peer}", names[ours], names[peer], "forward ms", "backward ms",
                               "forward + backward ms", "peak memory MiB")
        figures.add_ratios(f"{names[ours]} / {ceiling}", names[ours], bound, *compared.work)
        yield setting


def choose_backends(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend that passes its check here, for each operation; in words what was found."""
    verdicts = {}
    for norm in ("layernorm", "rmsnorm"):
        model = ModelConfig(n_embd=768, n_head=12, norm=norm, vocab_size=VOCAB_SIZE)
        verdicts |= self_check.verdicts("auto", model, table_rows=TABLE_ROWS, dtype=dtype, device=device)
    return self_check.agree("auto", [verdicts])[1]


def _ceilings(device: torch.device, dtype: torch.dtype,
              clock: Clock) -> dict[str, Callable[[Iterable[str]], dict[str, float]]]:
    """What the device reaches at best, on random data, as each of some rates: GB/s read and written by a copy, TFLOP/s
    of a square matmul."""
    size, n = (2 ** 30, 8192) if device.type == "cuda" else (2 ** 27, 2048)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {"copy": lambda rates: dict.fromkeys(rates, 2 * size / 1e9 / clock("copy", lambda: target.copy_(source))),
            "matmul": lambda rates: dict.fromkeys(rates, 2 * n ** 3 / 1e12 / clock("matmul", lambda: a @ b))}


def comparisons(ops: list[str], device: torch.device, dtype: torch.dtype, *, rows: int, widths: Sequence[int],
                contexts: Sequence[int], head_dims: Sequence[int]) -> Iterator[Comparison]:
    """One at a time: its inputs are on the device. On the CPU the first of the widths and the shortest rows."""
    randn = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    if "attention" in ops:
        contexts = [T for T in contexts if T <= rows] if device.type == "cuda" else [min(rows, 1024)]
        for D, T in itertools.product(head_dims, contexts):
            yield _attention(randn, tokens=rows, T=T, H=768 // D, D=D)
        for T in contexts[-2:]:
            yield _attention(randn, tokens=rows, T=T, H=12, D=64, documents=True)
        yield _attention(randn, tokens=rows, T=contexts[-1], H=12, D=64, window=contexts[-1] // 8)
    for C in widths if device.type == "cuda" else widths[:1]:
        for op, residual in itertools.product([op for op in ops if op.endswith("_norm")], (False, True)):
            yield _norm(op, randn, rows=rows, C=C, residual=residual)
        if "linear_cross_entropy" in ops:
            yield _cross_entropy(randn, rows=rows, C=C)


def _runs(op: str, *inputs: Tensor, plain: Run | None = None, **options: object) -> dict[str, Run]:
    """op by Triton's or the CPU's kernel, first, where one was chosen, and by PyTorch's; then plain, and that compiled
    on CUDA."""
    runs = {backend: partial(getattr(kernels.module_of(op, backend), op), *inputs, **options)
            for backend in dict.fromkeys((kernels.backend(op), "torch"))}
    if plain is not None:
        runs["PyTorch"] = plain
        if inputs[0].is_cuda:
            torch._dynamo.reset()  # one code object serves all shapes: past 8 of them Dynamo would go on in eager
            runs["torch.compile"] = torch.compile(plain, dynamic=False)
    return runs


def _norm(op: str, randn: Callable[..., Tensor], *, rows: int, C: int, residual: bool) -> Comparison:
    """Bytes: x, y and the gradients once each; with a residual it, the sum and the sum's gradient too."""
    is_layer = op == "layer_norm"
    x, more = randn(rows, C), randn(rows, C) if residual else None
    weights = [randn(C, dtype=torch.float32) for _ in range(1 + is_layer)]  # and the bias

    def plain() -> Tensor | tuple[Tensor, ...]:
        added = x + more if residual else x
        norm = F.layer_norm if is_layer else F.rms_norm
        y = norm(added, (C,), *(weight.to(x.dtype) for weight in weights), eps=1e-5)
        return (y, added) if residual else y

    runs = _runs(op, x, *weights, plain=plain, eps=1e-5, residual=more)
    if is_layer and not residual and x.is_cuda and cli.is_installed("liger_kernel"):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        runs["Liger"] = lambda: LigerLayerNormFunction.apply(x, *weights, 1e-5)
    tensor_gb = x.nbytes / 1e9
    return Comparison(f"{op}{' + residual' if residual else ''} {rows} x {C}", runs, [x, *weights] + [more] * residual,
                      {"forward GB/s": (4 if residual else 2) * tensor_gb,
                       "backward GB/s": (4 if residual else 3) * tensor_gb})


def _attention(randn: Callable[..., Tensor], *, tokens: int, T: int, H: int, D: int, documents: bool = False,
               window: int | None = None) -> Comparison:
    """FLOPs: two matmuls of the visible pairs forward, five backward; what is computed and masked does not count."""
    B = tokens // T
    kind = "documents" if documents else "causal" if window is None else f"window {window}"
    q, k, v = (randn(B, T, H, D) for _ in range(3))
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 1 / DOCUMENT_TOKENS
    ids = starts.cumsum(1).to(q.device) if documents else None
    first_key = kernels.first_visible_key(ids, window, T=T, device=q.device)
    own = torch.arange(T, device=q.device)
    seen_from = torch.zeros_like(own) if first_key is None else first_key.clamp(min=0)
    tflop = 2 * D * H * (own + 1 - seen_from).expand(B, T).sum().item() / 1e12  # of one matmul
    runs = _runs("attention", q, k, v, first_key=first_key) | _attention_peers(q, k, v, ids, window)
    return Comparison(f"attention {kind} {B} x {T} x {H} x {D}", runs, [q, k, v],
                      {"forward TFLOP/s": 2 * tflop, "backward TFLOP/s": 5 * tflop})


def _attention_peers(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, window: int | None) -> dict[str, Run]:
    """SDPA by backend (causal: it cannot skip documents without a mask that costs it flash), FlexAttention for windows
    and documents, flash-attn."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    is_causal = ids is None and window is None
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = partial(F.scaled_dot_product_attention, *heads_first, is_causal=True)
    if not q.is_cuda:
        return {"PyTorch" if is_causal else "PyTorch, causal": sdpa}
    peers: dict[str, Run] = {"SDPA flash, causal": sdpa_kernel(SDPBackend.FLASH_ATTENTION)(sdpa),
                             "SDPA cuDNN, causal": sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sdpa)}
    if not is_causal:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = key <= query if ids is None else (key <= query) & (ids[b, query] == ids[b, key])
            return seen if window is None else seen & (key > query - window)

        @functools.cache  # made in its own turn: what fails there leaves this contender out alone
        def flex() -> Run:
            mask = create_block_mask(visible, len(q), None, q.shape[1], q.shape[1], device=q.device)
            torch._dynamo.reset()
            return partial(torch.compile(flex_attention, dynamic=False), *heads_first, block_mask=mask)

        peers["FlexAttention"] = lambda: flex()()
    if cli.is_installed("flash_attn"):
        from flash_attn import flash_attn_func
        size = (-1 if window is None else window - 1, 0)
        peers["flash-attn" + (", causal" if ids is not None else "")] = partial(
            flash_attn_func, q, k, v, causal=True, window_size=size)
    return peers


def _cross_entropy(randn: Callable[..., Tensor], *, rows: int, C: int) -> Comparison:
    """Forward and backward together: ours makes its gradients in the forward pass. FLOPs: three matmuls."""
    hidden = randn(rows, C)
    weight = (randn(TABLE_ROWS, C, dtype=torch.float32).detach() / C ** 0.5).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (rows,), device=hidden.device)

    def plain() -> Tensor:
        return F.cross_entropy((hidden @ weight.to(hidden.dtype).T)[:, :VOCAB_SIZE].float(), targets)

    runs = _runs("linear_cross_entropy", hidden, weight, targets, plain=plain, vocab_size=VOCAB_SIZE, reduction="mean",
                 softcap=0.0)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        runs["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, weight.to(hidden.dtype)[:VOCAB_SIZE], targets, options=torch.nn.LinearCrossEntropyOptions())
    if hidden.is_cuda and cli.is_installed("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        runs["Liger"] = lambda: LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight.to(hidden.dtype)[:VOCAB_SIZE], targets)[0]
    return Comparison(f"linear_cross_entropy {rows} x {C} x {TABLE_ROWS}", runs, [hidden, weight],
                      {"TFLOP/s": 6 * rows * C * TABLE_ROWS / 1e12})


def choose_clock(device: torch.device) -> tuple[Clock, str, list[str]]:
    """How calls are timed, the words for it, and the list that gets the contenders that cannot be timed so."""
    exceptions: list[str] = []
    if device.type != "cuda":
        return lambda who, work: seconds_per_call(work), "of calls, by the clock", exceptions
    return (partial(queued_seconds_per_call, exceptions),
            "of calls that were queued before the first began, by CUDA events: launches are not in it", exceptions)


def queued_seconds_per_call(exceptions: list[str], who: str, work: Callable[[], object]) -> float:
    """The device's time for a call: of as many as take 0.1 s, queued behind a kernel that only waits. If that is over
    before all are queued, because a call waits for the device itself, the clock's, and who is one of the exceptions."""
    by_clock = seconds_per_call(work)
    calls = min(QUEUED_CALLS, max(3, round(0.1 / by_clock)))

    def launch() -> None:
        for _ in range(calls):
            work()

    launch_s, _ = measure.seconds_of(launch)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(round(WAIT_HZ * (1e-3 + 2 * launch_s)))
    start.record()
    launch()
    has_begun = start.query()
    end.record()
    torch.cuda.synchronize()
    if not has_begun:
        return start.elapsed_time(end) / 1e3 / calls
    if who not in exceptions:
        exceptions.append(who)
        cli.note(f"{who}: its calls cannot be queued, the time of their launches is in its figures")
    return by_clock


def seconds_per_call(work: Callable[[], object]) -> float:
    """The mean of as many calls as take 0.1 s together, after one to warm up; waits for CUDA."""
    from torch.utils.benchmark import Timer  # asks for the device when it is imported
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).mean


def peak_growth_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above what was held before, while work runs; None where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work left in the heap would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    except (AttributeError, OSError):  # not glibc, not Linux
        return None
    before = metrics.peak_memory_bytes(device)
    work()
    return metrics.peak_memory_bytes(device) - before
