"""A function of short sequences, applied to long ones: overlapping windows, averaged with triangular weights.

    x (B, T, C), T > window --cut--> (n B, window, C) --f--> (n B, window, C) --weighted mean--> (B, T, C)

Neighbouring windows overlap by half. A few windows are evaluated at a time: memory must not grow with T.

Public: over_windows, cut.
"""
from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 64


def cut(x: Tensor, starts: list[int], window: int) -> Tensor:
    """(B, T, C) -> the windows at `starts`, one after the other: (n B, window, C)."""
    return torch.cat([x[:, start : start + window] for start in starts])


def over_windows(f, x: Tensor, window: int) -> Tensor:
    """f(windows (n B, window, C), starts, rows (n B,) of x that they are of) -> the same shape; x (B, T, C),
    T > window -> (B, T, C)."""
    B, length, _ = x.shape
    starts = sorted({*range(0, length - window, window // 2), length - window})
    ramp = torch.linspace(-1, 1, window + 2, device=x.device)[1:-1]
    weight = (1 - ramp.abs())[:, None]                     # (window, 1)
    total, norm = torch.zeros_like(x), x.new_zeros(length, 1)
    at_once = max(1, ROWS_AT_ONCE // B)
    for k in range(0, len(starts), at_once):
        some = starts[k : k + at_once]
        rows = torch.arange(B, device=x.device).repeat(len(some))
        y = f(cut(x, some, window), some, rows)
        for start, part in zip(some, y.chunk(len(some))):
            total[:, start : start + window] += weight * part
            norm[start : start + window] += weight
    return total / norm
