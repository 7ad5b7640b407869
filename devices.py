"""Where a process computes and how: the device, the dtype of the matmuls, whether to compile, and why."""

import ctypes
import importlib.util
import os
import platform
import shutil
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from config import ConfigError, TrainConfig
from distributed import World


@dataclass(frozen=True)
class Machine:
    """What a rank computes on and how, with the lines that say so and why."""

    device: torch.device
    name: str  # of the device, as its maker calls it
    dtype: torch.dtype  # of the matmuls
    compiles: bool
    lines: tuple[str, str]


def choose_machine(train: TrainConfig, world: World) -> Machine:
    """The device of this rank, ready for a run. Comes before the first CUDA call. Raises ConfigError."""
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first CUDA call
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # we read no memory that nobody wrote
    device, device_reason = choose_device(train.device, world)
    dtype, dtype_reason = choose_dtype(train.dtype, device)
    compiles, compile_reason = choose_compile(train.compile, device)
    words = str(dtype).removeprefix("torch.")
    if train.tf32 and (device.type != "cuda" or dtype != torch.float32 or not computes_bfloat16(device)):
        raise ConfigError(f"train.tf32 = true, but this run multiplies {words} on {device}; it is for "
                          "train.dtype=float32 on CUDA from compute capability 8.0, leave it out")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # Inductor's hint to set it
        words += "" if dtype != torch.float32 else " with TF32" if train.tf32 else " without TF32"
    if device.type == "cpu":
        prepare_cpu(world)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return Machine(device, name, dtype, compiles, (
        f"device: {device} ({device_reason}), ranks {world.size}, threads {torch.get_num_threads()}",
        f"dtype: {words} ({dtype_reason}) | compile: {'on' if compiles else 'off'} "
        f"({compile_reason})"))


def choose_device(wanted: str, world: World = World(), *, option: str = "train.device=") \
        -> tuple[torch.device, str]:  # noqa: B008
    """The device of this rank and the reason for it. Raises ConfigError, in the words of the option, if the wanted one
    is not there."""
    has_mps = torch.backends.mps.is_available() and world.size == 1  # no process group speaks MPS
    found = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = found if wanted == "auto" else wanted
    if kind == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(f"{option}cuda, but this PyTorch sees no CUDA device; use {option}auto or cpu")
        if world.local_size > count:
            raise ConfigError(f"{world.local_size} processes on this node but {count} GPUs; lower --nproc_per_node or "
                              f"use {option}cpu")
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        return device, f"{torch.cuda.get_device_name(device)} ({'found' if wanted == 'auto' else 'asked for'})"
    if kind == "mps" and not has_mps:
        raise ConfigError(f"{option}mps, but there is no MPS device, or several ranks, which it cannot connect; use "
                          f"{option}auto or cpu")
    return torch.device(kind), "asked for" if wanted != "auto" else "found" if kind == "mps" else "no CUDA device"


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the matmuls and the reason for it."""
    if wanted != "auto":
        return getattr(torch, wanted), "asked for"
    if computes_bfloat16(device):
        return torch.bfloat16, "native on this device"
    is_cuda = device.type == "cuda"
    return torch.float16 if is_cuda else torch.float32, f"no native bfloat16{' before sm_80' if is_cuda else ''}"


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls run on the device's own instructions (sm_80, AVX512_BF16), not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and bool(
        torch.cpu._is_avx512_bf16_supported())


def choose_compile(wanted: str, device: torch.device) -> tuple[bool, str]:
    """Whether to torch.compile, and why. Raises ConfigError if it is wanted and cannot be."""
    is_cuda = device.type == "cuda"
    if wanted == "false" or (wanted == "auto" and not is_cuda):
        return False, "asked for" if wanted == "false" else "does not pay off outside CUDA"
    names = (os.environ.get("CC", "gcc"), "gcc", "clang") if is_cuda else (os.environ.get("CXX", "g++"),)
    missing = next((reason for is_missing, reason in (
            (is_cuda and torch.cuda.get_device_capability(device) < (7, 0), "Inductor needs compute capability 7.0"),
            (is_cuda and importlib.util.find_spec("triton") is None, "no triton"),
            (not any(map(shutil.which, names)), f"no C{'' if is_cuda else '++'} compiler: no {' or '.join(names)}"),
            (is_cuda and not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
             "no Python.h, which triton compiles against: install python3-dev")) if is_missing), None)
    if missing and wanted == "true":
        raise ConfigError(f"train.compile = true, but {missing}; install what is missing, or set it to false")
    return not missing, missing or ("asked for" if wanted == "true" else "CUDA with triton and a C compiler")


def prepare_cpu(world: World) -> None:
    """Threads and allocator of a CPU run: cores shared among this node's ranks; large blocks kept in the heap."""
    if world.size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))  # torchrun sets 1 whatever the machine has
    if platform.libc_ver()[0] == "glibc":
        # A step frees and takes again the same megabytes. Left alone, glibc maps and unmaps them each time and the
        # kernel zeroes every page. -3 is M_MMAP_THRESHOLD, -1 M_TRIM_THRESHOLD, -2 M_TOP_PAD.
        for parameter, value in ((-3, 32 << 20), (-1, 512 << 20), (-2, 64 << 20)):
            ctypes.CDLL(None).mallopt(parameter, value)
