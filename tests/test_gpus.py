"""Peak FLOP/s by name."""

import pytest

import gpus


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
    ("NVIDIA H100 PCIe", "bfloat16", 756e12),
    ("NVIDIA H200", "float16", 989.4e12), ("NVIDIA H800", "bfloat16", 989.4e12), ("NVIDIA B200", "float32", 75e12),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
    ("NVIDIA A100 80GB PCIe", "float32", 19.5e12),
    ("A100-PCIE-40GB", "float16", 312e12),  # older drivers leave NVIDIA out
    ("Tesla T4", "float16", 65e12),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
    ("AMD Instinct MI300X", "bfloat16", 1307.4e12),
    ("NVIDIA A10G", "bfloat16", 70e12), ("NVIDIA L4", "bfloat16", 121e12), ("NVIDIA GB300", "bfloat16", 2500e12),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "bfloat16", 503.8e12),
    ("NVIDIA GeForce RTX 2080 Ti", "float16", 56.9e12), ("NVIDIA GeForce RTX 4080 SUPER", "bfloat16", 104.4e12),
])
def test_peak_flops_are_those_of_the_data_sheet(name, dtype, peak):
    assert gpus.peak_flops(name, dtype) == pytest.approx(peak)


@pytest.mark.parametrize("name, dtype", [
    ("cpu", "float32"),
    ("AMD EPYC 7763 64-Core Processor", "bfloat16"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),  # another chip under nearly the same name
    ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),  # a seventh of the card
    ("NVIDIA H100", "bfloat16"),  # PCIe or SXM?
    ("Tesla T4", "bfloat16"),  # Turing has no bfloat16 tensor cores
    ("NVIDIA GeForce RTX 2080 Ti", "bfloat16"), ("NVIDIA A10", "tf32"),
    ("NVIDIA H200", "float64"),
])
def test_peak_flops_are_none_rather_than_guessed(name, dtype):
    assert gpus.peak_flops(name, dtype) is None


@pytest.mark.parametrize("short, device_name, memory_gb, gb_per_second", [
    ("h100", "NVIDIA H100 80GB HBM3", 80, 3350), ("a100", "NVIDIA A100-SXM4-80GB", 80, 2039),
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", 40, 1555), ("4090", "NVIDIA GeForce RTX 4090", 24, 1008),
    ("h200", "NVIDIA H200", 141, 4800), ("t4", "Tesla T4", 16, 320), ("mi300x", "AMD Instinct MI300X OAM", 192, 5325),
    ("v100", "Tesla V100-SXM2-32GB", 32, 900), ("b300", "NVIDIA B300 SXM6 AC", None, 8000)])
def test_a_short_name_and_the_devices_own_are_one_row(short, device_name, memory_gb, gb_per_second):
    gpu = gpus.find(device_name)
    assert gpu is gpus.SHORT_NAMES[short] and (gpu.memory_gb, gpu.bandwidth_gb_s) == (memory_gb, gb_per_second)


def test_no_name_stands_for_two_rows():
    assert len(gpus.SHORT_NAMES) == len([gpu for gpu in gpus.GPUS if gpu.short is not None])
