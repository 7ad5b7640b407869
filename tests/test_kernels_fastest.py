"""The choice among right backends: what is timed, at which shapes, who wins; with stand-ins for clock and kernels."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kernels
from config import ConfigError, ModelConfig
from kernels import attention_backends, chunked_loss, fastest, reference, self_check
from tests.test_kernels import CPU, GPT2, QWEN, Broken

CUDA = torch.device("cuda")
SHAPES = {"B": 2, "T": 60, "table_rows": 1152, "dtype": torch.float32, "device": CPU, "documents": False}
ATTENTION = ("triton", "triton fused", "SDPA cuDNN", "SDPA flash")
# as on one rank with a GPU
RIGHT = {"attention": dict.fromkeys(ATTENTION), "layer_norm": {"triton": None, "torch": None},
         "linear": {"triton": "PyTorch's own is as fast"}}
MS = {"attention": dict(zip(ATTENTION, (0.7, 0.66, 0.61, 1.21), strict=True)),
      "layer_norm": {"triton": 0.25, "torch": 0.31}}
CHOICE = {"attention": "SDPA cuDNN", "layer_norm": "triton", "linear": "torch"}


@pytest.fixture(autouse=True)
def any_backend(monkeypatch):
    """A choice may name backends that this machine has not."""
    monkeypatch.setattr(kernels, "choose_backends", lambda choice: None)


def without(op: str, backend: str, reason: str) -> self_check.Verdicts:
    return RIGHT | {op: RIGHT[op] | {backend: reason}}


# ---- Who is asked ----------------------------------------------------------------------------------------------------

def rivals(setting: str = "auto", model: ModelConfig = GPT2, *, device: torch.device = CUDA, documents: bool = False,
           compiles: bool = True) -> dict[str, tuple[str, ...]]:
    return fastest.rivals(setting, model, device=device, documents=documents, compiles=compiles)


def test_on_cuda_attention_has_pytorch_s_kernels_as_rivals_the_others_pytorch():
    attention = {"attention": ("triton fused", "SDPA cuDNN", "SDPA flash")}
    assert rivals() == attention | {"layer_norm": ("torch",), "linear_cross_entropy": ("torch",)}
    assert rivals(model=QWEN) == attention | {"rms_norm": ("torch",), "linear_cross_entropy": ("torch",)}


@pytest.mark.parametrize("model, documents", [(replace(GPT2, window=8), False), (GPT2, True)])
def test_documents_and_windows_are_flexattention_s_and_only_when_compiled(model, documents):
    assert rivals(model=model, documents=documents)["attention"] == ("triton fused", "FlexAttention")
    assert rivals(model=model, documents=documents, compiles=False)["attention"] == ("triton fused",)


def test_no_clock_decides_on_a_cpu_nor_what_the_user_named():
    assert rivals(device=CPU) == rivals("triton") == rivals("torch") == {}


def test_no_clock_decides_the_bits_of_a_deterministic_run():
    torch.use_deterministic_algorithms(True)
    try:
        assert rivals() == {}
    finally:
        torch.use_deterministic_algorithms(False)


class BrokenFused(Broken):
    """The backward kernel that, where it is fused, makes 1 % too much of q's gradient."""

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.kernel[grid](*args, **constants)
            if constants["ADD_GRAD_Q"]:
                args[self.argument].mul_(1.01)
        return launch


def test_each_rival_is_checked_and_a_wrong_one_is_named(kernel_device, monkeypatch):
    if kernel_device.type == "cuda":
        pytest.skip("stand-ins for a GPU: a real one's backends are in test_kernels_attention_backends")
    from kernels import flash_attention
    kernel = flash_attention._backward_kv_kernel
    wanted = {"attention": ("triton fused", "SDPA flash", "SDPA cuDNN"), "layer_norm": ("torch",)}
    for is_broken in (False, True):
        found = self_check.verdicts("auto", GPT2, table_rows=65, dtype=torch.float32, device=CPU, rivals=wanted)
        fused, cudnn = (found["attention"].pop(name) for name in ("triton fused", "SDPA cuDNN"))
        assert found["attention"] == {"triton": None, "SDPA flash": None}
        assert cudnn.startswith("RuntimeError: No ")
        assert fused.startswith("relative error 0.0") if is_broken else fused is None
        assert found["layer_norm"] == {"triton": None, "torch": None}
        assert found["linear_cross_entropy"] == {"triton": None} and list(found["linear"]) == ["triton"]
        monkeypatch.setattr(flash_attention, "_backward_kv_kernel",
                            BrokenFused(kernel, kernel.arg_names.index("GRAD_Q")))


def test_what_pytorch_s_warnings_say_of_a_kernel_is_the_reason(monkeypatch):
    """The error itself only says that no kernel is available."""
    def attention(q, k, v, *, first_key):
        for words in ("Flash attention kernel not used because: (Triggered internally at x)",
                      "Flash attention has been runtime disabled. (Triggered internally at x)",
                      "head_dim should be no more than 128. (Triggered internally at x)"):
            warnings.warn(words, UserWarning, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")
    monkeypatch.setattr(kernels, "module_of", lambda op, backend: SimpleNamespace(supports=lambda q: True,
                                                                                  attention=attention))
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    found = self_check.verdicts("auto", GPT2, table_rows=65, dtype=torch.float32, device=CPU)
    assert found["attention"]["triton"] == ("RuntimeError: No available kernel. Aborting execution. (head_dim should "
                                            "be no more than 128.)")


# ---- Who wins --------------------------------------------------------------------------------------------------------

def test_the_fastest_wins_and_the_line_says_what_each_took():
    assert self_check.contenders([RIGHT, RIGHT]) == {"attention": list(ATTENTION), "layer_norm": ["triton", "torch"],
                                                     "linear": []}
    assert self_check.agree("auto", [RIGHT, RIGHT], measured=(MS, 2.14)) == (CHOICE, (
        "kernels: SDPA cuDNN (0.61 ms, triton 0.7, triton fused 0.66, SDPA flash 1.21) for attention; triton (0.25 ms, "
        "torch 0.31) for layer_norm; torch (PyTorch's own is as fast) for linear; forward and backward timed in 2.1 s"))


def test_measured_figures_survive_the_way_to_the_other_ranks():
    measured = json.loads(json.dumps((MS | {"layer_norm": {"triton": 0.25, "torch": "OutOfMemoryError: "}}, 2.14)))
    choice, line = self_check.agree("auto", [RIGHT], measured=measured)
    assert choice == CHOICE and "triton (0.25 ms; not torch: OutOfMemoryError: ) for layer_norm" in line


@pytest.mark.parametrize("ms, winner", [(0.69, "triton"), (0.68, "triton fused")])
def test_noise_does_not_decide_against_the_first(ms, winner):
    choice, _ = self_check.agree("auto", [RIGHT], measured=({"attention": {"triton": 0.7, "triton fused": ms}}, 1.0))
    assert choice["attention"] == winner


def test_what_is_wrong_on_any_rank_wins_on_none():
    """Though it was timed to be the fastest."""
    ranks = [RIGHT, without("attention", "SDPA cuDNN", "relative error 0.3 of gradient 1")]
    choice, line = self_check.agree("auto", ranks, measured=(MS, 2.0))
    assert choice["attention"] == "triton fused"
    assert "; not SDPA cuDNN: rank 1: relative error 0.3 of gradient 1) for attention" in line
    assert "SDPA cuDNN" not in self_check.contenders(ranks)["attention"]


def test_what_another_rank_does_not_know_wins_on_none():
    other = RIGHT | {"attention": {"triton": None}}
    assert self_check.contenders([RIGHT, other])["attention"] == ["triton"]


def test_what_failed_when_timed_does_not_win():
    failed = {"attention": MS["attention"] | {"triton": "OutOfMemoryError: ", "SDPA cuDNN": "OutOfMemoryError: "}}
    choice, line = self_check.agree("auto", [RIGHT], measured=(failed, 2.0))
    assert choice["attention"] == "triton fused" and "not triton: OutOfMemoryError" in line
    failed["attention"] = dict.fromkeys(ATTENTION, "RuntimeError: no")
    choice, line = self_check.agree("auto", [RIGHT], measured=(failed, 2.0))
    assert choice["attention"] == "torch" and "torch (RuntimeError: no) for attention" in line


def test_without_figures_the_first_right_one_computes():
    assert self_check.agree("auto", [RIGHT])[0] == CHOICE | {"attention": "triton"}
    choice, line = self_check.agree("auto", [without("attention", "triton", "it is off")])
    assert choice["attention"] == "triton fused" and "triton fused (not triton: it is off) for attention" in line


# ---- The checkpoint's choice -----------------------------------------------------------------------------------------

def test_a_resumed_run_keeps_its_choice_and_times_nothing():
    previous = json.loads(json.dumps(CHOICE))
    assert all(len(names) < 2 for names in self_check.contenders([RIGHT], previous).values())
    choice, line = self_check.agree("auto", [RIGHT], previous=previous)
    assert choice == CHOICE
    assert line == ("kernels: SDPA cuDNN for attention; triton for layer_norm; torch (PyTorch's own is as fast) for "
                    "linear; as in the checkpoint")


def test_what_a_resumed_run_cannot_have_again_is_chosen_anew_and_said():
    ranks = [RIGHT, without("attention", "SDPA cuDNN", "RuntimeError: No available kernel")]
    anew = self_check.contenders(ranks, CHOICE)
    assert anew["attention"] == ["triton", "triton fused", "SDPA flash"] and anew["layer_norm"] == ["triton"]
    choice, line = self_check.agree("auto", ranks, previous=CHOICE, measured=({"attention": MS["attention"]}, 1.0))
    assert choice == CHOICE | {"attention": "triton fused"}
    assert "triton fused (0.66 ms, triton 0.7, SDPA flash 1.21; not SDPA cuDNN: rank 1: RuntimeError: No av" in line
    assert line.endswith("; not as in the checkpoint, bits may differ: attention was by SDPA cuDNN")


@pytest.mark.parametrize("previous", [{"attention": "a later version's", "layer_norm": "triton", "linear": "torch"},
                                      {"layer_norm": "triton", "linear": "torch"}])
def test_a_choice_that_this_version_does_not_know_is_made_anew(previous):
    choice, line = self_check.agree("auto", [RIGHT], previous=previous)
    assert choice["attention"] == "triton"
    assert line.endswith(f"bits may differ: attention was by {previous.get('attention', 'another')}")


def test_another_setting_beats_the_checkpoint_s_choice():
    only_triton = {"attention": {"triton": None}, "layer_norm": {"triton": None}, "linear": RIGHT["linear"]}
    assert self_check.agree("triton", [only_triton], previous=CHOICE) == (
        {"attention": "triton", "layer_norm": "triton", "linear": "torch"},
        "kernels: triton for attention, layer_norm; torch (PyTorch's own is as fast) for linear; not as in the "
        "checkpoint, bits may differ: attention was by SDPA cuDNN")
    by_torch = {op: {"triton": "asked for"} for op in CHOICE}
    assert set(self_check.agree("torch", [by_torch], previous=CHOICE)[0].values()) == {"torch"}


def test_triton_is_refused_for_triton_s_own_faults_only():
    with pytest.raises(ConfigError, match="'triton' but attention: rank 1: it is off; kernels=auto"):
        self_check.agree("triton", [RIGHT, without("attention", "triton", "it is off")])
    self_check.agree("triton", [without("attention", "SDPA flash", "it is off")])


# ---- What is timed ---------------------------------------------------------------------------------------------------

class Clock:
    """A call takes the ms of the stand-in that it ran, ten times that in slow_turns."""

    def __init__(self, ms: dict[str, float], slow_turns: tuple[int, ...] = ()):
        self.ms, self.ran, self.turns, self.slow_turns = ms, None, [], slow_turns

    def __call__(self, call, repeats: int) -> float:
        call()
        self.turns.append((self.ran, repeats))
        return self.ms[self.ran] * (10.0 if len(self.turns) in self.slow_turns else 1.0)


def stand_ins(monkeypatch, clock: Clock, **attention) -> None:
    """Backends of attention: each computes the reference's, or what was given by its name."""
    def module_of(op: str, backend: str) -> SimpleNamespace:
        def run(*args, **options):
            clock.ran = backend
            return attention.get(backend.replace(" ", "_"), reference.attention)(*args, **options)
        return SimpleNamespace(attention=run)
    monkeypatch.setattr(kernels, "module_of", module_of)


def measured_attention(clock: Clock, names: list[str]) -> dict[str, float | str]:
    found, seconds = fastest.measure({"attention": names, "linear": [], "layer_norm": ["triton"]}, GPT2, compiles=False,
                                     timer=clock, **SHAPES)
    assert list(found) == ["attention"] and seconds > 0.0  # where there is no choice nothing is timed
    return found["attention"]


def test_contenders_take_turns_and_each_gets_its_milliseconds(monkeypatch):
    clock = Clock({"a": 0.5, "b": 4.0}, slow_turns=(3, 4))  # of the first round
    stand_ins(monkeypatch, clock)
    assert measured_attention(clock, ["a", "b"]) == {"a": 0.5, "b": 4.0}
    assert clock.turns == [("a", 1), ("b", 1)] + [("a", 40), ("b", 5)] * fastest.ROUNDS  # 20 ms each


def test_what_fails_is_wrong_or_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    def fail(error):
        def attention(*args, **options):
            raise error
        return attention
    clock = Clock({"first": 1.0, "last": 2.0})
    stand_ins(monkeypatch, clock, no_memory=fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
              broken=fail(ValueError("no\ntwo lines")),
              off=lambda *args, **options: 1.01 * reference.attention(*args, **options),
              nan=lambda *args, **options: float("nan") * reference.attention(*args, **options),
              nan_gradient=lambda q, *args, **options: reference.attention(q, *args, **options) + (q - q).sqrt())
    assert measured_attention(clock, ["first", "no memory", "broken", "off", "nan", "nan gradient", "last"]) == {
        "first": 1.0, "last": 2.0, "no memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "broken": "ValueError: no", "off": "relative difference 0.01 to first at the run's shapes",
        "nan": "results are not finite at the run's shapes",
        "nan gradient": "results are not finite at the run's shapes"}
    assert measured_attention(clock, ["nan", "last"]) == {
        "nan": "results are not finite at the run's shapes", "last": 2.0}


def recorded(monkeypatch, op: str, model: ModelConfig, **shapes) -> list[dict[str, object]]:
    """The arguments of each call of op by a stand-in for Triton, which is PyTorch's."""
    calls = []
    plain = chunked_loss if op == "linear_cross_entropy" else reference
    def run(*args, **options):
        calls.append(dict(enumerate(args)) | options)
        return getattr(plain, op)(*args, **options)
    monkeypatch.setattr(kernels, "module_of", lambda op, backend: SimpleNamespace(**{op: run}))
    fastest.measure({op: ["triton", "torch"]}, model, compiles=False, timer=lambda call, repeats: call() and 1.0,
                    **SHAPES | shapes)
    return calls


@pytest.mark.parametrize("model, documents", [(GPT2, False), (GPT2, True), (QWEN, False),
                                              (replace(QWEN, window=7), False)])
def test_attention_is_timed_at_the_run_s_shapes(model, documents, monkeypatch):
    """As the model calls it: q, k and v are views of the projection; with RoPE or QK-norm q and k are new tensors."""
    call = recorded(monkeypatch, "attention", model, documents=documents, T=700)[0]
    H, Hkv, D = model.n_head, model.kv_heads, model.dim_per_head
    assert [call[i].shape for i in range(3)] == [(2, 700, H, D), (2, 700, Hkv, D), (2, 700, Hkv, D)]
    assert call[0].is_contiguous() is call[1].is_contiguous() is (model is not GPT2)
    assert call[2].stride() == (700 * (H + 2 * Hkv) * D, (H + 2 * Hkv) * D, D, 1)
    first_key = call["first_key"]
    assert (first_key is not None) is (documents or model.window is not None)
    if model.window is not None:
        assert first_key[0, -1] == 700 - 7
    if documents:
        assert 0 < first_key.max() < 700 and len(first_key) == 2


def test_what_attends_to_the_packed_projection_is_timed_and_checked_so(monkeypatch):
    """And the others pay for joining the gradients of q, k and v: each gets one gradient of the projection."""
    seen = []
    class Packed:
        supports, attention = (lambda q: True), reference.attention
        @staticmethod
        def packed_attention(qkv, n_head, *, first_key):
            seen.append((qkv.shape, n_head, first_key))
            n_kv_head = (qkv.shape[2] - n_head) // 2
            return 1.1 * reference.attention(*qkv.split((n_head, n_kv_head, n_kv_head), dim=2), first_key=first_key)
    work = fastest._work("attention", GPT2, **SHAPES)
    monkeypatch.setattr(kernels, "module_of", lambda op, backend: Packed)
    of_packed = fastest._forward_and_backward(work.run, Packed, work)
    assert seen == [((2, 60, 6, 30), 2, None)]
    for ours, plain in zip(of_packed, fastest._forward_and_backward(work.run, reference, work), strict=True):
        torch.testing.assert_close(ours, 1.1 * plain)
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    for model in (GPT2, QWEN):
        found = self_check.verdicts("auto", model, table_rows=1152, dtype=torch.float32, device=CPU)
        reason = found["attention"]["triton"]
        assert reason.startswith("relative error 0.1 of the output") if model is GPT2 else reason is None


def test_norms_are_timed_with_the_residual(monkeypatch):
    call = recorded(monkeypatch, "layer_norm", GPT2)[0]
    assert call[0].shape == call["residual"].shape == (2, 60, 60) and call[2].shape == (60,)
    assert recorded(monkeypatch, "layer_norm", replace(GPT2, bias=False))[0][2] is None
    call = recorded(monkeypatch, "rms_norm", QWEN)[0]
    assert call[0].shape == call["residual"].shape == (2, 60, 64) and call[1].shape == (64,)


def test_the_loss_is_timed_as_the_step_asks_for_it_a_chunk_at_most(monkeypatch):
    call = recorded(monkeypatch, "linear_cross_entropy", QWEN)[0]
    assert (call[0].shape, call[1].shape, call[2].shape) == ((120, 64), (1152, 64), (120,))
    assert (call["vocab_size"], call["reduction"], call["softcap"]) == (1100, "sum", 15.0)
    monkeypatch.setattr(fastest, "LOSS_ROWS", 100)
    assert recorded(monkeypatch, "linear_cross_entropy", QWEN)[0][0].shape == (100, 64)


def test_what_pytorch_computes_is_compiled_if_the_run_is_and_nothing_else(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: (
        lambda *args: (compiled.append(args[0]), run(*args))[1]))
    op = {"linear_cross_entropy": ["cpu", "torch"]}
    fastest.measure(op, GPT2, compiles=True, timer=lambda *args: 1.0, **SHAPES)
    assert set(compiled) == {chunked_loss}
    compiled.clear()
    fastest.measure(op, GPT2, compiles=False, timer=lambda *args: 1.0, **SHAPES)
    assert not compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [GPT2, QWEN], ids=["GPT-2", "Qwen3"])
def test_every_operation_is_timed_for_real(model, dtype, monkeypatch):
    """By the CPU's clock, with the backends that a CPU has; the run's random numbers stay as they were."""
    monkeypatch.setattr(fastest, "ROUND_S", 0.0)
    norm = {"layer_norm": ["torch", "torch"]} if model is GPT2 else {"rms_norm": ["cpu", "torch"]}
    before = torch.get_rng_state()
    found, _ = fastest.measure({"attention": ["cpu", "torch", "SDPA flash", "SDPA cuDNN"],
                                "linear_cross_entropy": ["cpu", "torch"], **norm},
                               model, compiles=False, **SHAPES | {"dtype": dtype})
    assert found["attention"].pop("SDPA cuDNN").startswith("RuntimeError: No ")
    assert all(0.0 < ms < 1e4 for of in found.values() for ms in of.values())
    assert set(found["attention"]) == {"cpu", "torch", "SDPA flash"} and len(found) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_triton_s_kernels_are_timed_for_real(kernel_device, monkeypatch):
    monkeypatch.setattr(fastest, "ROUND_S", 0.0)
    monkeypatch.setattr(fastest, "ROUNDS", 1)
    contenders = {"attention": ["triton", "triton fused"], "rms_norm": ["triton", "torch"],
                  "linear_cross_entropy": ["triton", "torch"]}
    found, _ = fastest.measure(contenders, QWEN, compiles=False,
                               **SHAPES | {"device": kernel_device, "documents": True})
    assert {op: list(of) for op, of in found.items()} == contenders
    assert all(isinstance(ms, float) for of in found.values() for ms in of.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_a_gpu_times_every_contender_compiled(documents, triton_gpu):
    model = ModelConfig(vocab_size=50257, n_layer=1)
    asked = fastest.rivals("auto", model, device=triton_gpu, documents=documents, compiles=True)
    found = self_check.verdicts("auto", model, table_rows=50304, dtype=torch.bfloat16, device=triton_gpu, rivals=asked)
    contenders = self_check.contenders([found])
    assert {"triton", "triton fused"} < set(contenders["attention"]), found
    measured = fastest.measure(contenders, model, B=4, T=1024, table_rows=50304, dtype=torch.bfloat16,
                               device=triton_gpu, documents=documents, compiles=True)
    assert all(isinstance(ms, float) for of in measured[0].values() for ms in of.values()), measured
    print(self_check.agree("auto", [found], measured=measured)[1])


def test_every_name_that_can_be_chosen_is_a_backend():
    for name in {name for documents in (True, False) for name in rivals(documents=documents)["attention"]}:
        if name != "triton fused":  # which needs triton: tested with its kernels
            assert kernels.module_of("attention", name) is attention_backends.backend_of(name)
