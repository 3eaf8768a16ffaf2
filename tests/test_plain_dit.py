"""Claims about the peer: its cost is what its formula says, and it learns what ours learns."""
import numpy as np
import torch

from lab import bench
from lab.estimate import flop
from lab.plain_dit import Plain, PlainDiT
from parts import config


def test_counted_flop_are_the_closed_form_of_a_plain_dit():
    """Forward: 2 B T (embed + L (12 W^2 + 2 T W) + head) + adaLN and time per clip; attention 2 x 2 B T^2 W a
    block."""
    B, T, C, W, L = 3, 16, 8, 32, 2
    net = PlainDiT(C, W, L, 2, 10, False, T)
    ids = torch.ones(B, 4, dtype=torch.long)
    counted = flop(lambda: net(torch.randn(B, T, C), torch.rand(B), ids))
    tokens = 2 * B * T * (2 * C * W + L * 12 * W * W)
    clips = 2 * B * (256 * W + W * W + L * 6 * W * W + 2 * W * W)
    attention = L * 2 * 2 * B * T * T * W
    assert tokens + clips <= counted <= tokens + clips + attention + 1
    assert counted - tokens - clips in (0, attention)


def test_the_plain_peer_learns_what_ours_learns():
    """A fair peer: on Gaussian data both come near the exact velocity. (Not a race: 150 steps of each one's
    own optimizer.)"""
    cfg = config.resolve({"width": 32, "depth": 2, "heads": 2, "channels": 4, "batch": 64, "task": "sr",
                          "recipe": "vanilla", "out": "unused", "precision": "fp32", "device": "cpu"})
    torch.manual_seed(0)
    plain = Plain(cfg, 0, 8, False)
    ours = bench.Ours(cfg, None, 8, bench.driven_by(cfg, "vanilla"))
    plain.optimizer.param_groups[0]["lr"] = 2e-3
    final = {"plain": [], "ours": []}
    for _ in range(150):
        x0 = 0.5 * torch.randn(64, 8, 4)
        batch = {"x0": x0, "eps": torch.randn(64, 8, 4), "t": torch.rand(64), "cond": x0.roll(1, 1),
                 "drop": torch.zeros(64, dtype=torch.bool)}
        for name, arm in (("plain", plain), ("ours", ours)):
            final[name].append(arm.loss(batch).item())
            arm.step(batch)
    assert np.mean(final["plain"][-20:]) < 0.8 * np.mean(final["plain"][:5])
    assert np.mean(final["ours"][-20:]) < 0.9 * np.mean(final["ours"][:5])
