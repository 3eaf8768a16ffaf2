"""TODO"""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from parts.teacher import Teacher, pool


def info_nce(a: Tensor, b: Tensor, tau: float = 0.1, own: Tensor | None = None) -> Tensor:
    """Each row of a (n, E) must pick its partner in b (n, E) among all, and the other way round: scalar.  # SimCLR, eq. 1

    own (n,): rows with the same number come from one clip; they are no negatives of each other."""
    logits = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T / tau
    if own is not None:
        same = own[:, None] == own[None]
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool), -1e4)
    target = torch.arange(len(a))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def augment(mel: Tensor, g: torch.Generator) -> Tensor:
    """Recording conditions on log-mel (B, F, M): level, a little of another clip (linear domain), one masked band and moment."""
    b, f, m = mel.shape
    rand = lambda *s: torch.rand(*s, generator=g)
    mel = mel + 3 * (rand(b, 1, 1) - 0.5)
    mel = torch.logaddexp(mel, mel[torch.randperm(b, generator=g)] - 1.5 - 5 * rand(b, 1, 1)).clamp_min(-9.21)
    band = (torch.arange(m) - m * rand(b, 1)).abs() < 5 * rand(b, 1)
    time = (torch.arange(f) - f * rand(b, 1)).abs() < 8 * rand(b, 1)
    return mel.masked_fill(band[:, None] | time[:, :, None], -6.0)


class Contrast(nn.Module):
    """Loss of a batch of pairs, clip by clip and window (0.64 s) by window: whole sounds and their moments are told apart."""

    def __init__(self, features: int, window: int = 16, tau: float = 0.1):
        super().__init__()
        head = lambda: nn.Sequential(nn.Linear(3 * features, 512), nn.BatchNorm1d(512), nn.GELU(), nn.Linear(512, 128))
        self.window, self.tau, self.clip, self.local = window, tau, head(), head()

    def forward(self, teacher: Teacher, pairs: Tensor, g: torch.Generator) -> Tensor:
        mel = torch.cat([augment(pairs[:, 0], g), augment(pairs[:, 1], g)])  # (2 B, F, M)
        phi = teacher(mel)                                         # (2 B, T, F)
        a, b = self.clip(pool(phi)).chunk(2)
        windows = rearrange(phi, "b (n w) f -> (b n) w f", w=self.window)
        c, d = self.local(pool(windows)).chunk(2)
        own = torch.arange(len(a)).repeat_interleave(len(c) // len(a))
        return info_nce(a, b, self.tau) + 0.5 * info_nce(c, d, self.tau, own)


class Masked(nn.Module):
    """The other natural objective, for comparison: half of the frames hidden in blocks of 8, predicted from the rest."""

    def __init__(self, features: int):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, 512), nn.GELU(), nn.Linear(512, 2 * 64))

    def forward(self, teacher: Teacher, pairs: Tensor, g: torch.Generator) -> Tensor:
        mel = torch.cat([augment(pairs[:, 0], g), augment(pairs[:, 1], g)])
        hide = (torch.rand(len(mel), mel.shape[1] // 8, generator=g) < 0.5).repeat_interleave(8, 1)
        out = rearrange(self.head(teacher(mel.masked_fill(hide[..., None], -6.0))), "b t (p m) -> b (t p) m", p=2)
        return ((out.float() - (mel + 4) / 2.5) ** 2).mean(-1)[hide].mean()


def pretrain(clips: int = 24_000, steps: int = 600, batch: int = 128, lr: float = 2e-3, objective: str = "contrastive", seed: int = 0) -> Teacher:
    """Train a teacher on random patches; deterministic for a seed and thread count."""

    from data import RandomPatches
    from model import log_mel
    bank = RandomPatches(clips, seed).features(log_mel)            # (n, 2, F, M) float16
    torch.manual_seed(seed)
    teacher = Teacher().to(memory_format=torch.channels_last)
    task = Contrast(teacher.features) if objective == "contrastive" else Masked(teacher.features)
    params = [*teacher.parameters(), *task.parameters()]
    opt = torch.optim.AdamW(params, lr, weight_decay=0.02)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    g, bar = torch.Generator().manual_seed(seed), tqdm(range(steps), desc=objective, unit="step", dynamic_ncols=True)
    for k in bar:
        rows = torch.randint(len(bank), (batch,), generator=g).sort().values
        with torch.autocast("cpu", torch.bfloat16):
            loss = task(teacher, torch.from_numpy(bank[rows.numpy()].copy()).float(), g)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 5.0)
        opt.step()
        sched.step()
        if k % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return teacher.eval().requires_grad_(False)


def save_teacher(teacher: Teacher, path: Path) -> None:
    """Half precision: 1.3 MB."""
    from safetensors.torch import save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in teacher.state_dict().items()}, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; how good it is: python evaluate.py probe-teacher --esc10 FOLDER")
