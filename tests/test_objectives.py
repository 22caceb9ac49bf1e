"""The router objectives against loops that spell the formulas out."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn.training import controllers, objectives


def case(b=2, t=13, e=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(b, t, e, generator=generator, dtype=torch.float64)
    documents = torch.zeros(b, t, dtype=torch.int64)
    documents[0, 5:] = 1
    documents[0, 10:] = -1  # padding
    documents[1, 1:] = 3
    return r, documents


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_activation_locality(beta):
    r, documents = case()
    terms = []
    for b in range(2):
        for t in range(12):
            if documents[b, t] != documents[b, t + 1] or documents[b, t] < 0:
                continue
            for e in range(7):
                p, q = sigmoid(beta * float(r[b, t, e])), sigmoid(beta * float(r[b, t + 1, e]))
                terms.append(-(q * math.log(p) + (1 - q) * math.log(1 - p)))
    assert float(objectives.activation_locality(r, documents, beta)) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_activation_locality_without_pairs_is_zero():
    r, _ = case(t=3)
    assert float(objectives.activation_locality(r, torch.arange(3).expand(2, 3))) == 0.0
    assert float(objectives.activation_locality(r[:, :1], torch.zeros(2, 1))) == 0.0


def test_activation_locality_gradient_runs_through_both_sides():
    r = torch.tensor([[[0.3], [-0.2]]], dtype=torch.float64, requires_grad=True)
    objectives.activation_locality(r, torch.zeros(1, 2, dtype=torch.int64), 2.0).backward()
    x, y = 2.0 * 0.3, 2.0 * -0.2
    slope = sigmoid(y) * (1 - sigmoid(y))
    assert r.grad.flatten().tolist() == pytest.approx([2 * (sigmoid(x) - sigmoid(y)), -2 * slope * x], rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 64])
def test_chunk_sparsification(chunk):
    r, documents = case()
    a = r.relu()
    unused = []
    for b in range(2):
        for start in range(0, 13, chunk):
            members = [t for t in range(start, min(start + chunk, 13)) if documents[b, t] >= 0]
            for e in range(7):
                shares = [float(a[b, t, e]) / (float(a[b, t].sum()) + 1e-5) for t in members]
                if members:
                    unused.append(math.exp(sum(math.log(1 - p + 1e-5) for p in shares)))
    expected = 1 - sum(unused) / len(unused)
    assert float(objectives.chunk_sparsification(a, documents, chunk)) == pytest.approx(expected, rel=1e-9)


def test_chunk_sparsification_counts_experts_of_one_hot_routing():
    a = torch.zeros(1, 64, 4, dtype=torch.float64)
    a[0, :, 0], a[0, 3, :2] = 1.0, torch.tensor([0.0, 1.0])  # experts 0 and 1 of 4 are used
    value = float(objectives.chunk_sparsification(a, torch.zeros(1, 64, dtype=torch.int64)))
    assert value == pytest.approx(0.5, abs=1e-3)


def test_router_entropy():
    r, documents = case()
    a, terms = r.relu(), []
    for b in range(2):
        for t in range(13):
            if documents[b, t] >= 0:
                shares = [float(a[b, t, e]) / (float(a[b, t].sum()) + 1e-5) for e in range(7)]
                terms.append(-sum(p * math.log(p + 1e-5) for p in shares))
    assert float(objectives.router_entropy(a, documents)) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


OBJECTIVES = {
    "locality": lambda r, documents: objectives.activation_locality(r, documents, 3.0),
    "chunk": lambda r, documents: objectives.chunk_sparsification(r.relu(), documents, 5),
    "entropy": lambda r, documents: objectives.router_entropy(r.relu(), documents),
    "l1": lambda r, documents: objectives.l1(r.relu(), documents, 0.3),
    "load_balance": lambda r, documents: objectives.load_balance(r, r.relu(), documents),
    "use": lambda r, documents: objectives.use_pull(r, documents, torch.linspace(-1, 1, 7)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_slope_of_the_value(name):
    """Autograd against central differences in float64, through both sides of the formula, away from the kinks at 0."""
    r, documents = case(seed=4)
    r = torch.where(r.abs() < 1e-3, torch.full_like(r, 0.1), r).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OBJECTIVES[name](x, documents), (r,), eps=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(OBJECTIVES[name](r, documents), r)
    padding = documents < 0
    assert (gradient[padding] == 0).all() and (gradient[~padding] != 0).any()


@pytest.mark.parametrize("name", ["chunk", "entropy", "l1"])
def test_inactive_experts_have_no_gradient(name):
    r, documents = case()
    r.requires_grad_()
    (gradient,) = torch.autograd.grad(OBJECTIVES[name](r, documents), r)
    assert (gradient[r <= 0] == 0).all()


def test_locality_moves_inactive_experts_too():
    """It acts on the raw logits: an expert that is idle at both neighbours is still pulled."""
    r = torch.tensor([[[-0.01], [-0.02]]], dtype=torch.float64, requires_grad=True)
    objectives.activation_locality(r, torch.zeros(1, 2, dtype=torch.int64)).backward()
    assert (r.grad != 0).all()


@pytest.mark.parametrize("x,y", [(0.002, -0.003), (0.3, 0.4), (0.3, -0.4), (-5.0, 7.0), (60.0, -60.0), (-60.0, -60.0)])
def test_locality_at_beta_100_in_float32(x, y):
    """The sigmoid saturates: float32 agrees with the formula in stable form, its gradient stays finite and right.

    With u = 100 x and q = sigmoid(100 y): value softplus(u) - q u, slopes 100 (sigmoid(u) - q) and -100 q (1 - q) u.
    """
    r = torch.tensor([[[x], [y]]], requires_grad=True)
    value = objectives.activation_locality(r, torch.zeros(1, 2, dtype=torch.int64))
    value.backward()
    u, q = 100 * x, stable_sigmoid(100 * y)
    assert value.item() == pytest.approx(max(u, 0) + math.log1p(math.exp(-abs(u))) - q * u, rel=1e-5, abs=1e-6)
    slopes = [100 * (stable_sigmoid(u) - q), -100 * q * stable_sigmoid(-100 * y) * u]
    assert r.grad.flatten().tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-4)


def stable_sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def test_gradients_are_finite_without_active_experts():
    r = torch.full((1, 5, 3), -1.0, requires_grad=True)
    documents = torch.zeros(1, 5, dtype=torch.int64)
    loss = objectives.chunk_sparsification(r.relu(), documents, 2) + objectives.router_entropy(r.relu(), documents)
    loss.backward()
    assert torch.isfinite(r.grad).all()


def test_adaptive_factor_follows_the_loss():
    factor = controllers.AdaptiveFactor(0.1, warmup=4, stable=20, window=10, min_ratio=1.025, max_factor=4.0)
    values = []
    for step in range(70):
        values.append(factor.value())
        # halves after step 10, then rises by a hair, then tenfold
        factor.update(1.0 if step < 10 else 0.5 if step < 20 else 0.501 if step < 30 else 5.01)
    assert values[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert values[4:20] == pytest.approx([0.1] * 16)
    assert values[20:30] == pytest.approx([0.1 - 0.005 * (i + 1) for i in range(10)])  # adapts at `stable` itself
    assert values[39] == pytest.approx(0.05 * 1.025)  # 1.002 is raised to 1.025
    assert values[49] == pytest.approx(0.4)  # tenfold is cut at 4 times the start
    assert values[69] == pytest.approx(0.4)


def test_adaptive_factor_equals_the_authors_schedule():
    """By hand after pretrain/cpm/training_utils/value_scheduler.py: iteration i is step i - 1, windows of 3, stable 7.

    Window means: iterations 1-3: 2.0, 4-6: 3.0, 7-9: 1.5, 10-12: 1.5, 13-15: 3.0. Iteration 6 is before `stable`, 9 is
    the first multiple of 3 from there on: ratio 1.5 / 3 = 0.5; iteration 12: 1.5 / 1.5 = 1; iteration 15: 3 / 1.5 = 2.
    """
    factor = controllers.AdaptiveFactor(0.6, warmup=2, stable=7, window=3, min_ratio=1.1, max_factor=4.0)
    losses = [1, 2, 3, 3, 3, 3, 1, 2, 1.5, 1.5, 1.5, 1.5, 2, 3, 4, 9, 9, 9]
    values = []
    for loss in losses:
        values.append(factor.value())
        factor.update(loss)
    expected = [0.3, *[0.6] * 8, 0.5, 0.4, 0.3, *[0.3] * 3, 0.4, 0.5, 0.6]
    assert values == pytest.approx(expected, rel=1e-12)


def test_adaptive_factor_goes_on_from_its_state():
    one = controllers.AdaptiveFactor(0.1, 2, 5, 4)
    losses = [1 / (i + 1) for i in range(40)]
    for loss in losses[:17]:
        one.update(loss)
    two = controllers.AdaptiveFactor(0.2)
    two.load(one.state())
    for loss in losses[17:]:
        one.update(loss)
        two.update(loss)
        assert one.value() == two.value()


def test_sparsity_controller():
    controller = controllers.SparsityController(1e-8, 2.0, 0.2)
    for ratio, expected in ((0.5, 2e-8), (0.21, 4e-8), (0.2, 2e-8), (0.1, 1e-8), (0.1, 1e-8), (0.9, 2e-8)):
        controller.update(ratio)
        assert controller.value() == pytest.approx(expected)


def test_expert_bias_moves_against_the_load():
    bias = torch.zeros(3)
    controllers.update_expert_bias(bias, torch.tensor([1.0, 0.0, 0.5]), target=0.5, rate=0.01)
    assert bias.tolist() == pytest.approx([-0.01, 0.01, 0.0])


def test_use_of_experts_is_pulled_into_its_range():
    """Shares after two steps are 0.9 times the first and 0.1 times the second."""
    use = controllers.ExpertUse(low=0.1, high=0.6)
    assert use.pull() is None
    use.update(torch.tensor([[0.0, 0.05, 0.1, 0.6, 0.8, 1.0]]))
    assert use.pull().tolist()[0] == pytest.approx([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0], abs=1e-6)
    use.update(torch.tensor([[1.0, 0.05, 0.1, 0.6, 0.8, 0.0]]))
    assert use.share.tolist()[0] == pytest.approx([0.1, 0.05, 0.1, 0.6, 0.8, 0.9])
    other = controllers.ExpertUse(low=0.1, high=0.6)
    other.load(use.state())
    assert torch.equal(other.pull(), use.pull())


def test_l1_weighs_experts_by_their_use():
    r, documents = case()
    a, real = r.relu(), documents >= 0
    used = [sum(float(a[b, t, e]) > 0 for b in range(2) for t in range(13) if real[b, t]) for e in range(7)]
    n = int(real.sum())
    expected = sum(
        float(a[b, t, e]) * used[e] / (0.2 * n)
        for b in range(2) for t in range(13) if real[b, t] for e in range(7)
    ) / n  # fmt: skip
    assert float(objectives.l1(a, documents, 0.2)) == pytest.approx(expected, rel=1e-6)  # shares are float32


def test_load_balance_is_one_where_all_are_used_alike():
    even = torch.zeros(1, 4, 4, dtype=torch.float64)
    chosen = torch.eye(4, dtype=torch.float64)[None]
    documents = torch.zeros(1, 4, dtype=torch.int64)
    assert float(objectives.load_balance(even, chosen, documents)) == pytest.approx(1.0)
    skewed = 50 * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(1, 4, 4)
    alone = torch.zeros_like(skewed)
    alone[..., 0] = 1.0
    assert float(objectives.load_balance(skewed, alone, documents)) == pytest.approx(4.0)


def test_use_pull_moves_idle_experts_and_leaves_padding_alone():
    r = torch.full((1, 3, 2), -1.0, dtype=torch.float64, requires_grad=True)
    objectives.use_pull(r, torch.tensor([[0, 0, -1]]), torch.tensor([-1.0, 0.5])).backward()
    assert r.grad[0].tolist() == [[-0.25, 0.125], [-0.25, 0.125], [0.0, 0.0]]
