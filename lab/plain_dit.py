"""A plain diffusion transformer with its training step: what the speed of ours is measured against.

Put together from standard modules as in facebookresearch/DiT and SiT, at the same width, depth, heads, tokens
and batch as ours, with the same kernels (on a CPU exact GELU, and attention in float32: what DiT uses takes
five times as long there in bfloat16). What it does without: RoPE (positions are a fixed random table),
QK-norm, a caption that is attended to (it is one mean embedding), Muon (it has AdamW), and an average of the
weights in one fused call (it is updated parameter by parameter). No mechanism of the paper.

Shapes: B batch, T tokens, C latent channels, W width, N heads, S words of a caption. t in [0, 1], t = 1 is
pure noise; the network predicts v = eps - x0, as ours does.

Public: PlainBlock, PlainDiT, Plain (network, average, optimizer: one step of training).
"""
from __future__ import annotations

import copy

import torch
from einops import rearrange
from torch import Tensor, nn

from model import DiT, flow_matching_loss, interpolate
from parts.attention import attention
from parts.config import Config

EMA = 0.9999


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, W), one shift and one scale (B, W) a clip."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PlainBlock(nn.Module):
    """A DiT block as published: adaLN-zero, multi-head attention, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = _norm(width)
        self.norm2 = _norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, W), condition c (B, W) -> (B, T, W)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, dim=1)             # (B, W) each
        qkv = self.qkv(_modulate(self.norm1(x), shift1, scale1))                               # (B, T, 3 W)
        q, k, v = rearrange(qkv, "b t (three n h) -> three b n t h", three=3, n=self.heads)
        mixed = rearrange(attention(q, k, v, None), "b n t h -> b t (n h)")                    # (B, T, W)
        x = x + gate1[:, None] * self.proj(mixed)
        return x + gate2[:, None] * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class PlainDiT(nn.Module):
    """x_t (B, T, C), t (B,), ids (B, S) or cond (B, T, C) -> v_hat (B, T, C).

    vocab: how many words there are, 0: no captions; cond: is there a conditioning latent beside x_t? tokens:
    T, the same in every batch."""

    def __init__(self, channels: int, width: int, depth: int, heads: int, vocab: int, cond: bool,
                 tokens: int):
        super().__init__()
        self.embed = nn.Linear(channels * (1 + cond), width)
        self.pos = nn.Parameter(torch.randn(1, tokens, width) * 0.02, requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Embedding(vocab, width, padding_idx=0) if vocab else None
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = _norm(width)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, channels)

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor | None = None,
                cond: Tensor | None = None) -> Tensor:
        x = x_t if cond is None else torch.cat([x_t, cond], -1)                                # (B, T, C|2C)
        h = self.embed(x) + self.pos                                                           # (B, T, W)
        c = self.time(DiT.time_features(t))                                                    # (B, W)
        if ids is not None:
            mask = (ids > 0)[..., None]                                                        # (B, S, 1)
            c = c + (self.words(ids) * mask).sum(1) / mask.sum(1)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.ada(c).chunk(2, dim=1)
        return self.head(_modulate(self.norm(h), shift, scale))                                # (B, T, C)


class Plain:
    """The peer's training step."""

    def __init__(self, cfg: Config, vocab: int, tokens: int, compiled: bool):
        self.cfg = cfg
        self.model = PlainDiT(cfg.channels, cfg.width, cfg.depth, cfg.heads, vocab, cfg.task == "sr", tokens)
        self.model.to(cfg.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.net = torch.compile(self.model) if compiled else self.model  # the model as it is called
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)

    def loss(self, batch: dict) -> Tensor:
        x_t, v = interpolate(batch["x0"], batch["eps"], batch["t"])
        device, bf16 = self.cfg.device.split(":")[0], self.cfg.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            v_hat = self.net(x_t, batch["t"], batch.get("ids"), batch.get("cond"))
        return flow_matching_loss(v_hat, v).mean()

    def step(self, batch: dict) -> None:
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.model.parameters()):
                average.mul_(EMA).add_(parameter, alpha=1 - EMA)
