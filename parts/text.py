"""TODO"""
from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from parts.attention import attention


class Words:
    """Vocabulary: id 0 pads, id 1 is the empty caption (unconditional), known words follow. Unknown words are left out."""
    NUMERALS = dict(zip("123456789", ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.ids = {w: i + 2 for i, w in enumerate(self.words)}

    @staticmethod
    def split(caption: str) -> list[str]:
        return [Words.NUMERALS.get(w, w) for w in re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower())]

    @classmethod
    def fit(cls, captions) -> Words:
        return cls(sorted({w for c in captions for w in cls.split(c)}))

    def __len__(self) -> int:
        return len(self.words) + 2

    def unknown(self, caption: str) -> dict[str, list[str]]:
        """{unknown word: closest known words}; what the user is told before a prompt is used without them."""
        return {w: difflib.get_close_matches(w, self.words, 3, 0.6) for w in self.split(caption) if w not in self.ids}

    def cache(self, captions: list[list[str]]) -> list[list[Tensor]]:
        """Wordings of each clip -> their ids; pretrained text encoders keep embeddings on disk behind the same call."""
        return [[self.encode([c])[0] for c in cs] for cs in captions]

    def encode(self, captions: list[str], max_words: int = 40) -> Tensor:
        """Captions -> ids (B, S) int64, padded with 0; a caption without a known word becomes the empty caption."""
        rows = [[self.ids[w] for w in self.split(c) if w in self.ids][:max_words] or [1] for c in captions]
        out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for r, row in zip(out, rows):
            r[: len(row)] = torch.tensor(row)
        return out


class Text(NamedTuple):
    """Encoded captions: tokens (B, S, D), mask (B, S) True at words, pooled (B, D)."""
    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def rows(self, index: Tensor) -> Text:
        return Text(*(x[index] for x in self))


class TextLayer(nn.Module):
    """A pre-norm transformer layer. (nn.TransformerEncoderLayer is the same, and half as fast in bfloat16 on a CPU.)"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(h)), "b s (n h d) -> n b h s d", n=3, h=self.heads)
        h = h + self.out(rearrange(attention(q, k, v, mask[:, None, None]), "b h s d -> b s (h d)"))
        return h + self.mlp(self.norm2(h))


class TextEncoder(nn.Module):
    """Word embeddings + a small transformer, trained jointly with the DiT: ids (B, S) -> Text."""

    def __init__(self, vocab: int, width: int, layers: int = 2, max_words: int = 40):
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.pos = nn.Parameter(0.02 * torch.randn(max_words, width))
        self.layers = nn.ModuleList(TextLayer(width, max(1, width // 64)) for _ in range(layers))
        self.norm, self.pool = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, ids: Tensor, drop: Tensor | None = None) -> Text:
        """Rows where drop (B,) is True become the empty caption."""
        if drop is not None:
            empty = torch.zeros_like(ids)
            empty[:, 0] = 1
            ids = torch.where(drop[:, None], empty, ids)
        mask, h = ids > 0, self.embed(ids) + self.pos[: ids.shape[1]]  # (B, S, D)
        for layer in self.layers:
            h = layer(h, mask)
        h = self.norm(h)
        mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Text(h, mask, self.pool(mean))


class TextAdapter(nn.Module):
    """Embeddings of a frozen text encoder (PretrainedText) -> Text: (B, 1 + S, E), row 0 pooled, all-zero rows are padding. A
    caption without a token, or dropped, becomes a learned vector."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.norm, self.project, self.pool = nn.LayerNorm(features), nn.Linear(features, width), nn.Linear(features, width)  # T5's features have outliers
        self.null = nn.Parameter(0.02 * torch.randn(features))

    def forward(self, e: Tensor, drop: Tensor | None = None) -> Text:
        mask = e[:, 1:].abs().sum(-1) > 0                          # (B, S)
        gone = ~mask.any(1) if drop is None else drop | ~mask.any(1)
        e = torch.where(gone[:, None, None], self.null, e)
        mask = torch.where(gone[:, None], torch.arange(mask.shape[1], device=e.device) == 0, mask)
        h = self.norm(e)
        return Text(self.project(h[:, 1:]), mask, self.pool(h[:, 0]))
