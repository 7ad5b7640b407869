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
