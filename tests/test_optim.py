"""The optimizer against PyTorch's own, the schedules against their closed forms, clipping and loss scaling."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import checkpoint
from config import ModelConfig, OptimConfig
from model import GPT
from optim import LossScale, Optimizer, SpikeGuard, gradient_norm, learning_rate, orthogonalise

MODEL = ModelConfig(n_layer=2, n_head=3, n_kv_head=1, n_embd=24, mlp_hidden=40, vocab_size=61, max_seq_len=9,
                    mlp="swiglu", qk_norm=True, tie_embeddings=False)


def make_model(seed: int = 0) -> GPT:
    """Norm weights and biases random too, so that decaying them by mistake would show."""
    torch.manual_seed(seed)
    model = GPT(MODEL)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def set_gradients(model: GPT, step: int) -> None:
    """Random gradients, a pure function of the step; sizes differ by parameter, as they do in training."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** -(i % 4)


def rates(steps: int) -> list[float]:
    return [1e-2 * (1 + math.cos(step)) / 2 + 1e-3 for step in range(steps)]


def decays(name: str) -> bool:
    """Whether a parameter should decay, told by its name: biases and all kinds of norms do not."""
    return not (name.endswith("bias") or "norm" in name)


# ---- AdamW -----------------------------------------------------------------------------------------------------------

def test_ten_steps_of_adamw_equal_pytorchs():
    config = OptimConfig(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)
    ours, theirs = make_model(), make_model()
    optimizer = Optimizer(ours, config)
    named = dict(theirs.named_parameters())
    groups = [{"params": [p for name, p in named.items() if decays(name)], "weight_decay": 0.3},
              {"params": [p for name, p in named.items() if not decays(name)], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.99), eps=1e-6, foreach=False)
    for step, lr in enumerate(rates(10)):
        for model in (ours, theirs):
            set_gradients(model, step)
        optimizer.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # float32 over ten steps: a few roundings of values near 1, in another order than the unfused loop's
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(optimizer.exp_avg[name], reference.state[q]["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(optimizer.exp_avg_sq[name], reference.state[q]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
    assert optimizer.updates == 10


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_and_embeddings_decay(name):
    """Without gradients the decay is all that happens: parameters shrink by 1 - lr x weight_decay or stay."""
    config = OptimConfig(name=name, lr=1e-2, muon_lr=5e-2, weight_decay=0.4)
    model, before = make_model(), dict(make_model().named_parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(model, config).step(1e-2)
    for key, p in model.named_parameters():
        lr = 5e-2 if name == "muon" and key.startswith("blocks.") else 1e-2
        wanted = before[key] * (1 - lr * 0.4) if decays(key) else before[key]
        torch.testing.assert_close(p, wanted, rtol=1e-6, atol=0.0, msg=lambda text, key=key: f"{key}: {text}")


# ---- Muon ------------------------------------------------------------------------------------------------------------

def plain_orthogonalise(matrix: Tensor) -> Tensor:
    """Newton-Schulz of the Muon post, one float64 matrix: X <- a X + b (X X^T) X + c (X X^T)^2 X, five times."""
    X = matrix.double() / matrix.double().norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * (A @ X) + 2.0315 * (A @ A @ X)
    return X


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 12), (2, 12, 5), (4, 63, 17), (2, 1, 7)])
def test_a_stack_of_matrices_is_orthogonalised_as_each_alone(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3  # its size takes no part
    got = orthogonalise(matrices, dtype=torch.float32)
    # float32: 24 bits, and five steps that enlarge small singular values and the error in them, up to 3.4^5 = 480 times
    torch.testing.assert_close(got.double(), torch.stack([plain_orthogonalise(m) for m in matrices]),
                               rtol=0.0, atol=480 * 2 ** -22)
    values = torch.linalg.svdvals(got)[:, :1]
    assert (values > 0.6).all() and (values < 1.3).all()  # the post: about 0.7 to 1.2


def test_orthogonalising_zero_gives_zero():
    assert orthogonalise(torch.zeros(2, 3, 5), dtype=torch.bfloat16).count_nonzero() == 0


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    optimizer = Optimizer(make_model(), OptimConfig(name="muon"))
    per_block = ("attn.proj.weight", "attn.qkv.weight", "mlp.fc.weight", "mlp.proj.weight")
    assert sorted(optimizer.muon) == [f"blocks.{layer}.{name}" for layer in (0, 1) for name in per_block]
    everything = dict(make_model().named_parameters()).keys()
    assert optimizer.muon.keys() | optimizer.adamw.keys() == everything
    assert not optimizer.muon.keys() & optimizer.adamw.keys()
    assert {"wte.weight", "wpe.weight", "lm_head.weight", "blocks.0.attn.q_norm.weight"} <= optimizer.adamw.keys()


# Rows of the matrices that one weight of MODEL holds: q (3 heads of 8), k and v (1 head); gate and up.
PARTS = {"attn.qkv.weight": (24, 8, 8), "mlp.fc.weight": (40, 40)}


def matrices_in(name: str, weight: Tensor) -> list[Tensor]:
    """The separate matrices in a block's weight: wide (k, v, mlp.proj), square (q, attn.proj) or tall (gate, up)."""
    parts = [rows for ending, rows in PARTS.items() if name.endswith(ending)]
    return list(weight.split(parts[0])) if parts else [weight]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_five_steps_of_muon_equal_pytorchs_on_each_matrix_alone(dtype):
    config = OptimConfig(name="muon", lr=1e-2, muon_lr=0.05, weight_decay=0.3, muon_momentum=0.9)
    model = make_model()
    optimizer = Optimizer(model, config, newton_schulz_dtype=dtype)
    start = {name: p.detach().clone() for name, p in optimizer.muon.items()}
    alone = {name: [torch.nn.Parameter(m.clone()) for m in matrices_in(name, p)] for name, p in start.items()}
    reference = torch.optim.Muon(itertools.chain(*alone.values()), weight_decay=0.3, momentum=0.9, nesterov=True,
                                 adjust_lr_fn="original")
    for step, lr in enumerate(rates(5)):
        set_gradients(model, step)
        for name, matrices in alone.items():
            for matrix, gradient in zip(matrices, matrices_in(name, optimizer.muon[name].grad), strict=True):
                matrix.grad = gradient.clone()
        optimizer.step(lr)
        reference.param_groups[0]["lr"] = 0.05 * lr / 1e-2
        reference.step()
    for name, p in optimizer.muon.items():
        momentum = torch.cat([reference.state[matrix]["momentum_buffer"] for matrix in alone[name]])
        torch.testing.assert_close(optimizer.momentum[name], momentum, rtol=1e-5, atol=1e-6)
        for ours, theirs, begin in zip(*(matrices_in(name, t) for t in (p, torch.cat(alone[name]), start[name])),
                                       strict=True):
            # PyTorch iterates in bfloat16: 8 bits, errors enlarged with small singular values; 5% of the way moved
            assert (ours - theirs).norm() < 0.05 * (theirs - begin).norm(), name


def test_steps_of_muon_equal_a_float64_loop():
    """Tighter than PyTorch's bfloat16 lets: momentum, Nesterov, orthogonalising, decay, shape factor as plain lines."""
    config = OptimConfig(name="muon", lr=1e-2, muon_lr=0.05, weight_decay=0.3, muon_momentum=0.9)
    model = make_model()
    optimizer = Optimizer(model, config, newton_schulz_dtype=torch.float32)
    plain = {name: [m.double() for m in matrices_in(name, p.detach())] for name, p in optimizer.muon.items()}
    momentum = {name: [torch.zeros_like(m) for m in matrices] for name, matrices in plain.items()}
    for step, lr in enumerate(rates(4)):
        set_gradients(model, step)
        optimizer.step(lr)
        muon_lr = 0.05 * lr / 1e-2
        for name, matrices in plain.items():
            for i, gradient in enumerate(matrices_in(name, optimizer.muon[name].grad.double())):
                momentum[name][i] = 0.9 * momentum[name][i] + 0.1 * gradient
                update = plain_orthogonalise(0.1 * gradient + 0.9 * momentum[name][i])
                rows, columns = gradient.shape
                matrices[i] = (matrices[i] * (1 - muon_lr * 0.3)
                               - muon_lr * math.sqrt(max(1, rows / columns)) * update)
    for name, matrices in plain.items():
        # four updates of size 0.05 x the error of a float32 orthogonalisation (above)
        torch.testing.assert_close(optimizer.muon[name].double(), torch.cat(matrices), rtol=0.0,
                                   atol=4 * 0.05 * 480 * 2 ** -22)


def test_muons_learning_rate_follows_the_schedule():
    config = OptimConfig(name="muon", lr=1e-2, muon_lr=0.05, weight_decay=0.0)
    moved = {}
    for share in (1.0, 0.25):
        model = make_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        set_gradients(model, 0)
        Optimizer(model, config).step(1e-2 * share)
        moved[share] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, whole in moved[1.0].items():
        # float32: the difference of values near 3 is known to 2^-22
        torch.testing.assert_close(moved[0.25][name], 0.25 * whole, rtol=1e-4, atol=2 ** -21)


# ---- State -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_continued_from_saved_state_is_bitwise_the_unbroken_one(name):
    config = OptimConfig(name=name)
    unbroken = make_model()
    optimizer = Optimizer(unbroken, config)
    for step in range(3):
        set_gradients(unbroken, step)
        optimizer.step(1e-2)
    saved = {key: t.clone() for key, t in optimizer.state_tensors().items()}
    resumed = copy.deepcopy(unbroken)
    resumed_optimizer = Optimizer(resumed, config)
    checkpoint.fill(resumed_optimizer.state_tensors(), saved)
    resumed_optimizer.updates = optimizer.updates
    for model, opt in ((unbroken, optimizer), (resumed, resumed_optimizer)):
        for step in range(3, 6):
            set_gradients(model, step)
            opt.step(1e-2)
    for p, q in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.updates == resumed_optimizer.updates == 6
    for key, t in optimizer.state_tensors().items():
        assert torch.equal(t, resumed_optimizer.state_tensors()[key])
        assert t is not saved[key]


def test_state_is_named_by_kind_and_parameter():
    model = make_model()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tensors = Optimizer(model, OptimConfig(name="muon")).state_tensors()
    assert tensors["momentum.blocks.1.mlp.fc.weight"].shape == shapes["blocks.1.mlp.fc.weight"]
    assert tensors["exp_avg.final_norm.weight"].shape == shapes["final_norm.weight"]
    assert len(tensors) == 8 + 2 * (len(shapes) - 8)  # one moment for Muon's 8, two for the rest
    for key, t in tensors.items():
        assert t.shape == shapes[key.partition(".")[2]] and t.dtype == torch.float32


def test_state_that_does_not_fit_is_refused_by_name():
    optimizer = Optimizer(make_model(), OptimConfig())
    state = optimizer.state_tensors()
    missing = {key: t for key, t in state.items() if key != "exp_avg.wte.weight"}
    with pytest.raises(ValueError, match="exp_avg.wte.weight"):
        checkpoint.fill(state, missing)
    with pytest.raises(ValueError, match="exp_avg.zzz"):
        checkpoint.fill(state, state | {"exp_avg.zzz": torch.zeros(1)})
    with pytest.raises(ValueError, match="exp_avg.wte.weight"):
        checkpoint.fill(state, state | {"exp_avg.wte.weight": torch.zeros(1, 24)})


# ---- Schedules -------------------------------------------------------------------------------------------------------

def test_warmup_rises_in_equal_steps_and_reaches_the_peak_when_it_ends():
    config = OptimConfig(lr=0.5, warmup_steps=4, decay_steps=100)
    for schedule in ("cosine", "wsd", "constant"):
        got = [learning_rate(step, replace(config, schedule=schedule)) for step in range(5)]
        assert got == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert learning_rate(0, OptimConfig(lr=0.5, warmup_steps=0, decay_steps=10)) == 0.5


def test_cosine_is_halfway_at_its_middle_and_stays_at_min_lr_after_its_end():
    config = OptimConfig(lr=0.9, min_lr=0.1, schedule="cosine", warmup_steps=10, decay_steps=110)
    assert learning_rate(10, config) == 0.9
    assert learning_rate(60, config) == pytest.approx(0.5)
    assert learning_rate(35, config) == pytest.approx(0.1 + 0.8 * (1 + math.sqrt(0.5)) / 2)  # cos(pi/4)
    assert learning_rate(109, config) > 0.1
    assert [learning_rate(step, config) for step in (110, 111, 10_000)] == [0.1] * 3


def test_wsd_holds_and_then_falls_in_a_line_to_min_lr():
    config = OptimConfig(lr=0.9, min_lr=0.1, schedule="wsd", warmup_steps=10, decay_steps=100, decay_fraction=0.2)
    assert [learning_rate(step, config) for step in (10, 50, 80)] == pytest.approx([0.9] * 3)
    assert [learning_rate(step, config) for step in (81, 90, 99)] == pytest.approx([0.86, 0.5, 0.14])
    assert [learning_rate(step, config) for step in (100, 101, 10_000)] == [0.1] * 3


def test_wsd_may_fall_from_the_first_step():
    config = OptimConfig(lr=1.0, schedule="wsd", decay_steps=4, decay_fraction=1.0)
    assert [learning_rate(step, config) for step in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_constant_never_falls():
    config = OptimConfig(lr=0.3, min_lr=0.1, schedule="constant", warmup_steps=2, decay_steps=5)
    assert [learning_rate(step, config) for step in (2, 5, 6, 10_000)] == [0.3] * 4


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_after_warmup_no_schedule_rises_or_leaves_its_bounds(schedule):
    config = OptimConfig(lr=0.3, min_lr=0.1, schedule=schedule, warmup_steps=7, decay_steps=63)
    after = [learning_rate(step, config) for step in range(7, 80)]
    assert all(0.1 <= later <= earlier <= 0.3 + 1e-12 for earlier, later in itertools.pairwise(after))


# ---- Gradient norm, loss scale ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_the_gradients_norm_is_that_of_all_numbers_together(bad):
    model = make_model()
    set_gradients(model, 0)
    if bad is not None:
        next(model.parameters()).grad[0, 0] = bad
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    got = gradient_norm([p.grad for p in model.parameters()])
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == pytest.approx(norm, rel=1e-5, nan_ok=True)


def test_loss_scale_moves_as_gradscalers(monkeypatch):
    """Fed the same good and overflowing gradients, among them three good steps in a row, twice, and two bad ones."""
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    parameter = torch.nn.Parameter(torch.zeros(()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16, growth_interval=3)
    scaler.scale(parameter)  # GradScaler makes its state at the first use
    sgd = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScale.for_dtype(torch.float16)
    assert ours.scale == scaler.get_scale() == 65536.0
    seen = []
    for finite in map(int, "1110111111010011"):
        parameter.grad = torch.tensor(1.0 if finite else math.inf)
        scaler.step(sgd)
        scaler.update()
        ours.update(bool(finite))
        assert ours.scale == scaler.get_scale()
        seen.append(ours.scale)
    assert len(set(seen)) > 2 and seen != sorted(seen) and seen != sorted(seen, reverse=True)


def test_loss_scale_has_gradscalers_interval_and_a_floor_of_1():
    assert LossScale.GROWTH_INTERVAL == torch.amp.GradScaler("cpu").get_growth_interval()
    scale = LossScale(scale=2.0, dynamic=True)
    scales = []
    for _ in range(3):
        scale.update(False)
        scales.append(scale.scale)
    assert scales == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_scale_stays_1_where_nothing_underflows(dtype):
    scale = LossScale.for_dtype(dtype)
    for finite in [True] * 5 + [False] * 5:
        scale.update(finite)
    assert scale == LossScale(scale=1.0, good_steps=0, dynamic=False)


# ---- Spikes ----------------------------------------------------------------------------------------------------------

def test_a_spike_is_what_lies_so_many_robust_deviations_above_the_median():
    """Against numpy's medians over what the rule counts, with spikes of either kind strewn in."""
    rng, guard, counted = np.random.default_rng(0), SpikeGuard(deviations=4.0), []
    for step in range(400):
        measured = [3.0 + 0.1 * rng.standard_normal(), 0.5 + 0.05 * rng.standard_normal()]
        if step % 29 == 28:
            measured[step % 2] += 5.0
        past = np.array(counted[-128:])
        wanted = len(counted) >= 32 and any(
            value > np.median(column) + 4.0 * 1.4826 * np.median(np.abs(column - np.median(column)))
            for value, column in zip(measured, past.T, strict=True))
        assert guard.leaves_out(*measured) == wanted, step
        counted += [] if wanted else [measured]
    assert 10 < guard.skipped < 30 and guard.history == counted[-128:]


def test_ten_spikes_in_a_row_are_a_new_state_of_affairs():
    guard = SpikeGuard(deviations=3.0)
    for i in range(40):
        assert not guard.leaves_out(2.0 + 0.01 * (i % 5), 1.0 + 0.01 * (i % 3))
    assert [guard.leaves_out(4.0, 1.0) for _ in range(10)] == [True] * 10
    assert not any(guard.leaves_out(4.0, 1.0) for _ in range(20))


def test_without_a_number_nothing_is_left_out_and_nothing_kept():
    guard = SpikeGuard()
    assert not any(guard.leaves_out(10.0 ** i, 1.0) for i in range(50)) and guard.history == []
