"""SSL guidance: early in training, pull a block's hidden states towards what a frozen, self-supervised encoder hears in the clean sound.

Idea.  A young diffusion transformer must invent a representation of sound before it can use the condition; a teacher phi that
already has one shortens that. Later the teacher's coarse view only gets in the way, so its weight decays with the regime r.

    L_ssl = mean over every 4th token of 1 - cos(P(h_l(x_t)), phi_c(x0)),  phi_c = phi - its data-set mean    # REPA, eq. 8; centring ASSUMED
    lambda(r) = lambda0 (1 - r)^gamma, and nothing is computed once r > 0.9                          # ASSUMED

    h_l (B, T, D) --P: Linear, SiLU, Linear, SiLU, Linear--> (B, T, F) --cos--> phi_c (B, T, F) <-- phi <-- log-mel of x0

The teacher works on the codec's log-mel frames, so that predictions can be heard by it without a vocoder. It is pretrained on
random patches (data.RandomPatches): no recording, no label, none of the sounds that the judges know. Two slightly different
renderings of one patch must be recognised among a batch of others (InfoNCE).  # arXiv 2406.05923

Conventions: t in [0, 1], **t = 1 is pure noise**, t = 0 is data; x_t = (1-t) x0 + t eps; v = eps - x0; the network predicts v.
lambda = 0 is no guidance. B batch, T tokens (25 a second), D model width, F teacher features, M = 64 mel bands, l the aligned block (--align, 0.4 L rounded),
every 4th token: --guide-every, another quarter each step. Not to be confused with classifier-free guidance (--cfg), which acts when sampling.

Public: Teacher, load_teacher, Ear, Projector, alignment_loss, weight, gradient_agreement, pretrain.

    python guidance.py                     # demo: what the loss and its weight do, on features with a known answer
    python guidance.py pretrain            # makes assets/teacher.safetensors
"""
from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent / "assets" / "teacher.safetensors"
OFF_AT = 0.9  # past this r the branch is not computed at all: decay also buys time


# --- the loss ---------------------------------------------------------------------------------------------------------------

class Projector(nn.Module):
    """P: h (B, T, D) -> (B, T, F). Hidden width 2 D (REPA's 2,048 would cost more than four small blocks).

    Its initial values come from a generator of its own, so that switching guidance on changes nothing else that is drawn."""

    def __init__(self, width: int, features: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 40_000)
            self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, features))

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h)


def alignment_loss(z: Tensor, phi: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of 1 - cos(z, phi): (B, T, F) x 2, mask (B, T) True at real tokens -> scalar in [0, 2].  # REPA, eq. 8

    phi is a target: no gradient reaches the teacher. In float32: norms of half-precision vectors overflow or round to 0. By hand:
    F.cosine_similarity normalises both anew in each direction, and takes half as long again."""
    with torch.autocast(z.device.type, enabled=False):
        z, phi = z.float(), F.normalize(phi.detach().float(), dim=-1, eps=1e-6)
        distance = 1 - (z * phi).sum(-1) / z.norm(dim=-1).clamp_min(1e-6)  # (B, T)
    return distance.mean() if mask is None else (distance * mask).sum() / mask.sum().clamp_min(1)


def weight(r: float, lambda0: float, gamma: float = 1.0) -> float:
    """lambda(r) = lambda0 (1 - r)^gamma; exactly 0 past OFF_AT.  # ASSUMED"""
    return 0.0 if r > OFF_AT else lambda0 * (1 - r) ** gamma


def gradient_agreement(loss_a: Tensor, loss_b: Tensor, params) -> float:
    """Cosine of the two losses' gradients on `params`: positive while they ask for the same, negative when the teacher gets in the way.
    Leaves the graph alive and no .grad touched.  # HASTE (arXiv 2505.16792)"""
    flat = [torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in
                       zip(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True), params)]).float() for loss in (loss_a, loss_b)]
    return float(F.cosine_similarity(*flat, dim=0, eps=1e-12))


# --- the teacher ------------------------------------------------------------------------------------------------------------

class Teacher(nn.Module):
    """Small convolutional encoder: log-mel (B, 2 T, 64) -> features (B, T, F), 25 a second. Frozen after pretraining."""
    takes, rate, first = "mel", 25.0, 0.02                         # what it hears; frames a second; centre of the first (s)

    def __init__(self, features: int = 192):
        super().__init__()
        conv = lambda a, b, k, stride: nn.Sequential(nn.Conv2d(a, b, k, stride, k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.features = features
        self.stem = nn.Sequential(conv(1, 16, 5, (2, 2)), conv(16, 32, 3, (1, 2)), conv(32, 64, 3, (1, 2)), conv(64, 128, 3, (1, 2)))
        self.join = nn.Linear(128 * 4, features)
        self.context = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(features), nn.Conv1d(features, features, 3, padding=d, dilation=d), nn.ReLU(),
                                                   nn.Conv1d(features, features, 1)) for d in (1, 2, 4))  # sees 0.6 s to each side
        self.norm = nn.LayerNorm(features)

    def forward(self, mel: Tensor) -> Tensor:
        h = self.stem((mel[:, None] + 4) / 2.5)                    # (B, 128, T, 4); SoundWorld's and ESC-10's mels: mean -4, deviation 2.5
        h = self.join(rearrange(h, "b c t m -> b t (c m)")).mT     # (B, F, T)
        for layer in self.context:
            h = h + layer(h)
        return self.norm(h.mT)                                     # (B, T, F)


def at_tokens(phi: Tensor, rate: float, first: float, token_rate: float, T: int) -> Tensor:
    """Features at the times of tokens: frame j of phi (B, T', F) is centred at first + j / rate seconds, token i spans [i, i + 1) / token_rate.

    Frames finer than tokens are averaged over each token's span (exactly: parts of frames count in part); coarser ones are
    interpolated linearly at its centre. At the ends the nearest frame stands in. -> (B, T, F)"""
    frames = phi.shape[1]
    if rate == token_rate and frames == T and abs(first - 0.5 / rate) < 1e-6:
        return phi
    centre = (torch.arange(T, dtype=torch.float64) + 0.5) / token_rate
    if rate < token_rate:
        x = ((centre - first) * rate).clamp(0, frames - 1)
        a = x.floor().long().clamp(max=max(0, frames - 2))
        b = (a + 1).clamp(max=frames - 1)
        part = (x - a).to(phi)[:, None]
        return phi[:, a] * (1 - part) + phi[:, b] * part
    edges = (torch.arange(frames + 1, dtype=torch.float64) - 0.5) / rate + first  # frame j spans [edges_j, edges_j+1)
    overlap = (torch.minimum(edges[1:], centre[:, None] + 0.5 / token_rate) - torch.maximum(edges[:-1], centre[:, None] - 0.5 / token_rate)).clamp_min(0)
    none = overlap.sum(1) < 1e-9
    overlap[none, (centre[none, None] - (edges[1:] + edges[:-1]) / 2).abs().argmin(1)] = 1.0
    return (overlap / overlap.sum(1, keepdim=True)).to(phi) @ phi


class Ear(nn.Module):
    """phi on the codec's latents: z (B, T, C) -> (B, T, F), one feature vector a token, by way of the mel frames or the sound that they
    stand for. Also a codec in the sense of data.LatentCache (key, channels, tokens, encode), so that features are cached as latents are.

    A teacher has takes ("mel" frames or a "wave"), features, rate and first (see at_tokens), and is called with what it takes."""

    def __init__(self, codec: nn.Module, teacher: nn.Module):
        super().__init__()
        self.codec, self.teacher, self.channels, self.tokens = copy.deepcopy(codec), teacher, teacher.features, codec.tokens
        key = getattr(teacher, "key", None) or hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())).hexdigest()[:16]
        self.key = f"{codec.key}-phi-{key}"

    def _at_tokens(self, phi: Tensor, T: int) -> Tensor:
        return at_tokens(phi, self.teacher.rate, self.teacher.first, self.codec.rate, T)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        heard = self.codec.decode_mel(z.float()) if self.teacher.takes == "mel" else self.codec.decode(z.float())
        return self._at_tokens(self.teacher(heard), z.shape[1])

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> (B, T, F) on the input's device. A teacher of waves hears the recording itself, not what the codec leaves of it."""
        if self.teacher.takes == "mel":
            return self(self.codec.encode(wav).to(self.codec.mean.device)).to(wav.device)
        return self._at_tokens(self.teacher(wav.to(self.codec.mean.device)), self.tokens(wav.shape[-1])).to(wav.device)


def feature_mean(ear: Ear, latents, data, device: str) -> Tensor:
    """phi's data-set mean (F,): over twenty minutes of cached latents, or of recordings for a teacher of waves; clips in random order,
    because a folder's first ones may all be of one class."""
    order = np.random.default_rng(0).permutation(len(data))
    some = order[: max(1, int(np.searchsorted(np.cumsum(np.asarray(data.lengths())[order]), 20 * 60 * 16_000)))]
    if ear.teacher.takes == "mel":
        z = np.concatenate([latents.z[latents.where[i] : latents.where[i + 1]] for i in some]).astype(np.float32)
        z = z[np.isfinite(z).all(1)]                               # one broken clip must not spoil every distance
        parts = [ear(torch.from_numpy(part)[None])[0] for part in np.array_split(z, max(1, len(z) // 1_500))]
    else:
        parts = [ear.encode(torch.from_numpy(data.wave(int(i)))[None])[0] for i in some]
    return torch.cat(parts).mean(0).to(device)


def pool(phi: Tensor) -> Tensor:
    """Features of a whole clip: mean, deviation and maximum over time, (B, T, F) -> (B, 3 F)."""
    return torch.cat([phi.mean(1), phi.std(1), phi.amax(1)], -1)


def load_teacher(path: Path = WEIGHTS) -> Teacher:
    """The shipped teacher, frozen, float32, eval mode. FileNotFoundError where the weights are missing."""
    from safetensors.torch import load_file
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: missing; make it with: python guidance.py pretrain")
    teacher = Teacher()
    teacher.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return teacher.eval().requires_grad_(False)


def random_teacher(seed: int) -> Teacher:
    """The same network, not pretrained: the control."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 50_000)
        return Teacher().eval().requires_grad_(False)


# --- its pretraining --------------------------------------------------------------------------------------------------------

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
    from tqdm import tqdm

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


def demo() -> None:
    """A projector learns targets that are a function of h (loss to 0), and cannot learn targets of other clips; lambda over r."""
    torch.manual_seed(0)
    h = torch.randn(160, 8, 16)
    phi = torch.tanh(h @ torch.randn(16, 12))                      # (B, T, F): what a teacher might say about what h holds
    print("step      matching targets   targets of other clips")
    final = {}
    for name, target in (("matching", phi), ("other", phi[torch.randperm(160)])):
        P = Projector(16, 12)
        opt, final[name] = torch.optim.Adam(P.parameters(), 3e-3), []
        for k in range(201):
            loss = alignment_loss(P(h[:120]), target[:120])
            opt.zero_grad()
            loss.backward()
            opt.step()
            if k % 50 == 0:
                final[name].append(alignment_loss(P(h[120:]), target[120:]).item())  # on clips it was not fitted to
    for k, (a, b) in enumerate(zip(*final.values())):
        print(f"{50 * k:4d}      {a:.3f}              {b:.3f}")
    print("r         " + "  ".join(f"{r:.2f}" for r in (0, 0.25, 0.5, 0.75, 0.9, 0.95)) + "\nlambda    " +
          "  ".join(f"{weight(r, 0.5):.2f}" for r in (0, 0.25, 0.5, 0.75, 0.9, 0.95)))
    x = torch.randn(5, requires_grad=True)
    assert final["matching"][-1] < 0.3 and final["other"][-1] > 0.7 and weight(0.95, 0.5) == 0
    assert abs(gradient_agreement(x.sin().sum(), -2 * x.sin().sum(), [x]) + 1) < 1e-5


def main() -> None:
    if sys.argv[1:2] != ["pretrain"]:
        return demo()
    import argparse
    p = argparse.ArgumentParser(prog="guidance.py pretrain", allow_abbrev=False)
    p.add_argument("--clips", type=int, default=24_000, help="random patches, each rendered twice")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--objective", choices=("contrastive", "masked"), default="contrastive")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=WEIGHTS)
    a = p.parse_args(sys.argv[2:])
    save_teacher(pretrain(a.clips, a.steps, objective=a.objective, seed=a.seed), a.out)


if __name__ == "__main__":
    main()
