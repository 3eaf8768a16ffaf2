"""Pretrain the SSL teacher of parts/teacher.py on random patches.

    python -m lab.pretrain_teacher --out assets/teacher.safetensors [--clips 24000 --steps 600 --seed 0]
    python -m lab.pretrain_teacher --out masked.safetensors --objective masked

The first makes the shipped teacher (half precision; about ten CPU minutes). No recording, no label and none
of the sounds that the judges know is used: parts/patches.py renders each random patch twice, slightly
different, and the teacher must find each rendering's partner among a batch of others (InfoNCE; the pairs are
those of arXiv 2406.05923). How good the result is: python -m lab.probe_teacher --weights FILE.

    pairs (B, 2, F, M) log-mel --augment--> (2 B, F, M) --Teacher--> phi (2 B, T, features)
        --pool over the clip, and over windows of 0.64 s--> --heads--> embeddings --info_nce--> loss

B pairs in a batch, F mel frames, M = 64 mel bands, T = F / 2 tokens, E width of an embedding.

Public: info_nce, augment, Contrast, Masked, pretrain, save_teacher.
"""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from parts.arguments import Parser, new_weights, whole
from parts.checkpoints import save_half
from parts.devices import pick_precision
from parts.errors import run_cli
from parts.patches import RandomPatches
from parts.spectra import log_mel
from parts.teacher import Teacher, pool

TAU = 0.1    # temperature of the contrast
WINDOW = 16  # tokens, 0.64 s

# --- what is asked of the teacher -----------------------------------------------------------------------


def info_nce(a: Tensor, b: Tensor, tau: float, own: Tensor | None = None) -> Tensor:
    """Each row of a (n, E) must find its partner in b (n, E) among all, and the other way round: scalar.

    own (n,): rows with the same number come from one clip; they are no negatives of each other."""
    # -log exp(cos(a_i, b_i) / tau) / sum_j exp(cos(a_i, b_j) / tau), mean over i        # SimCLR, eq. 1
    logits = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T / tau     # (n, n)
    if own is not None:
        same = own[:, None] == own[None]
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool), -1e4)
    target = torch.arange(len(a))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def augment(mel: Tensor, generator: torch.Generator) -> Tensor:
    """Recording conditions on log-mel (B, F, M): level, a little of another clip (linear domain), one masked
    band and one masked moment.  # ASSUMED: the ranges"""
    clips, frames, bands = mel.shape

    def uniform(*shape) -> Tensor:
        return torch.rand(*shape, generator=generator)

    # +-1.5 nats are +-13 dB; another clip 1.5 to 6.5 nats below; -9.21 is the codec's floor.
    mel = mel + 3 * (uniform(clips, 1, 1) - 0.5)
    other = mel[torch.randperm(clips, generator=generator)]
    mel = torch.logaddexp(mel, other - 1.5 - 5 * uniform(clips, 1, 1)).clamp_min(-9.21)

    # Up to 5 bands and 8 frames on either side of a random centre are silenced.
    from_centre = (torch.arange(bands) - bands * uniform(clips, 1)).abs()
    band = from_centre < 5 * uniform(clips, 1)                     # (B, M)
    from_centre = (torch.arange(frames) - frames * uniform(clips, 1)).abs()
    time = from_centre < 8 * uniform(clips, 1)                     # (B, F)
    return mel.masked_fill(band[:, None] | time[:, :, None], -6.0)


def _augment_pairs(pairs: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 2, F, M) -> (2 B, F, M): first all first renderings, then their partners."""
    return torch.cat([augment(pairs[:, 0], generator), augment(pairs[:, 1], generator)])


def _head(features: int) -> nn.Sequential:
    """Pooled features -> the space in which partners are compared (E = 128); not part of the teacher."""
    return nn.Sequential(
        nn.Linear(3 * features, 512),
        nn.BatchNorm1d(512),
        nn.GELU(),
        nn.Linear(512, 128),
    )


class Contrast(nn.Module):
    """Loss of a batch of pairs, clip by clip and window (0.64 s) by window: whole sounds and their moments
    are told apart."""

    def __init__(self, features: int):
        super().__init__()
        self.clip = _head(features)
        self.local = _head(features)

    def forward(self, teacher: Teacher, pairs: Tensor, generator: torch.Generator) -> Tensor:
        """pairs (B, 2, F, M) -> scalar."""
        phi = teacher(_augment_pairs(pairs, generator))            # (2 B, T, features)

        # Whole clips.
        a, b = self.clip(pool(phi)).chunk(2)                       # (B, E) each
        loss = info_nce(a, b, TAU)

        # Windows; those of one clip may well be alike, so they are no negatives of each other.
        windows = rearrange(phi, "b (n w) f -> (b n) w f", w=WINDOW)
        c, d = self.local(pool(windows)).chunk(2)                  # (B n, E) each
        own = torch.arange(len(a)).repeat_interleave(len(c) // len(a))
        return loss + 0.5 * info_nce(c, d, TAU, own)


class Masked(nn.Module):
    """The other natural objective, for comparison: half of the frames hidden in blocks of 8, predicted from
    the rest."""

    def __init__(self, features: int):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, 512), nn.GELU(), nn.Linear(512, 2 * 64))

    def forward(self, teacher: Teacher, pairs: Tensor, generator: torch.Generator) -> Tensor:
        """pairs (B, 2, F, M) -> scalar: squared error of the hidden frames, in units of the teacher's
        input."""
        mel = _augment_pairs(pairs, generator)                     # (2 B, F, M)
        blocks = torch.rand(len(mel), mel.shape[1] // 8, generator=generator) < 0.5
        hide = blocks.repeat_interleave(8, 1)                      # (2 B, F)
        predicted = self.head(teacher(mel.masked_fill(hide[..., None], -6.0)))
        predicted = rearrange(predicted, "b t (p m) -> b (t p) m", p=2)
        error = (predicted.float() - (mel + 4) / 2.5) ** 2         # (2 B, F, M)
        return error.mean(-1)[hide].mean()


# --- training -------------------------------------------------------------------------------------------


def pretrain(clips: int = 24_000, steps: int = 600, batch: int = 128, lr: float = 2e-3,
             objective: str = "contrastive", seed: int = 0) -> Teacher:
    """Train a teacher on random patches; deterministic for a seed and thread count.

    clips: random patches, each rendered twice. batch: pairs a step. lr: the peak. objective: `contrastive` or
    `masked`. Returns the teacher frozen, in eval mode."""
    bank = RandomPatches(clips, seed).features(log_mel)            # (n, 2, F, M) float16, on disk

    torch.manual_seed(seed)
    teacher = Teacher().to(memory_format=torch.channels_last)
    task = Contrast(teacher.features) if objective == "contrastive" else Masked(teacher.features)
    params = [*teacher.parameters(), *task.parameters()]
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.02)
    rising = max(0.1, 1.5 / steps)                                 # share of the steps: more than one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rising)

    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc=objective, unit="step", dynamic_ncols=True)
    for k in bar:
        rows = torch.randint(len(bank), (batch,), generator=generator).sort().values
        pairs = torch.from_numpy(bank[rows.numpy()].copy()).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=pick_precision("cpu") == "bf16"):
            loss = task(teacher, pairs, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 5.0)
        optimizer.step()
        schedule.step()
        if k % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return teacher.eval().requires_grad_(False)


def save_teacher(teacher: Teacher, path: Path) -> None:
    """Half precision: 1.3 MB."""
    save_half(teacher, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; "
          f"how good it is: python -m lab.probe_teacher --weights {path} --esc10 FOLDER")


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.pretrain_teacher")
    parser.add_argument("--clips", type=whole(1), default=24_000,
                        help="random patches, each rendered twice")
    parser.add_argument("--steps", type=whole(2), default=600)
    parser.add_argument("--objective", choices=("contrastive", "masked"), default="contrastive")
    parser.add_argument("--seed", type=whole(), default=0)
    parser.add_argument("--out", type=new_weights, required=True)
    args = parser.parse_args()
    teacher = pretrain(args.clips, args.steps, objective=args.objective, seed=args.seed)
    save_teacher(teacher, args.out)


if __name__ == "__main__":
    run_cli(main)
