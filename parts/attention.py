"""Attention and rotary positions: what the diffusion transformer and the text encoder share.

    q (B, H, T, d), k and v (B, H, S, d)  --attention-->  (B, H, T, d)
    q or k (B, H, T, d)                   --rotate-->     (B, H, T, d), turned by an angle that grows with t

Rotated queries and keys have scalar products that depend on the distance between two tokens alone, so a
network need not learn positions one by one.

B batch, H heads, T queries, S keys, d width of a head.

Public: attention, rope_table, rotate.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, T, d), (B, H, S, d) twice -> (B, H, T, d). mask (B, 1, 1, S): True may be attended to; None: all
    may."""
    # softmax(q k' / sqrt(d)) v                                             # Vaswani et al. 2017, eq. 1
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask)
    # On a CPU its backward pass in bfloat16 takes three times as long as in float32.
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)


def rope_table(length: int, dim: int, device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, (T, dim) each, of the angles by which `rotate` turns token t."""
    # angle_ti = t 100^(-2i / dim); base 100 instead of 10,000: 64 tokens, not 64,000          # ASSUMED: 100
    freq = 100.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.arange(length, device=device)[:, None] * freq            # (T, dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)           # (T, dim) each


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: x (B, H, T, dim) -> the same shape. table: see rope_table.

    Channel i and channel i + dim / 2 are the two coordinates of a point."""
    # (a, b) -> (a cos - b sin, b cos + a sin)                              # Su et al. 2021 (RoFormer)
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
