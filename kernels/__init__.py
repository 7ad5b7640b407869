"""The fused operations of the model: one public function each, whatever computes it.

Each takes plain tensors with the shapes in its docstring and computes the same function on every device. Today the
plain PyTorch versions in reference.py compute all of them.
"""

from kernels.reference import (
    attention,
    document_starts,
    first_visible_key,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
)

OPS = ("attention", "layer_norm", "rms_norm", "linear_cross_entropy")

__all__ = ["OPS", "attention", "document_starts", "first_visible_key", "layer_norm", "linear",
           "linear_cross_entropy", "rms_norm"]
