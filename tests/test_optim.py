"""Claims about Muon, and about which optimizer moves which parameter."""
import itertools

import numpy as np
import pytest
import scipy.optimize
import torch

from model import DiT
from parts.optim import Muon, make_optimizers, rate_factor


def test_muon_is_torchs_own_given_its_polynomials(monkeypatch):
    """Ten steps on matrices of three shapes (bf16 products in another order: small differences)."""
    monkeypatch.setattr(Muon, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 8), (8, 24)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = Muon(ours, 0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, q, x in zip(ours, theirs, start):
        moved = q.detach() - x
        assert (p.detach() - q.detach()).norm() < 0.03 * moved.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muons_update_is_near_the_polar_factor_and_its_polynomials_are_minimax(dtype):
    """Against the singular vectors; and each polynomial against a linear programme's best one on what the one
    before leaves of [0.01, 1]."""
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = Muon.orthogonal(x.to(dtype)).float()
    assert torch.nn.functional.cosine_similarity(y.flatten(1), (u @ v).flatten(1)).min() > 0.95
    s = torch.linalg.svdvals(y)
    assert 0.6 < s.min() and s.max() < 1.4 and torch.linalg.cond(x).min() > 2
    rank_one = torch.ones(1, 8, 8)  # its one singular value is its norm: the largest that there can be
    assert abs(float(torch.linalg.svdvals(Muon.orthogonal(rank_one.to(dtype)).float()).max()) - 1) < 0.35

    low, high = 0.01, 1.0
    for ours in Muon.POLYNOMIALS:
        # Minimise e over (a, b, c, e) with |a x + b x^3 + c x^5 - 1| <= e on a grid of [low, high].
        grid = np.geomspace(low, high, 2_000)
        powers = np.stack([grid, grid**3, grid**5], 1)
        column = -np.ones((len(grid), 1))
        constraints = np.block([[powers, column], [-powers, column]])
        limits = np.repeat([1.0, -1.0], len(grid))
        best = scipy.optimize.linprog([0, 0, 0, 1], constraints, limits, bounds=[(None, None)] * 4).x
        assert np.allclose(ours, best[:3], atol=0.02)
        assert np.abs(powers @ ours - 1).max() < best[3] + 1e-3
        low, high = 1 - best[3], 1 + best[3]
    assert 0.7 < low and high < 1.3


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_each_parameter_has_exactly_one_optimizer(name):
    """Muon takes the matrices of blocks and text layers, but for adaLN; embeddings, head and biases stay with
    AdamW."""
    model = DiT(8, 32, 2, 2, vocab=20)
    optimizers = make_optimizers(model, name, 1e-3, 1e-3, 0.01)
    owned = [[p for group in opt.param_groups for p in group["params"]] for opt in optimizers]
    assert sorted(map(id, itertools.chain(*owned))) == sorted(map(id, model.parameters()))
    kinds = [type(opt).__name__ for opt in optimizers]
    assert kinds == (["AdamW", "Muon"] if name == "muon" else ["AdamW"])
    if name == "muon":
        inner = {id(p) for name, p in model.named_parameters()
                 if p.ndim == 2 and name.startswith(("blocks.", "text.layers.")) and ".ada." not in name}
        assert {id(p) for p in owned[1]} == inner and id(model.blocks[0].qkv.weight) in inner
    assert all(group["weight_decay"] == 0.01 for opt in optimizers for group in opt.param_groups)


def test_the_rate_rises_over_the_warm_up_and_falls_over_the_last_part():
    """Against the slow definition: 1,000 steps, 100 of warm-up, the last fifth cooled. 0: no fall, the same
    bits."""
    rates = [rate_factor(k, 1_000, 100, 0.2) for k in range(1, 1_001)]
    assert rates[:100] == [k / 100 for k in range(1, 101)] and rates[100:800] == [1.0] * 700
    falls = np.diff(rates[800:])
    assert np.allclose(falls, falls[0]) and falls[0] < 0 and 0 < rates[-1] < 0.01
    assert all(rate_factor(k, 1_000, 100) == min(1, k / 100) for k in (1, 99, 100, 999, 1_000))
    assert min(rate_factor(k, 12, 4, 1.0) for k in range(1, 13)) > 0, "short runs, all of it cooled"
