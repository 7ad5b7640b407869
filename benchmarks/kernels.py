"""bench.py kernels: each operation beside PyTorch, torch.compile, FlexAttention, Liger-Kernel and the roofline.

On CUDA at the shapes of GPT-2 in training, in bfloat16 with float32 weights; on the CPU at smaller ones, where the
plain PyTorch versions are measured. A figure of a repeat is the mean of as many calls as take 0.1 s.

Dims: N rows, C width, V vocabulary; B batch, T sequence, H heads, D head dim.
"""

import argparse
import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cli
import distributed
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
Run = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Comparison:
    """One operation at one shape."""

    label: str
    runs: dict[str, Run]  # contender -> forward pass; ours comes first
    inputs: list[Tensor]  # those that get gradients
    work: dict[str, float]  # forward, backward or both in one: rate -> GB moved (a copy's bound) or TFLOP (a matmul's)

    def measure(self, run: Run) -> dict[str, float]:
        if len(self.work) == 1:
            def step() -> None:
                torch.autograd.grad(run(), self.inputs)
            seconds, peak = [seconds_per_call(step)], peak_growth_bytes(step, self.inputs[0].device)
            values = {"forward + backward ms": 1e3 * seconds[0]}
        else:
            outputs, peak = run(), None
            gradients = [torch.randn_like(out) for out in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
            seconds = [seconds_per_call(run), seconds_per_call(
                lambda: torch.autograd.grad(outputs, self.inputs, gradients, retain_graph=True))]
            values = {"forward ms": 1e3 * seconds[0], "backward ms": 1e3 * seconds[1]}
        values |= {rate: work / s for (rate, work), s in zip(self.work.items(), seconds, strict=True)}
        return values if peak is None else values | {"peak memory MiB": peak / 2 ** 20}


def add_to(commands) -> None:
    parser = measure.command(commands, run, "Each operation of kernels/ beside PyTorch's.", repeats=5)
    parser.add_argument("--ops", nargs="+", choices=kernels.TRITON, default=list(kernels.TRITON), help="default: all")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", choices=sample.DTYPES, help="default bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--rows", type=cli.count, metavar="N", help="default 65,536 on CUDA, 1,024 on the CPU")


def run(args: argparse.Namespace, figures: measure.Figures) -> dict:
    """Each operation beside PyTorch's, and what the machine could reach at best, in turns."""
    device = distributed.choose_device(args.device, option="--device ")[0]
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_cuda else "float32"))
    setting = {"device": torch.cuda.get_device_name(device) if on_cuda else str(device),
               "dtype": f"{dtype}, weights float32"}
    setting |= {package: measure.version(package) for package in ("triton", "liger_kernel", "flash_attn") if on_cuda}
    setting["kernels"] = choose_backends(device, dtype)
    ceilings = _ceilings(device, dtype)
    for compared in comparisons(args.ops, device, dtype, rows=args.rows or (65_536 if on_cuda else 1024)):
        names = {who: f"{who}: {compared.label}" for who in compared.runs}
        ceiling = "copy" if next(iter(compared.work)).endswith("GB/s") else "matmul"
        bound = f"{ceiling}, beside {compared.label}"
        figures.take_turns({names[who]: partial(compared.measure, call) for who, call in compared.runs.items()} | {
            bound: partial(ceilings[ceiling], compared.work)}, args.repeats)
        ours, *peers = names
        for peer in peers:
            figures.add_ratios(f"{names[ours]} / {peer}", names[ours], names[peer], "forward ms", "backward ms",
                               "forward + backward ms", "peak memory MiB")
        figures.add_ratios(f"{names[ours]} / {ceiling}", names[ours], bound, *compared.work)
    return setting


def choose_backends(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend that passes its check here, for each operation; in words what was found."""
    verdicts = {}
    for norm in ("layernorm", "rmsnorm"):
        model = ModelConfig(n_embd=768, n_head=12, norm=norm, vocab_size=VOCAB_SIZE)
        verdicts |= self_check.verdicts("auto", model, table_rows=TABLE_ROWS, dtype=dtype, device=device)
    return self_check.agree("auto", [verdicts])[1]


def _ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Iterable[str]], dict[str, float]]]:
    """What the device reaches at best, on random data, as each of some rates: GB/s read and written by a copy, TFLOP/s
    of a square matmul."""
    size, n = (2 ** 30, 8192) if device.type == "cuda" else (2 ** 27, 2048)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {"copy": lambda rates: dict.fromkeys(rates, 2 * size / 1e9 / seconds_per_call(lambda: target.copy_(source))),
            "matmul": lambda rates: dict.fromkeys(rates, 2 * n ** 3 / 1e12 / seconds_per_call(lambda: a @ b))}


def comparisons(ops: list[str], device: torch.device, dtype: torch.dtype, *, rows: int) -> Iterator[Comparison]:
    randn = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    for C in GPT2_WIDTHS if device.type == "cuda" else GPT2_WIDTHS[:1]:
        for op, residual in itertools.product([op for op in ops if op.endswith("_norm")], (False, True)):
            yield _norm(op, randn, rows=rows, C=C, residual=residual)
        if "linear_cross_entropy" in ops:
            yield _cross_entropy(randn, rows=rows, C=C)
    if "attention" in ops:
        contexts = [T for T in CONTEXTS if T <= rows] if device.type == "cuda" else [min(rows, 1024)]
        for D, T in itertools.product((64, 128), contexts):
            yield _attention(randn, tokens=rows, T=T, H=768 // D, D=D)
        for T in contexts[-2:]:
            yield _attention(randn, tokens=rows, T=T, H=12, D=64, documents=True)
        yield _attention(randn, tokens=rows, T=contexts[-1], H=12, D=64, window=contexts[-1] // 8)


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
    runs = _runs("attention", q, k, v, first_key=first_key)
    for name, peer in _attention_peers(q, k, v, ids, window).items():
        try:
            peer()
            runs[name] = peer
        except RuntimeError as error:  # a backend that this build or this shape lacks
            cli.note(f"{name} left out: {str(error).splitlines()[0][:160]}")
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

        mask = create_block_mask(visible, len(q), None, q.shape[1], q.shape[1], device=q.device)
        torch._dynamo.reset()
        peers["FlexAttention"] = partial(torch.compile(flex_attention, dynamic=False), *heads_first, block_mask=mask)
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
