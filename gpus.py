"""What the makers say of their GPUs: peak FLOP/s, memory and its bandwidth, by the device's name or a short one."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """None: no such cores, or no figure that we know."""

    short: str | None  # what `plan.py --gpu` calls it
    pattern: str  # of its name in torch, without NVIDIA or Tesla
    bfloat16: float | None  # TFLOP/s without sparsity, on tensor (AMD: matrix) cores with float32 accumulation
    float16: float | None
    float32: float | None  # without TF32
    memory_gb: float | None  # of 10^9 bytes. A process finds up to 7 % more: HBM's GB are 2^30, of GDDR6 ECC takes 1/16
    bandwidth_gb_s: float | None


# Patterns are matched whole, because a prefix would guess: a 4090 Laptop is no 4090, and a MIG slice is a fraction of
# its card. Source: NVIDIA's data sheets and product pages (figures "with sparsity" halved; B200 and GB200 as in DGX
# B200 and GB200 NVL72, divided by their GPUs; of B300 the pages disagree on the memory); appendix A of the GA102, Ada
# and RTX Blackwell white papers; AMD's CDNA data sheets. Memory, bandwidth, and the peaks of A10G, B300, GB300 and 4080
# SUPER were written down from second hand and wait to be compared with the sheets.
GPUS = [Gpu(*row) for row in (
    # short, device name                               bfloat16 float16 float32   GB  GB/s
    (None, r"V100-PCIE-16GB",                           None, 112.0, 14.0, 16, 900),
    (None, r"V100-PCIE-32GB",                           None, 112.0, 14.0, 32, 900),
    ("v100-16gb", r"V100-SXM2-16GB",                    None, 125.0, 15.7, 16, 900),
    ("v100", r"V100-SXM2-32GB(-LS)?",                   None, 125.0, 15.7, 32, 900),
    (None, r"V100S-PCIE-32GB",                          None, 130.0, 16.4, 32, 1134),
    ("t4", r"T4",                                       None, 65.0, 8.1, 16, 320),
    ("2080ti", r"GeForce RTX 2080 Ti",                  None, 56.9, 14.2, 11, 616),
    ("a10", r"A10",                                     125.0, 125.0, 31.2, 24, 600),
    ("a10g", r"A10G",                                   70.0, 70.0, 35.0, 24, 600),
    ("a30", r"A30",                                     165.0, 165.0, 10.3, 24, 933),
    ("a40", r"A40",                                     149.7, 149.7, 37.4, 48, 696),
    ("a100-40gb", r"A[18]00-(SXM4|PCIE)-40GB",          312.0, 312.0, 19.5, 40, 1555),
    ("a100", r"A[18]00-SXM4-80GB",                      312.0, 312.0, 19.5, 80, 2039),
    ("a100-pcie", r"A[18]00 80GB PCIe",                 312.0, 312.0, 19.5, 80, 1935),
    ("a6000", r"RTX A6000",                             154.8, 154.8, 38.7, 48, 768),
    ("3080", r"GeForce RTX 3080",                       59.5, 59.5, 29.8, 10, 760),  # the one with 10 GB
    ("3090", r"GeForce RTX 3090",                       71.0, 71.0, 35.6, 24, 936),
    ("3090ti", r"GeForce RTX 3090 Ti",                  80.0, 80.0, 40.0, 24, 1008),
    ("l4", r"L4",                                       121.0, 121.0, 30.3, 24, 300),
    ("l40", r"L40",                                     181.0, 181.0, 90.5, 48, 864),
    ("l40s", r"L40S",                                   362.0, 362.0, 91.6, 48, 864),
    ("6000ada", r"RTX 6000 Ada Generation",             364.2, 364.2, 91.1, 48, 960),
    ("4070", r"GeForce RTX 4070",                       58.3, 58.3, 29.1, 12, 504),
    ("4080", r"GeForce RTX 4080",                       97.5, 97.5, 48.7, 16, 717),
    ("4080super", r"GeForce RTX 4080 SUPER",            104.4, 104.4, 52.2, 16, 736),
    ("4090", r"GeForce RTX 4090",                       165.2, 165.2, 82.6, 24, 1008),
    ("5080", r"GeForce RTX 5080",                       112.6, 112.6, 56.3, 16, 960),
    ("5090", r"GeForce RTX 5090",                       209.5, 209.5, 104.8, 32, 1792),
    ("pro6000", r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 503.8, 126.0, 96, 1792),
    ("h100", r"H100 80GB HBM3|H800",                 989.4, 989.4, 66.9, 80, 3350),  # SXM5
    ("h200", r"H200",                                   989.4, 989.4, 66.9, 141, 4800),
    ("gh200", r"GH200 480GB",                           989.4, 989.4, 66.9, 96, 4000),
    (None, r"GH200 144G HBM3e",                         989.4, 989.4, 66.9, 144, 4900),
    ("h100-pcie", r"H100 PCIe",                         756.0, 756.0, 51.2, 80, 2000),
    ("h100-nvl", r"H100 NVL",                           835.5, 835.5, 60.0, 94, 3900),
    ("h200-nvl", r"H200 NVL",                           835.5, 835.5, 60.0, 141, 4800),
    ("h20", r"H20",                                     148.0, 148.0, 44.0, 96, 4000),
    ("b200", r"B200",                                   2250.0, 2250.0, 75.0, 180, 8000),
    ("gb200", r"GB200",                                 2500.0, 2500.0, 80.0, 186, 8000),
    ("b300", r"B300( SXM6 AC)?",                        2250.0, 2250.0, 75.0, None, 8000),
    ("gb300", r"GB300",                                 2500.0, 2500.0, 80.0, None, 8000),
    ("mi210", r"AMD Instinct MI210",                    181.0, 181.0, 45.3, 64, 1638),
    ("mi250x", r"AMD Instinct MI250X",                  191.5, 191.5, 47.9, 64, 1638),  # a device is half a card
    ("mi300x", r"AMD Instinct MI300X( OAM)?",           1307.4, 1307.4, 163.4, 192, 5325),
    ("mi325x", r"AMD Instinct MI325X( OAM)?",           1307.4, 1307.4, 163.4, 256, 6000),
    ("mi355x", r"AMD Instinct MI355X( OAM)?",           2516.6, 2516.6, 157.3, 288, 8000),
)]
SHORT_NAMES = {gpu.short: gpu for gpu in GPUS if gpu.short is not None}


def find(device_name: str) -> Gpu | None:
    """The GPU that torch names so; None if it is not in GPUS (any CPU)."""
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device_name.strip())
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, name)), None)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device as torch names it, FLOP/s in that dtype; None if it is not in GPUS (any CPU)."""
    gpu = find(device_name)
    peak = getattr(gpu, dtype) if gpu is not None and dtype in ("bfloat16", "float16", "float32") else None
    return None if peak is None else peak * 1e12
