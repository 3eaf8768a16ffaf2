"""Latent space, text encoder, diffusion transformer, flow-matching loss, generation.

Idea.  Audio becomes a short sequence of whitened vectors (codec); a transformer learns the velocity that carries noise to such
sequences (flow matching); the condition is a caption, or the latents of a muffled recording.

    wav (B, N) --log_mel--> (B, F, 64) --two frames a token, PCA--> x0 (B, T, C)         N = 640 T, F = 2 T: 25 tokens a second
    x_t = (1 - t) x0 + t eps --DiT(t, text, cond)--> v_hat (B, T, C)                     loss: |v_hat - (eps - x0)|^2
    eps --integrate dx/dt = v_hat from t = 1 to 0--> x0_hat --decode--> wav

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the network predicts v;
x0_hat = x_t - t v_hat. Guidance scale w = 1 is plain conditional, w = 0 unconditional. B batch, N samples, F mel frames,
T tokens, C latent channels, D width, H heads, L blocks, S words. Sources: SiT/REPA for the interpolant, DiT for adaLN-zero.

    python model.py           # demo: the sampler against the exact velocity field of Gaussian data
"""
from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RATE, N_FFT, HOP, N_MELS, PER_TOKEN = 16_000, 1_024, 320, 64, 2
FLOOR = 1e-4  # STFT magnitude under which everything is silence; 80 dB under a full-scale tone's main lobe and more


# --------------------------------------------------------------------------------------------------------------------------
# Codec: log-mel + PCA, the best *linear* autoencoder of mel frames, fitted in seconds; decoding by Griffin-Lim.

def stft(wav: Tensor, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """(B, N) -> complex (B, N // hop + 1, n_fft // 2 + 1); Hann window, frame j centred on sample j hop."""
    pad = "reflect" if wav.shape[-1] > n_fft // 2 else "constant"
    return torch.stft(wav, n_fft, hop, window=torch.hann_window(n_fft, device=wav.device), return_complex=True, pad_mode=pad).mT


def istft(spec: Tensor, n: int, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """Inverse of `stft`: complex (B, frames, bins) -> (B, n)."""
    return torch.istft(spec.mT, n_fft, hop, window=torch.hann_window(n_fft, device=spec.device), length=n)


def mel_filters(n_fft: int = N_FFT, n_mels: int = N_MELS) -> Tensor:
    """(bins, n_mels) triangular filters whose columns sum to 1, so that a mel value is a weighted mean STFT magnitude."""
    fb = TAF.melscale_fbanks(n_fft // 2 + 1, 0.0, RATE / 2, n_mels, RATE, norm=None, mel_scale="slaney")
    return fb / fb.sum(0).clamp_min(1e-8)


def log_mel(wav: Tensor, n_fft: int = N_FFT, hop: int = HOP, n_mels: int = N_MELS) -> Tensor:
    """Log-mel magnitude: (B, N) -> (B, N // hop, n_mels), natural log, floored at log FLOOR."""
    return (stft(wav, n_fft, hop)[:, :-1].abs() @ mel_filters(n_fft, n_mels).to(wav)).clamp_min(FLOOR).log()


def griffin_lim(mag: Tensor, n: int, iters: int = 32, momentum: float = 0.99, low: Tensor | None = None, keep: Tensor | None = None,
                generator: torch.Generator | None = None) -> Tensor:
    """Waveform (B, n) whose STFT magnitude is near mag (B, frames, bins).  # Fast Griffin-Lim: Perraudin et al. 2013, alg. 2

    All rows start from the same random phases, so a clip sounds the same whatever batch it is decoded in.

    With `low` (complex STFT of a known signal) and `keep` (bins,) True where it is known, those bins are reset to their known
    complex values in each iteration, so the invented band grows phases that agree with the recorded one."""
    phase = 2 * torch.pi * torch.rand(mag.shape[1:], generator=generator).to(mag.device)
    spec, last = torch.polar(mag, phase.expand_as(mag)), torch.zeros(())
    for _ in range(iters):
        if low is not None:
            spec = torch.where(keep, low, spec)
        new = stft(istft(spec, n))
        step = torch.lerp(last, new, 1 + momentum) if last.ndim else new.clone()  # new + momentum (new - last)
        spec, last = step.mul_(mag / step.abs().clamp_min(1e-9)), new  # in place: these passes over memory are most of the time
    if low is not None:
        spec = torch.where(keep, low, spec)
    return istft(spec, n)


class PCA(nn.Module):
    """The linear half of a codec: frames (..., d) <-> channels (..., C), as buffers; fitted by `fit_rows`, never trained.

    Channel scale: std^whiten is divided out, then one global scale gives mean variance 1. ASSUMED: whiten = 0.5. With 1 every
    component is equally loud and the loss spends most of itself on inaudible ones; with 0 the small ones drown in noise."""

    def __init__(self, d: int, channels: int, whiten: float = 0.5):
        super().__init__()
        self.channels, self.whiten = channels, whiten
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("basis", torch.eye(d)[:, :channels].contiguous())
        self.register_buffer("scale", torch.ones(channels))

    def fingerprint(self, *what) -> str:
        """Of the fitted buffers and whatever else the latent space depends on."""
        h = hashlib.sha256(",".join(map(str, what)).encode())
        for b in (self.mean, self.basis, self.scale):
            h.update(b.cpu().numpy().tobytes())
        return h.hexdigest()[:16]

    @torch.no_grad()
    def fit_rows(self, x: Tensor) -> None:
        """Principal components of x (n, d); sets `explained`, the share of variance that they hold."""
        if len(x) <= self.channels:
            raise ValueError(f"{len(x)} tokens can't fit {self.channels} principal components")
        x = x.double().cpu()
        self.mean.copy_(x.mean(0))
        var, vec = torch.linalg.eigh(torch.cov(x.T))
        order = torch.argsort(var, descending=True)[: self.channels]
        self.explained = float(var[order].sum() / var.sum())
        vec = vec[:, order]
        vec = vec * torch.sign(vec[vec.abs().argmax(0), torch.arange(self.channels)])  # eigenvectors have no sign of their own
        std = var[order].clamp_min(1e-6 * float(var.max())).sqrt()  # constant features must not be blown up to unit variance
        self.basis.copy_(vec)
        scale = std**self.whiten
        self.scale.copy_(scale * ((std / scale) ** 2).mean().sqrt())

    def project(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.basis / self.scale

    def restore(self, z: Tensor) -> Tensor:
        return (z * self.scale) @ self.basis.T + self.mean


class Codec(PCA):
    """Log-mel frames, two a token, projected on `channels` principal components."""
    rate, spreads = RATE / (PER_TOKEN * HOP), True                 # tokens a second; small enough to be sent to worker processes

    def __init__(self, channels: int = 64, whiten: float = 0.5):
        super().__init__(PER_TOKEN * N_MELS, channels, whiten)

    @property
    def key(self) -> str:
        """Changes when the latent space changes: part of the name of a latent cache. Raise the leading 1 with the code."""
        return self.fingerprint(1, N_FFT, HOP, N_MELS, FLOOR)

    def tokens(self, n: int) -> int:
        """Tokens of n samples (the last one may be padded)."""
        return max(1, -(-int(n) // (PER_TOKEN * HOP)))

    def _frames(self, wav: Tensor) -> Tensor:
        wav = F.pad(wav, (0, self.tokens(wav.shape[-1]) * PER_TOKEN * HOP - wav.shape[-1]))
        return rearrange(log_mel(wav), "b (t p) m -> b t (p m)", p=PER_TOKEN)  # (B, T, 128)

    def fit(self, waves) -> Codec:
        """PCA of the mel frames of an iterable of waveforms (N,)."""
        self.fit_rows(torch.cat([self._frames(torch.as_tensor(w)[None])[0] for w in waves]))
        return self

    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> z (B, T, C), N is padded with silence to whole tokens."""
        return self.project(self._frames(wav))

    def decode_mel(self, z: Tensor) -> Tensor:
        """z (B, T, C) -> log-mel (B, 2 T, 64)."""
        return rearrange(self.restore(z), "b t (p m) -> b (t p) m", p=PER_TOKEN).clamp(np.log(FLOOR), 7.0)

    def magnitude(self, mel: Tensor) -> Tensor:
        """Log-mel (B, F, 64) -> non-negative STFT magnitude (B, F, 513): multiplicative updates for min |S fb - mel|, S >= 0."""
        fb, m = mel_filters().to(mel), mel.exp()
        s = m @ (fb / fb.sum(1, keepdim=True).clamp_min(1e-8)).T  # (B, F, 513): interpolate between band centres
        gram = fb @ fb.T
        for _ in range(12):
            s = s * (m @ fb.T) / (s @ gram).clamp_min(1e-12)
        return s

    @torch.no_grad()
    def decode(self, z: Tensor, muffled: Tensor | None = None, cutoff: float | Tensor | None = None, seed: int = 0, iters: int = 32) -> Tensor:
        """z (B, T, C) -> wav (B, 640 T). With muffled (B, N <= 640 T) and cutoff (Hz), the band under the cutoff is the
        recording's own, level included, and only the band above is invented; without, peaks over 0.95 are scaled down to it
        (guidance exaggerates levels too, and clipped samples crackle up to 8 kHz)."""
        mag = self.magnitude(self.decode_mel(z))
        mag = torch.cat([mag, mag[:, -1:]], 1)  # the frame centred on the very end
        n, low, keep = z.shape[1] * PER_TOKEN * HOP, None, None
        if muffled is not None:
            low = stft(F.pad(muffled, (0, n - muffled.shape[-1])))
            freqs = torch.linspace(0, RATE / 2, N_FFT // 2 + 1, device=z.device)
            # A low-pass is already falling near its cutoff: the last 4 % are the model's, at least as loud as the input there.
            keep = freqs < 0.96 * cutoff
            mag = torch.where(freqs < cutoff, torch.maximum(mag, low.abs()), mag)
        y = griffin_lim(mag, n, iters, low=low, keep=keep, generator=torch.Generator().manual_seed(seed))
        return y if low is not None else tame(y)


def tame(y: Tensor) -> Tensor:
    """Scale the clips of (B, N) whose peak is over 0.95 down to it."""
    return y * (0.95 / y.abs().amax(1, keepdim=True).clamp_min(1e-9)).clamp_max(1)


def keep_low_band(y: Tensor, muffled: Tensor, cutoff: float) -> Tensor:
    """y (B, N) with everything under cutoff (Hz) replaced by that of muffled (B, <= N), level included."""
    low, freqs = stft(F.pad(muffled, (0, y.shape[-1] - muffled.shape[-1]))), torch.linspace(0, RATE / 2, N_FFT // 2 + 1, device=y.device)
    return istft(torch.where(freqs < 0.96 * cutoff, low, stft(y)), y.shape[-1])


# --------------------------------------------------------------------------------------------------------------------------
# Text: words, not sub-words: 200 of them describe SoundWorld, and a student can read the vocabulary.

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


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, T, d), (B, H, S, d) -> (B, H, T, d). mask (B, 1, 1, S): True may be attended to."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask)
    with torch.autocast(q.device.type, enabled=False):  # on a CPU its backward pass in bfloat16 takes three times as long as in float32
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)


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
    """Embeddings of a frozen text encoder (pretrained.PretrainedText) -> Text: (B, 1 + S, E), row 0 pooled, all-zero rows are padding. A
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


# --------------------------------------------------------------------------------------------------------------------------
# Diffusion transformer.

def rope_table(length: int, dim: int, device) -> tuple[Tensor, Tensor]:
    """cos, signed sin (T, dim): rotary positions; what attention sees is the distance between two tokens."""
    freq = 100.0 ** (-torch.arange(0, dim, 2, device=device) / dim)  # base 100, not 10,000: 64 tokens, not 64,000
    angle = torch.arange(length, device=device)[:, None] * freq
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, H, T, dim) by the angles of `table`: channel i and channel i + dim / 2 are the two coordinates of a point.  # Su et al. 2021"""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-zero transformer block (DiT, sec. 3.2): h (B, T, D) -> (B, T, D). Captions enter twice: pooled through adaLN, word by word as
    extra keys and values."""

    def __init__(self, width: int, heads: int, text: bool):
        super().__init__()
        self.heads, dim = heads, width // heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.text_kv = nn.Linear(width, 2 * width) if text else None
        norm = lambda: nn.LayerNorm(dim, eps=1e-6, bias=False)  # bounded logits: no blow-up in bf16 (Dehghani et al. 2023)
        self.q_norm, self.k_norm, self.text_norm = norm(), norm(), norm() if text else None
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))  # exact: on a CPU four times as fast as the tanh form
        self.ada = nn.Linear(width, 6 * width)

    def attend(self, h: Tensor, rope, text: Text | None, mask: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(h), "b t (n h d) -> n b h t d", n=3, h=self.heads)  # 3 x (B, H, T, d)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if text is not None:
            tk, tv = rearrange(self.text_kv(text.tokens), "b s (n h d) -> n b h s d", n=2, h=self.heads)
            k, v = torch.cat([k, self.text_norm(tk)], 2), torch.cat([v, tv], 2)  # (B, H, T + S, d)
            mask = torch.cat([h.new_ones(h.shape[:2], dtype=torch.bool) if mask is None else mask, text.mask], 1)
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, T + S): True may be attended to
        return self.out(rearrange(attention(q, k, v, mask), "b h t d -> b t (h d)"))

    def forward(self, h: Tensor, c: Tensor, rope, text: Text | None = None, mask: Tensor | None = None) -> Tensor:
        s1, g1, a1, s2, g2, a2 = self.ada(c).chunk(6, -1)  # shift, scale, gate (B, D), twice
        h = h + a1[:, None] * self.attend(modulate(self.norm1(h), s1, g1), rope, text, mask)
        return h + a2[:, None] * self.mlp(modulate(self.norm2(h), s2, g2))


class DiT(nn.Module):
    """Velocity network. vocab: words of the embedded text encoder; or text_features: width of a frozen one's embeddings; both 0: no
    text (super-resolution). cond: latents of the muffled input join on the channel axis.

    Preconditioned as EDM does for its own parametrisation, here derived for velocities: if x0 were N(0, 1), then Var x_t =
    r^2 = (1-t)^2 + t^2, E[v | x_t] = (2t - 1) x_t / r^2 and Var[v | x_t] = 1 / r^2. The network F sees x_t / r and predicts what is
    left, v_hat = ((2t - 1) x_t / r + F) / r: it need not learn to copy its input.  # ASSUMED (same form as EDM, eq. 7)"""

    def __init__(self, channels: int = 64, width: int = 128, depth: int = 4, heads: int = 4, vocab: int = 0, cond: bool = False,
                 text_features: int = 0):
        super().__init__()
        self.channels, self.head_dim, self.checkpointing = channels, width // heads, False
        self.text = TextAdapter(text_features, width) if text_features else TextEncoder(vocab, width) if vocab else None
        self.null_cond = nn.Parameter(torch.zeros(channels)) if cond else None  # stands for "no input given"
        self.embed = nn.Linear(channels * (1 + cond), width)
        self.place = nn.Linear(64, width)  # RoPE tells how far apart two tokens are; "first" and "then" need where they are
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, self.text is not None) for _ in range(depth))
        self.norm, self.ada, self.head = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6), nn.Linear(width, 2 * width), nn.Linear(width, channels)
        self.init()

    def init(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        if isinstance(self.text, TextEncoder):
            nn.init.normal_(self.text.embed.weight, std=0.5)  # far enough apart that a caption shows in adaLN from step 1
        for b in self.blocks:  # adaLN-zero: each block starts as the identity, so depth costs no early instability
            nn.init.zeros_(b.ada.weight)
            if b.text_norm is not None:  # a dozen words share one softmax with 64 tokens: start with sharper text logits
                nn.init.constant_(b.text_norm.weight, 3.0)  # ASSUMED: 3 (results/log.md)
        for lin in (self.ada, self.head):  # F = 0: the first prediction is the exact velocity of N(0, 1) data
            nn.init.zeros_(lin.weight)

    @staticmethod
    def time_features(t: Tensor) -> Tensor:
        """t (B,) -> (B, 256): cosines and sines at 128 frequencies from 1 to 1,000 radians over [0, 1]."""
        a = t.float()[:, None] * 10 ** torch.linspace(0, 3, 128, device=t.device)
        return torch.cat([a.cos(), a.sin()], -1)

    @staticmethod
    def place_features(length: int, device) -> Tensor:
        """(T, 64): cosines and sines of the token index, wavelengths from 4 to 1,000 tokens."""
        a = torch.arange(length, device=device)[:, None] * 2 * torch.pi / torch.logspace(np.log10(4), 3, 32, device=device)
        return torch.cat([a.cos(), a.sin()], -1)

    def encode_text(self, ids: Tensor, drop: Tensor | None = None) -> Text:
        """ids (B, S), or embeddings (B, 1 + S, E) -> Text; rows where drop (B,) is True become the empty caption."""
        return self.text(ids, drop)

    def forward(self, x_t: Tensor, t: Tensor, text: Text | None = None, cond: Tensor | None = None, mask: Tensor | None = None,
                drop: Tensor | None = None, return_blocks: bool = False):
        """x_t (B, T, C), t (B,) -> v_hat (B, T, C) [, hs = [h_0, ..., h_L] (B, T, D): the embedding, then each block's output].

        text: from encode_text. cond (B, T, C): muffled latents, replaced by the learned null where drop (B,) is True.
        mask (B, T): True at real tokens; padded ones are not attended to. All None is the unconditional, unmasked case."""
        assert x_t.ndim == 3 and x_t.shape[2] == self.channels and t.shape == x_t.shape[:1], (x_t.shape, t.shape)
        r = ((1 - t) ** 2 + t**2).sqrt()[:, None, None]
        x_t = x_in = x_t / r                                       # (B, T, C), unit variance
        if self.null_cond is not None:
            null = self.null_cond.expand_as(x_t)
            cond = null if cond is None else cond if drop is None else torch.where(drop[:, None, None], null, cond)
            x_t = torch.cat([x_t, cond], -1)                       # (B, T, 2 C)
        h = self.embed(x_t) + self.place(self.place_features(x_t.shape[1], x_t.device))  # (B, T, D)
        c = self.time(self.time_features(t))                       # (B, D)
        if text is not None:
            c = c + text.pooled
        c, rope, hs = F.silu(c), rope_table(h.shape[1], self.head_dim, h.device), [h]
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():     # keep h alone and compute the rest again in the backward pass
                h = checkpoint(block, h, c, rope, text, mask, use_reentrant=False)
            else:
                h = block(h, c, rope, text, mask)                  # (B, T, D)
            if return_blocks:
                hs.append(h)
        shift, scale = self.ada(c).chunk(2, -1)
        v = ((2 * t[:, None, None] - 1) * x_in + self.head(modulate(self.norm(h), shift, scale))) / r  # (B, T, C)
        return (v, hs) if return_blocks else v


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is replaced by the nearest orthogonal one, so that rare directions learn as fast as common
    ones. Matrices of one shape (the same one in every block) are orthogonalised together, and in three steps instead of five: torch.optim.Muon
    takes more than twice as long at widths like these.  # Jordan et al. 2024; update RMS 0.2, as AdamW's: Liu et al. 2025"""
    # p(x) = a x + b x^3 + c x^5 three times, each the polynomial that brings what the one before made of [0.01, 1] nearest to 1  # Amsel et al. 2025
    POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonal(cls, x: Tensor) -> Tensor:
        """(n, a, b) -> about U V' of each x = U S V', in bfloat16: singular values above a hundredth of the norm end in 0.7 to 1.3, which does."""
        tall, x = x.shape[1] > x.shape[2], x.bfloat16()
        x = x.mT if tall else x
        x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)  # 1.01: rounded above 1, values would run away
        for a, b, c in cls.POLYNOMIALS:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads, averages = [p.grad for p in params], [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                updates = self.orthogonal(torch.stack(torch._foreach_lerp(grads, averages, group["momentum"])))  # Nesterov's look ahead
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def make_optimizers(model: DiT, kind: str, lr: float, muon_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """kind adamw: [AdamW]; muon: [AdamW, Muon]. Muon is made for matrices inside the network: embeddings, what reads t, the head, norms and
    biases stay with AdamW, and so does adaLN (that alone lowered the validation loss by 0.06: results/log.md)."""
    inner = {n for n, p in model.named_parameters() if kind == "muon" and p.ndim == 2 and n.startswith(("blocks.", "text.layers.")) and ".ada." not in n}
    pick = lambda yes: [p for n, p in model.named_parameters() if (n in inner) == yes]
    opts = [torch.optim.AdamW(pick(False), lr, (0.9, 0.99), weight_decay=weight_decay, fused=next(model.parameters()).device.type != "mps")]
    if inner:
        opts.append(Muon(pick(True), muon_lr, weight_decay=weight_decay))
    return opts


# --------------------------------------------------------------------------------------------------------------------------
# Flow matching and generation.

def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0, eps (B, T, C), t (B,) -> x_t = (1-t) x0 + t eps and its velocity v = eps - x0.  # SiT/REPA, linear interpolant"""
    t = t[:, None, None]
    return (1 - t) * x0 + t * eps, eps - x0


def flow_matching_loss(v_hat: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared velocity error of each sample over its real tokens and channels: (B, T, C) -> (B,), in float32."""
    err = (v_hat.float() - v.float()).square().mean(-1)            # (B, T)
    if mask is None:
        return err.mean(1)
    return (err * mask).sum(1) / mask.sum(1).clamp_min(1)


def velocity_field(model: DiT, text: Text | None = None, null: Text | None = None, cond: Tensor | None = None, w: float = 1.0,
                   window: int | None = None, rescale: float = 0.0):
    """Closure v(x (B, T, C), t) of a model with classifier-free guidance: v = v_null + w (v_cond - v_null).

    w = 1 evaluates the conditional branch alone. rescale in [0, 1]: w > 1 exaggerates everything about a caption, its level
    too; this takes the standard deviation of x0_hat back towards that of the conditional branch (fully at 1).  # Lin et al.
    2024, sec. 3.4, there for the network's output. window (tokens): where T is longer, overlapping windows of that length
    (hop window/2, triangular weights) are evaluated and averaged in each step, so one trajectory spans any length."""
    def evaluate(x, t, text, null, cond):
        tt = x.new_full((len(x),), t)
        if w == 1.0:
            return model(x, tt, text, cond)
        no = torch.arange(2 * len(x), device=x.device) >= len(x)   # second half: without condition
        both = None if text is None else Text(*(torch.cat([a, b]) for a, b in zip(_same_length(text, null), _same_length(null, text))))
        v_c, v_n = model(torch.cat([x, x]), torch.cat([tt, tt]), both, None if cond is None else torch.cat([cond, cond]), drop=no).chunk(2)
        v = v_n + w * (v_c - v_n)                                  # Ho & Salimans 2022, eq. 6, whose w is ours minus 1
        if not rescale or t == 0:
            return v
        x0, x0_c = x - t * v, x - t * v_c
        gain = (x0_c.flatten(1).std(1) / x0.flatten(1).std(1).clamp_min(1e-6))[:, None, None]  # a fresh network predicts x0 = 0 at t = 1
        return (x - x0 * (1 + rescale * (gain - 1))) / t

    def field(x: Tensor, t: float) -> Tensor:
        length = x.shape[1]
        if window is None or length <= window:
            return evaluate(x, t, text, null, cond)
        starts = sorted({*range(0, length - window, window // 2), length - window})
        weight = (1 - (torch.linspace(-1, 1, window + 2, device=x.device)[1:-1]).abs())[:, None]
        total, norm, at_once = torch.zeros_like(x), x.new_zeros(length, 1), max(1, 64 // len(x))
        for k in range(0, len(starts), at_once):                   # a few windows at a time: memory must not grow with T
            some = starts[k : k + at_once]
            rows = torch.arange(len(x), device=x.device).repeat(len(some))
            cut = lambda a: torch.cat([a[:, s : s + window] for s in some])  # (n B, window, C)
            v = evaluate(cut(x), t, text and text.rows(rows), null and null.rows(rows), None if cond is None else cut(cond))
            for s, part in zip(some, v.chunk(len(some))):
                total[:, s : s + window] += weight * part
                norm[s : s + window] += weight
        return total / norm
    return field


def _same_length(a: Text, b: Text) -> Text:
    """Pad the words of a to at least those of b."""
    extra = max(0, b.mask.shape[1] - a.mask.shape[1])
    return Text(F.pad(a.tokens, (0, 0, 0, extra)), F.pad(a.mask, (0, extra)), a.pooled)


@torch.no_grad()
def integrate(field, x: Tensor, steps: int = 25, method: str = "euler") -> Tensor:
    """Solve dx/dt = field(x, t) from t = 1 (noise x) to t = 0 in equal steps. euler: one evaluation a step; heun: two, second
    order. Deterministic: the noise is the caller's."""
    ts = torch.linspace(1, 0, steps + 1).tolist()
    for t, s in itertools.pairwise(ts):
        v = field(x, t)
        if method == "heun":
            v = 0.5 * (v + field(x + (s - t) * v, s))
        elif method != "euler":
            raise ValueError(f"unknown method {method!r}: euler or heun")
        x = x + (s - t) * v
    return x


def gaussian_velocity(x: Tensor, t: float, mu: float, sigma: float) -> Tensor:
    """Exact E[eps - x0 | x_t = x] for x0 ~ N(mu, sigma^2), the oracle of the demo and the tests.

    x_t ~ N((1-t) mu, var), var = (1-t)^2 sigma^2 + t^2; Cov(eps - x0, x_t) = t - (1-t) sigma^2."""
    var = (1 - t) ** 2 * sigma**2 + t**2
    return -mu + (t - (1 - t) * sigma**2) / var * (x - (1 - t) * mu)


def demo() -> None:
    """Sampling error against the exact solution x0 = mu + sigma x1 of Gaussian data: Euler halves, Heun quarters."""
    x1 = torch.randn(1, 1_000, 4, generator=torch.Generator().manual_seed(0))
    exact = 2 + 0.5 * x1
    print("steps   euler    heun    (mean error of the solution)")
    errs = {}
    for steps in (5, 10, 20, 40):
        errs[steps] = [float((integrate(lambda x, t: gaussian_velocity(x, t, 2, 0.5), x1, steps, m) - exact).abs().mean()) for m in ("euler", "heun")]
        print(f"{steps:5d}  {errs[steps][0]:.5f}  {errs[steps][1]:.5f}")
    assert 1.7 < errs[20][0] / errs[40][0] < 2.3 and errs[20][1] / errs[40][1] > 3


if __name__ == "__main__":
    demo()
