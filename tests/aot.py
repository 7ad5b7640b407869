"""Compile every Triton kernel, at every tile size that kernels/configs.py can choose, for GPUs that are not here.

python tests/aot.py [--arch sm_90 ...] [--only NAME] [--json FILE]

Needs triton and torch, but no GPU, driver or CUDA toolkit: triton carries ptxas and LLVM. Prints registers, spills and
shared memory of each kernel, and each limit that it breaks; exits 1 if there is one. What a GPU would show of speed it
cannot tell; what ruins speed it can: spilled registers, matrix products that fall back to the old instructions or wait
for each other, loads that lost their width.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KB = 1024
SHARED_LIMIT = {"sm_80": 163 * KB, "sm_86": 99 * KB, "sm_89": 99 * KB, "sm_90": 227 * KB, "sm_100": 227 * KB,
                "sm_103": 227 * KB, "sm_110": 227 * KB, "sm_120": 99 * KB, "gfx942": 64 * KB}  # bytes a program
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")  # compiled unless others are asked for
WARP_SIZE = {arch: 64 if arch.startswith("gfx") else 32 for arch in SHARED_LIMIT}  # threads
TRITON_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel of a module of kernels/, its argument types, constants and launch options."""

    name: str
    module: str
    kernel: str
    arch: str
    dtype: str
    signature: dict[str, str]  # of each argument that is no constant: "*bf16", "i32", "fp32"
    constants: dict[str, object]
    warps: int
    stages: int = 3
    divisible_by_16: tuple[str, ...] = ()  # arguments that the launcher's are
    matmuls: bool = False  # must use the arch's matrix units at full rate
    wide_loads: bool = False  # must load 16 bytes at a time


@dataclass(frozen=True)
class Result:
    name: str
    arch: str
    dtype: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    problems: list[str]


# ---- What to compile -------------------------------------------------------------------------------------------------

def all_cases(archs: tuple[str, ...] = ARCHS) -> Iterator[Case]:
    for arch in archs:
        yield from norm_cases(arch)
        yield from cross_entropy_cases(arch)
        yield from attention_cases(arch)


def dtypes_of(arch: str) -> tuple[str, ...]:
    """All on sm_90; float32 also where shared memory is least, for NVIDIA's share its tiles, and on gfx942."""
    return ("bfloat16", "float16", "float32") if arch == "sm_90" else (
        ("bfloat16", "float32") if arch in ("sm_89", "gfx942") else ("bfloat16",))


def norm_cases(arch: str) -> Iterator[Case]:
    """Every tile on sm_90; elsewhere GPT-2's widths and the widest. LayerNorm with bias and residual needs most."""
    from kernels import configs
    widths = [*configs.NORM_BLOCKS, 768, 1600] if arch == "sm_90" else [64, 768, 1600, configs.MAX_NORM_WIDTH]
    for dtype, width, rms in itertools.product(dtypes_of(arch), widths, (False, True)):
        if (rms or dtype == "float16") and width not in (64, 768, 1600):
            continue
        x, tile = "*" + TRITON_DTYPE[dtype], configs.norm(width, backward=False)
        name = f"{'rms' if rms else 'layer'}_norm {width}"
        pointers = {"X": x, "RESIDUAL": x, "WEIGHT": "*fp32", "BIAS": "*fp32", "Y": x, "ADDED": x, "MEAN": "*fp32",
                    "RSTD": "*fp32"}
        yield Case(
            f"{name} forward", "kernels.norm", "_forward_kernel", arch, dtype,
            signature={**pointers, "N": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"},
            constants={"C": width, "BLOCK_C": tile.columns, "BLOCK_N": tile.rows, "IS_RMS": rms, "HAS_BIAS": not rms,
                       "HAS_RESIDUAL": not rms},
            warps=tile.warps(WARP_SIZE[arch]), divisible_by_16=(*pointers, "x_stride", "residual_stride"),
            wide_loads=width >= 512)
        tile = configs.norm(width, backward=True)
        pointers = {"GRAD": x, "GRAD_ADDED": x, "X": x, "WEIGHT": "*fp32", "MEAN": "*fp32", "RSTD": "*fp32",
                    "GRAD_X": x, "GRAD_WEIGHT": "*fp32", "GRAD_BIAS": "*fp32"}
        strides = {"grad_stride": "i32", "added_stride": "i32", "x_stride": "i32"}
        yield Case(
            f"{name} backward", "kernels.norm", "_backward_kernel", arch, dtype,
            signature={**pointers, "N": "i32", **strides},
            constants={"C": width, "BLOCK_C": tile.columns, "BLOCK_N": tile.rows, "IS_RMS": rms, "HAS_BIAS": not rms,
                       "HAS_ADDED": not rms},
            warps=tile.warps(WARP_SIZE[arch]), divisible_by_16=(*pointers, *strides), wide_loads=width >= 512)


def cross_entropy_cases(arch: str) -> Iterator[Case]:
    """Bytes, GPT-2's padded vocabulary, and Qwen's; with every tile's columns on the way."""
    from kernels import configs
    sizes = {257: 257, 1000: 1000, 4096: 4096, 50257: 50304, 151936: 151936} if arch == "sm_90" else {50257: 50304}
    for dtype, (vocab_size, V), softcap in itertools.product(dtypes_of(arch), sizes.items(), (False, True)):
        if softcap and V != 50304:
            continue
        tile = configs.cross_entropy(V)
        pointers = {"LOGITS": "*" + TRITON_DTYPE[dtype], "TARGETS": "*i64", "LOSSES": "*fp32"}
        yield Case(
            f"cross_entropy {V}{' softcap' if softcap else ''}", "kernels.cross_entropy", "_loss_kernel", arch, dtype,
            signature={**pointers, "softcap": "fp32"},
            constants={"V": V, "VOCAB_SIZE": vocab_size, "BLOCK_V": tile.columns, "HAS_SOFTCAP": softcap,
                       "WANTS_GRAD": True},
            warps=tile.warps(WARP_SIZE[arch]), divisible_by_16=tuple(pointers), wide_loads=V % 16 == 0)


def attention_cases(arch: str) -> Iterator[Case]:
    """Every tile of the table with what needs most, documents and four query heads a key head; in bfloat16 with the
    usual head dims also causal and with one. On sm_90 more head dims: 24, 80 and 96 fill a tile's columns in part."""
    from kernels import configs
    for dtype in dtypes_of(arch):
        training = arch == "sm_90" and dtype == "bfloat16"
        for D in (16, 24, 32, 64, 80, 96, 128, 256) if training else (64, 128, 256):
            if D not in (64, 128) or dtype == "float32" or (arch == "sm_90" and not training):
                variants = [(True, 4)]
            else:
                variants = itertools.product((False, True), (1, 4)) if training else [(False, 1), (True, 4)]
            for masked, G in variants:
                yield from _attention_kernels(arch, dtype, D, masked=masked, G=G)
    yield Case("attention last query", "kernels.flash_attention", "_last_query_kernel", arch, "bfloat16",
               signature={"FIRST": "*i32", "LAST": "*i32", "Tq": "i32", "Tk": "i32"},
               constants={"BLOCK_K": 64, "BLOCK": configs.LAST_QUERY_BLOCK}, warps=4,
               divisible_by_16=("FIRST", "LAST"))


def _strides(*tensors: str) -> dict[str, str]:
    return {f"{tensor}_{dim}": "i32" for tensor in tensors for dim in "bth"}


def _attention_kernels(arch: str, dtype: str, D: int, *, masked: bool, G: int) -> Iterator[Case]:
    import torch

    from kernels import configs
    x, tiles = "*" + TRITON_DTYPE[dtype], configs.attention(D, getattr(torch, dtype), arch)
    pointers = {name: x for name in ("Q", "K", "V", "GRAD", "OUT", "GRAD_Q", "GRAD_K", "GRAD_V")}
    first = "*i32" if masked else x  # without first_key the launcher hands over any tensor, which is never read
    pointers |= {"LSE": "*fp32", "DELTA": "*fp32", "FIRST": first, "LAST": first}
    numbers = {"scale": "fp32", "H": "i32", "Hkv": "i32", "Tq": "i32", "Tk": "i32", "first_b": "i32", "last_b": "i32"}
    strides = _strides("q", "k", "v", "grad") | {"to_b": "i32", "to_t": "i32"}
    kernels = [("forward", "_forward_kernel", tiles.forward, {}),
               ("backward q", "_backward_q_kernel", tiles.backward_q,
                {"ONLY_DELTA": False, "MASK_ALL": tiles.backward_q.mask_all}),
               ("backward kv", "_backward_kv_kernel", tiles.backward_kv,
                {"ADD_GRAD_Q": False, "MASK_ALL": tiles.backward_kv.mask_all or masked})]
    if tiles.fused is not None:
        kernels += [("delta", "_backward_q_kernel", tiles.backward_q, {"ONLY_DELTA": True, "MASK_ALL": True}),
                    ("backward fused", "_backward_kv_kernel", tiles.fused,
                     {"ADD_GRAD_Q": True, "MASK_ALL": tiles.fused.mask_all or masked})]
    for name, kernel, tile, constants in kernels:
        is_fused = constants.get("ONLY_DELTA") or constants.get("ADD_GRAD_Q")
        types = pointers | numbers | strides | ({"GRAD_Q": "*fp32"} if is_fused else {})
        arguments = _arguments("kernels.flash_attention", kernel)
        yield Case(
            f"attention {D} {name}{' documents' if masked else ''}{f' G={G}' if G > 1 else ''}",
            "kernels.flash_attention", kernel, arch, dtype,
            signature={n: types[n] for n in arguments if n in types},
            constants={"G": G, "D": D, "BLOCK_D": configs.head_block(D), "HAS_FIRST": masked, "BLOCK_Q": tile.queries,
                       "BLOCK_K": tile.keys, **constants},
            warps=tile.warps, stages=tile.stages, matmuls=name != "delta", wide_loads=dtype != "float32",
            divisible_by_16=tuple(n for n in arguments if n in pointers or n in strides))


def _arguments(module: str, kernel: str) -> list[str]:
    import importlib
    return getattr(importlib.import_module(module), kernel).arg_names


# ---- Compiling and judging -------------------------------------------------------------------------------------------

def compile_case(case: Case) -> Result:
    """Compile as the launcher would, on a machine with the GPU, and read what the assembler says of the result."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    triton.knobs.compilation.always_compile = True  # from the cache there is no log
    triton.knobs.nvidia.dump_ptxas_log = True
    kernel = getattr(importlib.import_module(case.module), case.kernel)
    names = kernel.arg_names
    is_amd = case.arch.startswith("gfx")
    target = GPUTarget("hip" if is_amd else "cuda", case.arch if is_amd else int(case.arch.removeprefix("sm_")),
                       WARP_SIZE[case.arch])
    source = ASTSource(
        fn=kernel, signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16})
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    facts = _amd_facts(compiled.asm["amdgcn"]) if is_amd else _nvidia_facts(log.getvalue(), compiled.asm["ptx"])
    shared = compiled.metadata.shared
    return Result(case.name, case.arch, case.dtype, facts["registers"], facts["spilled"], shared,
                  _problems(case, facts, shared))


def _nvidia_facts(log: str, ptx: str) -> dict:
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {"registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "spilled": max(int(spills[1]), int(spills[2])),
            "serialized": sorted(set(re.findall(r"\((C75\d\d)\)", log))),  # ptxas made wgmma wait for each other
            "wgmma": "wgmma.mma_async" in ptx, "tcgen05": "tcgen05.mma" in ptx,
            "mma_sync": bool(re.search(r"\bmma\.sync", ptx)),
            "wide_loads": bool(re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx))}


def _amd_facts(assembly: str) -> dict:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
    return {"registers": number("vgpr_count"), "spilled": 4 * number("vgpr_spill_count"),
            "wide_loads": "global_load_dwordx4" in assembly or "buffer_load_dwordx4" in assembly,
            "mfma": "v_mfma" in assembly}


def _problems(case: Case, facts: dict, shared: int) -> list[str]:
    problems = []
    is_16_bit = case.dtype != "float32"
    spill_limit = 0 if case.arch == "sm_90" and is_16_bit else 64
    if facts["spilled"] > spill_limit:
        problems.append(f"spills {facts['spilled']} bytes, limit {spill_limit}")
    if shared > SHARED_LIMIT[case.arch]:
        problems.append(f"{shared} bytes of shared memory, limit {SHARED_LIMIT[case.arch]}")
    if case.wide_loads and not facts["wide_loads"]:
        problems.append("no 16-byte loads")
    if case.matmuls and case.arch == "sm_90" and is_16_bit:
        if facts["serialized"]:
            problems.append(f"ptxas serializes wgmma ({', '.join(facts['serialized'])})")
        if not facts["wgmma"] or facts["mma_sync"]:
            problems.append("a dot without wgmma")
    return problems


def run(cases: list[Case], workers: int) -> Iterator[Result]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(compile_case, cases)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=SHARED_LIMIT, default=list(ARCHS))
    parser.add_argument("--only", default="", help="compile the cases whose name holds this")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    import triton
    cases = [case for case in all_cases(tuple(args.arch)) if args.only in case.name]
    results = []
    print(f"triton {triton.__version__}, {len(cases)} kernels\n{'kernel':32} {'arch':7} {'dtype':9} {'registers':>9} "
          f"{'spilled':>8} {'shared':>8}")
    for result in run(cases, args.workers):
        results.append(result)
        print(f"{result.name:32} {result.arch:7} {result.dtype:9} {result.registers:9} {result.spilled_bytes:8} "
              f"{result.shared_bytes:8}  {'; '.join(result.problems)}", flush=True)
    bad = [result for result in results if result.problems]
    print(f"{len(results) - len(bad)} of {len(results)} within all limits")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "kernels": [asdict(r) for r in results]},
                                        indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
