"""What only a GPU shows beside the kernels' own tests: the promises of a run on CUDA, a memory checker's verdict."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from config import ModelConfig
from model import GPT
from sample import Sampling, generate
from tests.test_train import assert_same_bits, losses, settings, tensors  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu
CHECKOUT = Path(__file__).resolve().parents[1]


def run_train(arguments: list[str], out_dir: str, *more: str) -> Path:
    """In a process of its own: deterministic cuBLAS is chosen before the first CUDA call."""
    words = [*arguments, f"train.out_dir={out_dir}", "train.device=cuda", "train.deterministic=true", *more]
    done = subprocess.run([sys.executable, str(CHECKOUT / "train.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(out_dir)


@pytest.mark.parametrize("knobs", [
    ("train.kernels=triton", "data.document_mask=true", "train.compile=false"),
    ("train.kernels=auto", "model.norm=rmsnorm", "model.position=rope", "optim.name=muon", "train.compile=true"),
    ("train.kernels=torch", "model.dropout=0.2", "train.compile=false"),
    ("train.kernels=torch", "train.dtype=float16", "train.compile=false"),  # what a T4 takes
], ids=["triton", "compiled", "torch", "float16"])
def test_a_resumed_run_on_cuda_has_the_bits_of_an_unbroken_one(knobs, gpu, settings):  # noqa: F811
    """In the dtype that the device has of its own: bfloat16, before sm_80 float16."""
    no_triton = kernels.why_no_triton(gpu)
    if no_triton is not None and "train.kernels=triton" in knobs:
        pytest.skip(f"{no_triton}: runs by the fused kernels are unchecked")
    unbroken = run_train(settings, "unbroken", *knobs)
    run_train(settings, "resumed", "train.max_steps=5", *knobs)
    resumed = run_train(settings, "resumed", *knobs)
    assert losses(resumed) == losses(unbroken)
    assert_same_bits(tensors(resumed, 12), tensors(unbroken, 12))


def test_cached_generation_on_cuda_gives_the_tokens_of_uncached(gpu):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=64, vocab_size=300,
                            norm="rmsnorm", position="rope", mlp="swiglu", bias=False, qk_norm=True)).to(gpu).eval()
    prompts = [[1, 2, 3], [7] * 11]  # the first stands behind padding
    steps = list(generate(model, prompts, max_new_tokens=20, sampling=Sampling(temperature=0.0)))
    for row, prompt in enumerate(prompts):
        context = list(prompt)
        for step in steps:
            with torch.no_grad():
                expected = model(torch.tensor([context], device=gpu))[0, -1].argmax().item()
            assert step[row] == expected
            context.append(expected)


EVERY_KERNEL = """
import torch
from config import ModelConfig
from kernels import self_check

gpt2 = ModelConfig(n_layer=1, n_head=2, n_embd=60, max_seq_len=16, vocab_size=65)
qwen = ModelConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=64, max_seq_len=16, vocab_size=1100, norm="rmsnorm",
                   position="rope", mlp="swiglu", bias=False, qk_norm=True, logit_softcap=15.0, window=20)
for model, rows in ((gpt2, 65), (qwen, 1152)):
    for dtype in (torch.bfloat16, torch.float32):
        found = self_check.verdicts("triton", model, table_rows=rows, dtype=dtype, device=torch.device("cuda"),
                                    rivals={"attention": ("triton fused",)})
        assert not any(reason for op, of in found.items() if op != "linear" for reason in of.values()), found
print("every kernel ran")
"""


def test_memcheck_finds_no_access_beside_the_tensors(triton_gpu):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("no compute-sanitizer: whether kernels stay inside their tensors is unchecked")
    done = subprocess.run([tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", EVERY_KERNEL],
                          cwd=CHECKOUT, capture_output=True, text=True,
                          env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # each tensor an allocation
    if "every kernel ran" not in done.stdout and "not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer cannot watch this machine's GPU: accesses beside tensors are unchecked")
    assert done.returncode == 0 and "every kernel ran" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
