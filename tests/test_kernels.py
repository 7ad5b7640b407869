"""The public operations: which backend computes them, and what holds for every backend."""

import pytest
import torch

import kernels


def test_an_unknown_reduction_is_refused_by_name():
    with pytest.raises(ValueError, match="'avg' should be mean, sum or none"):
        kernels.linear_cross_entropy(torch.zeros(2, 6), torch.zeros(16, 6), torch.tensor([1, 2]), reduction="avg")
