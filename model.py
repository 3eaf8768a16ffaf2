"""Diffusion transformer, flow-matching loss, generation.

Idea. Sound is a short sequence of vectors: principal components divided by the square root of their standard
deviation (parts/codec.py). A transformer learns the velocity that carries noise to such sequences (flow
matching); its condition is a caption, or the latents of a band-limited recording.

    wav (B, N) --codec--> x0 (B, T, C)                                   25 tokens a second
    x_t = (1 - t) x0 + t eps --DiT(t, text, cond)--> v_hat (B, T, C)     loss: |v_hat - (eps - x0)|^2
    eps --integrate dx/dt = v_hat from t = 1 to 0--> z (B, T, C) --codec--> wav

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the
network predicts v; x0_hat = x_t - t v_hat. Guidance scale w = 1 is plain conditional, w = 0 unconditional. B
batch, T tokens, C latent channels, W width, H heads, d = W / H, L blocks, S words. Sources: SiT (arXiv
2401.08740) and REPA for the interpolant, DiT (arXiv 2212.09748) for adaLN-zero.

Public: DiT, block_weights, interpolate, flow_matching_loss, predict, conditioned, VelocityField, integrate.

    python model.py           # demo: the sampler against the exact velocity field of Gaussian data
"""
from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parts.attention import attention, rope_table, rotate
from parts.text import Text, TextAdapter, TextEncoder
from parts.windows import cut, over_windows

# --- diffusion transformer ------------------------------------------------------------------------------

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, W), shift and scale (B, W)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-zero transformer block: h (B, T, W) -> (B, T, W).  # DiT, sec. 3.2

    Captions enter twice: pooled through adaLN, word by word as extra keys and values."""

    def __init__(self, width: int, heads: int, text: bool):
        super().__init__()
        self.heads, head_dim = heads, width // heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.text_kv = nn.Linear(width, 2 * width) if text else None
        # Normalised queries and keys bound the logits: no blow-up in bf16 (Dehghani et al. 2023).
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False)
        self.text_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False) if text else None
        self.out = nn.Linear(width, width)
        # Exact GELU: on a CPU four times as fast as the tanh form.
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.ada = nn.Linear(width, 6 * width)

    def attend(self, h: Tensor, rope, text: Text | None, mask: Tensor | None) -> Tensor:
        """Each token attends to the real tokens of its clip and to the words of its caption."""
        q, k, v = rearrange(self.qkv(h), "b t (n h d) -> n b h t d", n=3, h=self.heads)    # 3 x (B, H, T, d)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if text is not None:
            # Words have no place in the clip: their keys are not rotated.
            words = self.text_kv(text.tokens)                                      # (B, S, 2 W)
            text_k, text_v = rearrange(words, "b s (n h d) -> n b h s d", n=2, h=self.heads)
            k = torch.cat([k, self.text_norm(text_k)], 2)                          # (B, H, T + S, d)
            v = torch.cat([v, text_v], 2)
            if mask is None:
                mask = h.new_ones(h.shape[:2], dtype=torch.bool)
            mask = torch.cat([mask, text.mask], 1)                                 # (B, T + S)
        if mask is not None:
            mask = mask[:, None, None]                                             # (B, 1, 1, T + S)
        return self.out(rearrange(attention(q, k, v, mask), "b h t d -> b t (h d)"))

    def forward(self, h: Tensor, c: Tensor, rope, text: Text | None = None,
                mask: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, -1)    # (B, W) each
        h = h + gate1[:, None] * self.attend(modulate(self.norm1(h), shift1, scale1), rope, text, mask)
        return h + gate2[:, None] * self.mlp(modulate(self.norm2(h), shift2, scale2))


class DiT(nn.Module):
    """Velocity network.

    vocab: words of the embedded text encoder; or text_features: width of a frozen one's embeddings; both 0:
    no text (super-resolution). cond: latents of the band-limited input join on the channel axis.

    Preconditioned as EDM (arXiv 2206.00364, eq. 7) does for its own parametrisation, here derived for
    velocities: if x0 were N(0, 1), then Var x_t = std_t^2 = (1-t)^2 + t^2, E[v | x_t] = (2t - 1) x_t /
    std_t^2 and Var[v | x_t] = 1 / std_t^2. The network sees x_t / std_t, and its output y is what is left:
    v_hat = ((2t - 1) x_t / std_t + y) / std_t. It need not learn to copy its input. # ASSUMED"""

    def __init__(self, channels: int = 64, width: int = 128, depth: int = 4, heads: int = 4, vocab: int = 0,
                 cond: bool = False, text_features: int = 0):
        super().__init__()
        self.channels, self.head_dim, self.checkpointing = channels, width // heads, False
        self.text = None
        if text_features:
            self.text = TextAdapter(text_features, width)
        elif vocab:
            self.text = TextEncoder(vocab, width)
        self.null_cond = nn.Parameter(torch.zeros(channels)) if cond else None   # stands for "no input given"
        self.embed = nn.Linear(channels * (1 + cond), width)
        # RoPE tells how far apart two tokens are; "first" and "then" need where they are.
        self.place = nn.Linear(64, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, self.text is not None) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ada = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, channels)
        self.init()

    def init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Word vectors far enough apart that captions differ in c, adaLN's input, from step 1.
        if isinstance(self.text, TextEncoder):
            nn.init.normal_(self.text.embed.weight, std=0.5)
        for block in self.blocks:
            # adaLN-zero: each block starts as the identity, so depth costs no early instability.
            nn.init.zeros_(block.ada.weight)
            # A dozen words share one softmax with 64 tokens: start with sharper text logits.
            if block.text_norm is not None:
                nn.init.constant_(block.text_norm.weight, 3.0)                   # ASSUMED: 3 (results/log.md)
        # y = 0: the first prediction is the exact velocity of N(0, 1) data.
        for linear in (self.ada, self.head):
            nn.init.zeros_(linear.weight)

    @staticmethod
    def time_features(t: Tensor) -> Tensor:
        """t (B,) -> (B, 256): cosines and sines at 128 frequencies from 1 to 1,000 radians over [0, 1]."""
        angle = t.float()[:, None] * 10 ** torch.linspace(0, 3, 128, device=t.device)
        return torch.cat([angle.cos(), angle.sin()], -1)

    @staticmethod
    def place_features(length: int, device) -> Tensor:
        """(T, 64): cosines and sines of the token index, wavelengths from 4 to 1,000 tokens."""
        wavelength = torch.logspace(np.log10(4), 3, 32, device=device)
        angle = torch.arange(length, device=device)[:, None] * 2 * torch.pi / wavelength
        return torch.cat([angle.cos(), angle.sin()], -1)

    def encode_text(self, ids: Tensor, drop: Tensor | None = None) -> Text:
        """ids (B, S), or embeddings (B, 1 + S, E) -> Text; drop (B,): True becomes the empty caption."""
        return self.text(ids, drop)

    def forward(self, x_t: Tensor, t: Tensor, text: Text | None = None, cond: Tensor | None = None,
                mask: Tensor | None = None, drop: Tensor | None = None, return_blocks: bool = False):
        """x_t (B, T, C), t (B,) -> v_hat (B, T, C)
        [, hs = [h_0, ..., h_L] (B, T, W): the embedding, then each block's output].

        text: from encode_text. cond (B, T, C): band-limited latents, replaced by the learned null where drop
        (B,) is True. mask (B, T): True at real tokens; padded ones are not attended to. Unconditional: cond
        None; for captions not text None, which is never trained, but the Text of empty ones."""
        assert x_t.ndim == 3 and x_t.shape[2] == self.channels, x_t.shape
        assert t.shape == x_t.shape[:1], (x_t.shape, t.shape)
        # Input of unit variance (in the mean over channels); the condition beside it.
        std_t = ((1 - t) ** 2 + t**2).sqrt()[:, None, None]                        # (B, 1, 1)
        x = x_in = x_t / std_t                                                     # (B, T, C)
        if self.null_cond is not None:
            x = torch.cat([x, self.fill_cond(x, cond, drop)], -1)                  # (B, T, 2 C)
        h = self.embed(x) + self.place(self.place_features(x.shape[1], x.device))  # (B, T, W)
        c = self.time(self.time_features(t))                                       # (B, W)
        if text is not None:
            c = c + text.pooled
        c = F.silu(c)

        rope, hs = rope_table(h.shape[1], self.head_dim, h.device), [h]
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # Store h alone and compute the rest again in the backward pass.
                h = checkpoint(block, h, c, rope, text, mask, use_reentrant=False)
            else:
                h = block(h, c, rope, text, mask)                                  # (B, T, W)
            if return_blocks:
                hs.append(h)

        # v_hat = ((2t - 1) x_t / std_t + y) / std_t
        shift, scale = self.ada(c).chunk(2, -1)
        y = self.head(modulate(self.norm(h), shift, scale))                        # (B, T, C)
        v_hat = ((2 * t[:, None, None] - 1) * x_in + y) / std_t
        return (v_hat, hs) if return_blocks else v_hat

    def fill_cond(self, like: Tensor, cond: Tensor | None, drop: Tensor | None) -> Tensor:
        """cond (B, T, C) with the learned null where there is none, or where drop (B,) is True."""
        null = self.null_cond.expand_as(like)
        if cond is None:
            return null
        return cond if drop is None else torch.where(drop[:, None, None], null, cond)


def block_weights(model: DiT) -> list[tuple]:
    """(W_O, W_V, W_1, W_2, C) of each block: what structure_reg.py compares."""
    return [(block.out.weight, block.qkv.weight.chunk(3)[2], block.mlp[0].weight, block.mlp[2].weight,
             block.ada.weight) for block in model.blocks]


# --- flow matching --------------------------------------------------------------------------------------

def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0, eps (B, T, C), t (B,) -> x_t and its velocity v, (B, T, C) each."""
    # x_t = (1-t) x0 + t eps,  v = eps - x0                                # SiT/REPA, linear interpolant
    t = t[:, None, None]
    return (1 - t) * x0 + t * eps, eps - x0


def flow_matching_loss(v_hat: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared velocity error of each sample over its real tokens, in float32: (B, T, C) -> (B,)."""
    error = (v_hat.float() - v.float()).square().mean(-1)                          # (B, T)
    if mask is None:
        return error.mean(1)
    return (error * mask).sum(1) / mask.sum(1).clamp_min(1)


def predict(model: DiT, batch: dict, net=None, drop: bool = True) -> tuple:
    """Batch of data.add_noise -> v_hat, hs (see DiT.forward), v. net: what is called in the model's place,
    compiled or distributed. drop: replace the conditions of the clips that batch["drop"] marks."""
    x_t, v = interpolate(batch["x0"], batch["eps"], batch["t"])
    dropped = batch["drop"] if drop else None
    text = model.encode_text(batch["ids"], dropped) if "ids" in batch else None
    net = model if net is None else net
    # By position, as parts.networks.Compiled takes them; the last: return hs as well.
    v_hat, hs = net(x_t, batch["t"], text, batch.get("cond"), batch.get("mask"), dropped, True)
    return v_hat, hs, v


@torch.no_grad()
def conditioned(model: DiT, batch: dict):
    """-> a function (x_t (B, T, C), t (B,)) -> v_hat under the batch's own conditions, none dropped."""
    text = model.encode_text(batch["ids"]) if "ids" in batch else None
    return functools.partial(model, text=text, cond=batch.get("cond"), mask=batch.get("mask"))


# --- generation -----------------------------------------------------------------------------------------

class VelocityField:
    """v(x (B, T, C), t) of a model with classifier-free guidance, for any length T.

    text, null: encoded captions and as many empty ones; cond (B, T, C). w: guidance scale; w = 1 evaluates
    the conditional branch alone, w = 0 is without condition.

    rescale in [0, 1]: w > 1 also exaggerates the level; the standard deviation of x0_hat is moved back
    towards that of the conditional branch (1: fully).  # Lin et al. 2024, sec. 3.4: of the network's output

    window (tokens): where T is longer, overlapping windows of that length (hop window / 2, triangular
    weights) are evaluated and averaged in each step, so one trajectory spans any length."""

    def __init__(self, model: DiT, text: Text | None = None, null: Text | None = None,
                 cond: Tensor | None = None, w: float = 1.0, window: int | None = None, rescale: float = 0.0):
        self.model, self.text, self.null, self.cond = model, text, null, cond
        self.w, self.window, self.rescale = w, window, rescale

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.window is None or x.shape[1] <= self.window:
            return self.guided(x, t, self.text, self.null, self.cond)
        return self.windowed(x, t)

    def guided(self, x: Tensor, t: float, text: Text | None, null: Text | None,
               cond: Tensor | None) -> Tensor:
        times = x.new_full((len(x),), t)
        if self.w == 1.0:
            return self.model(x, times, text, cond)

        # Both branches in one call: the second half of the batch is without condition.
        drop = torch.arange(2 * len(x), device=x.device) >= len(x)
        if text is not None:
            text = text.followed_by(null)
        if cond is not None:
            cond = torch.cat([cond, cond])
        v_both = self.model(torch.cat([x, x]), torch.cat([times, times]), text, cond, drop=drop)
        v_cond, v_null = v_both.chunk(2)

        # v = v_null + w (v_cond - v_null)                # Ho & Salimans 2022, eq. 6, whose w is ours minus 1
        v = v_null + self.w * (v_cond - v_null)
        if not self.rescale or self.w <= 1 or t == 0:
            return v
        # x0_hat scaled to the conditional branch's deviation. (A fresh network predicts x0 = 0 at t = 1.)
        x0, x0_cond = x - t * v, x - t * v_cond
        deviation = x0.flatten(1).std(1).clamp_min(1e-6)                           # (B,)
        gain = (x0_cond.flatten(1).std(1) / deviation)[:, None, None]
        return (x - x0 * (1 + self.rescale * (gain - 1))) / t

    def windowed(self, x: Tensor, t: float) -> Tensor:
        """Weighted mean over overlapping windows."""
        def on_windows(x_windows: Tensor, starts: list[int], rows: Tensor) -> Tensor:
            text, null = (x.rows(rows) if x is not None else None for x in (self.text, self.null))
            cond = cut(self.cond, starts, self.window) if self.cond is not None else None
            return self.guided(x_windows, t, text, null, cond)
        return over_windows(on_windows, x, self.window)


@torch.no_grad()
def integrate(field, x: Tensor, steps: int = 25, method: str = "euler") -> Tensor:
    """Solve dx/dt = field(x, t) from t = 1 (noise x, any shape) to 0 in equal steps. euler: one evaluation a
    step; heun: two, second order. Deterministic: the noise is the caller's. ValueError for another method."""
    if method not in ("euler", "heun"):
        raise ValueError(f"unknown method {method!r}: euler or heun")
    times = torch.linspace(1, 0, steps + 1).tolist()
    for t, t_next in itertools.pairwise(times):
        v = field(x, t)
        if method == "heun":
            v = 0.5 * (v + field(x + (t_next - t) * v, t_next))
        x = x + (t_next - t) * v
    return x


# --- demo -----------------------------------------------------------------------------------------------

def gaussian_velocity(x: Tensor, t: float, mu: float, sigma: float) -> Tensor:
    """Exact E[eps - x0 | x_t = x] for x0 ~ N(mu, sigma^2), the oracle of the demo and the tests."""
    # x_t ~ N((1-t) mu, var), var = (1-t)^2 sigma^2 + t^2;  Cov(eps - x0, x_t) = t - (1-t) sigma^2
    var = (1 - t) ** 2 * sigma**2 + t**2
    return -mu + (t - (1 - t) * sigma**2) / var * (x - (1 - t) * mu)


def demo() -> None:
    """Error against the exact solution x0 = mu + sigma x1 of Gaussian data: Euler halves, Heun quarters."""
    x1 = torch.randn(1, 1_000, 4, generator=torch.Generator().manual_seed(0))
    exact = 2 + 0.5 * x1
    errors = {"euler": [], "heun": []}
    print("steps   euler    heun    (mean error of the solution)")
    for steps in (5, 10, 20, 40):
        for method, found in errors.items():
            made = integrate(lambda x, t: gaussian_velocity(x, t, 2, 0.5), x1, steps, method)
            found.append(float((made - exact).abs().mean()))
        print(f"{steps:5d}  {errors['euler'][-1]:.5f}  {errors['heun'][-1]:.5f}")
    assert 1.7 < errors["euler"][-2] / errors["euler"][-1] < 2.3
    assert errors["heun"][-2] / errors["heun"][-1] > 3


if __name__ == "__main__":
    demo()
