"""Claims about SSL guidance: the loss, its decay, the projector, the agreement of gradients."""
import numpy as np
import torch
import torch.nn.functional as F

import guidance as G
import regime as R
from model import flow_matching_loss
from regime import discrepancy, over_tokens

# --- the loss

def slow_loss(z, phi, mask) -> float:
    clips = []
    for clip in range(z.shape[0]):
        distances = []
        for token in range(z.shape[1]):
            if mask[clip, token]:
                a, b = z[clip, token], phi[clip, token]
                distances.append(1 - float(a @ b / (a.norm() * b.norm())))
        clips.append(np.mean(distances) if distances else 0.0)
    return np.mean(clips)


def test_the_alignment_loss_is_the_slow_loop_over_real_tokens():
    z, phi, mask = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.rand(3, 5) < 0.7
    mask[0] = False
    assert abs(float(G.alignment_loss(z, phi, mask)) - slow_loss(z, phi, mask)) < 1e-5
    assert abs(float(G.alignment_loss(z, phi)) - slow_loss(z, phi, torch.ones(3, 5))) < 1e-5


def matching_features_cost_nothing() -> bool:
    phi = torch.randn(2, 4, 6)
    matching, opposite = float(G.alignment_loss(3 * phi, phi)), float(G.alignment_loss(-phi, phi))
    return abs(matching) < 1e-5 and abs(opposite - 2) < 1e-5


def test_the_alignment_loss_is_0_for_matching_and_2_for_opposite_features():
    assert matching_features_cost_nothing()


def test_negative_control_without_normalisation_matching_features_cost_something(monkeypatch):
    monkeypatch.setattr(G.F, "normalize", lambda x, dim, eps: x)
    assert not matching_features_cost_nothing()


def test_loss_and_gradient_are_those_of_torchs_cosine_similarity():
    z, phi = torch.randn(3, 5, 7, requires_grad=True), 3 * torch.randn(3, 5, 7)
    ours, oracle = G.alignment_loss(z, phi), (1 - F.cosine_similarity(z, phi, dim=-1)).mean()
    assert torch.allclose(ours, oracle, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(loss, z)[0] for loss in (ours, oracle)), atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    phi, z = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    G.alignment_loss(z, phi).backward()
    assert phi.grad is None and z.grad.abs().sum() > 0


def test_the_loss_is_finite_for_zero_and_huge_half_precision_features():
    zero = torch.zeros(1, 2, 8)
    for z in (zero, (zero + 6e4).half(), (zero + 1e30).bfloat16()):
        z = z.requires_grad_()
        loss = G.alignment_loss(z, torch.randn(1, 2, 8))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_losses_and_the_discrepancy_are_float32_whatever_they_are_given():
    a, b = (torch.randn(3, 5, 64).bfloat16() for _ in range(2))
    for loss in (G.alignment_loss, flow_matching_loss, discrepancy):
        found = loss(a, b)
        assert found.dtype == torch.float32
        assert torch.allclose(found, loss(a.float(), b.float()), atol=1e-6), loss.__name__


# --- its weight

def test_lambda_falls_from_lambda0_and_is_exactly_zero_past_its_end():
    values = [G.ssl_weight(r, 0.5, 2.0) for r in np.linspace(0, 1, 101)]
    assert values[0] == 0.5 and values == sorted(values, reverse=True)
    assert abs(values[50] - 0.5 * 0.25) < 1e-12
    assert G.ssl_weight(G.OFF_AT, 0.5) > 0
    assert all(G.ssl_weight(r, 0.5) == 0 for r in (G.OFF_AT + 1e-9, 1.0))


def test_the_constants_are_those_of_the_text():
    for words in (f"round({R.FIRST} * 2^(j/{R.PER_DOUBLING}))", f"of the last {R.WINDOW} D on k^(1/3)",
                  f"newest rho weighs {R.NEWEST_SHARE}", f"no ref by {R.NO_SIGNAL} K"):
        assert words in R.__doc__, words
    assert f"once r > {G.OFF_AT}" in G.__doc__


# --- projector and agreement

def test_the_projector_is_three_layers_of_twice_the_width_by_hand():
    P, h = G.Projector(8, 6), torch.randn(2, 5, 8)
    first, second, last = (layer for layer in P.net if isinstance(layer, torch.nn.Linear))
    expected = last(F.silu(second(F.silu(first(h)))))
    assert torch.equal(P(h), expected) and expected.shape == (2, 5, 6)
    assert second.weight.shape == (16, 16)


def test_the_projector_draws_nothing_from_the_common_stream():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, other, again = (G.Projector(8, 6, seed=seed).net[0].weight for seed in (0, 1, 0))
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(first, other) and torch.equal(first, again)


def test_gradient_agreement_is_the_cosine_of_the_gradients_and_leaves_none_behind():
    x, y = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    loss_a, loss_b = (x**2).sum() + y.sum(), (x**3).sum()  # the second does not know y
    gradient_a, gradient_b = torch.cat([2 * x, torch.ones(3)]), torch.cat([3 * x**2, torch.zeros(3)])
    expected = F.cosine_similarity(gradient_a, gradient_b, dim=0).item()
    assert abs(G.gradient_agreement(loss_a, loss_b, [x, y]) - expected) < 1e-5
    assert x.grad is None and abs(G.gradient_agreement(loss_a, -loss_a, [x, y]) + 1) < 1e-5
    loss_a.backward()  # the graph is still alive


def test_all_masked_means_are_over_real_tokens_of_each_clip():
    """guidance.py and model.py may import nothing from regime.py, so each has its own."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 3, 0])[:, None]
    cosine = F.cosine_similarity(a, b, dim=-1)
    assert torch.allclose(G.alignment_loss(a, b, mask), over_tokens(1 - cosine, mask).mean())
    error = (a - b).square().mean(-1)
    assert torch.allclose(flow_matching_loss(a, b, mask), over_tokens(error, mask))
