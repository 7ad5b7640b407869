"""What all tests share: one thread, PyTorch's operations, Triton's kernels made for the interpreter without a GPU."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch; subprocesses inherit it

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import kernels  # noqa: E402

HAS_TRITON = importlib.util.find_spec("triton") is not None


def repair_bfloat16() -> None:
    """The interpreter multiplies the bit patterns of bfloat16 in tl.dot and truncates float32 to bfloat16: upstream's
    stance is that numpy has no bfloat16 (triton-lang/triton issue 11584). Both are set right here, for tests only."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def convert_float(values, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:  # round to nearest, ties to even; NaN stays NaN
            bits = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint32)
            rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(is_nan, np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype(np.uint32) << 16
        return convert(values, source, target, rounding)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float


def make_kernels_for_the_interpreter() -> None:
    """@triton.jit looks at TRITON_INTERPRET once, when it decorates. It is taken back afterwards: all other tests, and
    the processes that they start, run as a user without a GPU would."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from kernels import cross_entropy, flash_attention, norm  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]
    repair_bfloat16()


if HAS_TRITON and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    make_kernels_for_the_interpreter()


@pytest.fixture(autouse=True)
def torch_backends():
    """A run or a loaded model in this process chooses backends: the next test starts with PyTorch's again."""
    yield
    kernels.choose_backends({})


@pytest.fixture
def kernel_device(monkeypatch, request) -> torch.device:
    """Where the Triton kernels are tested: the GPU, or else CPU tensors under the interpreter. Skips without either."""
    if torch.cuda.is_available():
        return request.getfixturevalue("triton_gpu")
    if not HAS_TRITON:
        pytest.skip("no triton here: the fused kernels are unchecked")
    import triton
    if triton.__version__ < "3.7" and np.__version__ >= "2.4":
        pytest.skip(f"triton {triton.__version__} interprets with numpy below 2.4 only, here is {np.__version__}: "
                    "the fused kernels are unchecked")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU every test of the kernels is one of it: pytest -m gpu runs them all there."""
    for item in items:
        if torch.cuda.is_available() and "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def triton_backends(kernel_device) -> None:
    """All operations that Triton has, by Triton, for the time of a test."""
    kernels.choose_backends(dict.fromkeys(kernels.TRITON, "triton"))


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: sizes, dtypes and speed paths of a real one are unchecked")
    return torch.device("cuda")


@pytest.fixture
def triton_gpu(gpu) -> torch.device:
    reason = kernels.why_no_triton(gpu)
    if reason is not None:
        pytest.skip(f"{reason}: the fused kernels are unchecked")
    return gpu
