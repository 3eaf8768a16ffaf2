"""Judges, metrics, and what a user does with a trained model: generate, upsample, score, sounds, export.

    python evaluate.py generate RUN --prompt "a low bell, then rain" --out bell.wav [--n --seed --cfg --steps --seconds]
    python evaluate.py upsample RUN --input muffled.wav --out clear.wav [--cutoff HZ --seed --steps]
    python evaluate.py score RUN [RUN ...] [--clips N --judge dev|final --out scores.json]
    python evaluate.py sounds RUN                         # what can be asked for
    python evaluate.py export RUN FOLDER                  # EMA weights only, half precision: what assets/ holds
    python evaluate.py train-judge dev|final              # makes assets/judge-*.safetensors (about 20 CPU minutes each)
    python evaluate.py probe-teacher --esc10 FOLDER       # is the teacher of guidance.py better than its controls?

RUN is a run folder of train.py (or assets/demo, assets/demo-sr). Conventions: t = 1 is noise, t = 0 is data; guidance scale
w = 1 is plain conditional. Waveforms are (N,) or (B, N) float32 in [-1, 1] at 16 kHz.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

import data
import guidance
import sampler
from data import NAMES, RATE, SOUNDS, SoundWorld, UserError, run_cli
from model import N_FFT, Codec, DiT, Words, integrate, log_mel, stft, velocity_field

ASSETS = Path(__file__).resolve().parent / "assets"
RESCALE = 1.0  # see model.velocity_field: without it a guided clip is several times louder than a real one. ASSUMED


# --------------------------------------------------------------------------------------------------------------------------
# Judges: classifiers that hear what is in a clip, trained on SoundWorld's true factors. Two of different architecture, seed
# and front end, so that a model tuned under one (dev) is reported under the other (final). Neither is ever used in training.

class ConvJudge(nn.Module):
    """Development judge: a 2D convolutional network on 64 mel bands."""
    front = dict(n_fft=1_024, hop=320, n_mels=64)
    width = 128

    def __init__(self):
        super().__init__()
        layer = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        stem = nn.Sequential(nn.Conv2d(1, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.net = nn.Sequential(stem, layer(24, 40), layer(40, 80), layer(80, 128)).to(memory_format=torch.channels_last)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, F, 64) -> features over time (B, F / 16, 128)."""
        h = self.net(mel[:, None])                                 # (B, 128, F / 16, 4)
        return (h.mean(-1) + h.amax(-1)).mT


class AttentionJudge(nn.Module):
    """Final judge: a transformer on time-frequency patches of 80 mel bands with a finer time step."""
    front = dict(n_fft=800, hop=256, n_mels=80)
    width = 112

    def __init__(self):
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(1, 32, (5, 5), (2, 2), padding=2), nn.GELU(), nn.Conv2d(32, 16, 3, (2, 2), padding=1), nn.GELU())
        self.embed = nn.Linear(16 * 20, self.width)
        self.pos = nn.Parameter(0.02 * torch.randn(512, self.width))
        layer = nn.TransformerEncoderLayer(self.width, 4, 3 * self.width, dropout=0.05, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, F, 80) -> (B, F / 4, 112)."""
        h = self.embed(rearrange(self.patch(mel[:, None]), "b c t f -> b t (c f)"))
        return self.layers(h + self.pos[: h.shape[1]])


class Judge(nn.Module):
    """Trunk + one set of linear heads a sound class: presence, onset, pitch, count.

    __call__(wav (B, N)) -> dict of presence logits (B, 24), onset in [0, 1] of the clip (B, 24), pitch in [-1, 1] (B, 24),
    count logits (B, 24, 4), embedding (B, E) (input of the heads, used by KID)."""
    kinds = {"dev": ConvJudge, "final": AttentionJudge}

    def __init__(self, kind: str):
        super().__init__()
        self.trunk = self.kinds[kind]()
        w, k = self.trunk.width, len(SOUNDS)
        self.embed = nn.Sequential(nn.Linear(2 * w, 128), nn.ReLU())
        self.presence, self.pitch, self.count, self.when = nn.Linear(128, k), nn.Linear(128, k), nn.Linear(128, 4 * k), nn.Linear(w, k)

    def features(self, wav: Tensor) -> Tensor:
        return (log_mel(wav, **self.trunk.front) + 3) / 2.5

    def heads(self, mel: Tensor) -> dict:
        h = self.trunk(mel)                                        # (B, T', w)
        e = self.embed(torch.cat([h.mean(1), h.amax(1)], -1))      # (B, 128)
        at = torch.linspace(0, 1, h.shape[1], device=h.device)
        onset = torch.einsum("btk,t->bk", self.when(h).softmax(1), at)
        return {"presence": self.presence(e), "onset": onset, "pitch": self.pitch(e), "count": rearrange(self.count(e), "b (k n) -> b k n", n=4), "embedding": e}

    def forward(self, wav: Tensor) -> dict:
        return self.heads(self.features(wav))


def load_judge(kind: str) -> Judge:
    """The shipped judge `dev` or `final`, frozen, float32, eval mode."""
    from safetensors.torch import load_file
    path = ASSETS / f"judge-{kind}.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: missing; make it with: python evaluate.py train-judge {kind}")
    judge = Judge(kind)
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def listen(judge: Judge, waves, batch: int = 64) -> dict:
    """Judge an iterable of equally long (N,) waveforms -> dict of numpy arrays (see Judge)."""
    waves, out = list(waves), []
    for i in range(0, len(waves), batch):
        out.append(judge(torch.as_tensor(np.stack(waves[i : i + batch]))))
    return {k: torch.cat([o[k] for o in out]).numpy() for k in out[0]}


def factor_table(world: SoundWorld, n: int | None = None) -> dict:
    """True factors of the first n clips, stacked: presence, onset (s), pitch, count, distance, each (n, 24)."""
    rows = [world.factors(i) for i in range(n or len(world))]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def train_judge(kind: str, clips: int = 16_000, epochs: int = 8, batch: int = 64, seed: int = 0) -> dict:
    """Train a judge on the split `judge` and save it to assets/. Returns its score on the untouched test split."""
    torch.manual_seed({"dev": 11, "final": 22}[kind] + seed)
    world = SoundWorld("judge", clips).prepare()
    judge = Judge(kind)
    with torch.no_grad():
        mel = torch.cat([judge.features(torch.from_numpy(np.stack([world.wave(i) for i in range(j, min(clips, j + 256))]))).half()
                         for j in tqdm(range(0, clips, 256), desc="features")])
    y = {k: torch.from_numpy(v) for k, v in factor_table(world).items()}
    opt = torch.optim.AdamW(judge.parameters(), 2e-3 if kind == "dev" else 1e-3, weight_decay=0.02)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, opt.param_groups[0]["lr"], total_steps=epochs * (clips // batch), pct_start=0.15)
    bar = tqdm(total=epochs * (clips // batch), desc=f"judge {kind}", unit="step")
    for epoch in range(epochs):
        judge.train()
        for rows in torch.randperm(clips)[: clips // batch * batch].split(batch):
            x = augment_mel(mel[rows].float())
            o, on = judge.heads(x), y["presence"][rows]
            loss = F.binary_cross_entropy_with_logits(o["presence"], on) * 10
            for name, target in (("onset", y["onset"][rows] / world.seconds), ("pitch", y["pitch"][rows])):
                known = ~target.isnan()
                loss = loss + 0.5 * (o[name][known] - target[known]).abs().mean()
            known = ~y["count"][rows].isnan()
            loss = loss + 0.3 * F.cross_entropy(o["count"][known], y["count"][rows][known].long() - 1)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    from safetensors.torch import save_file
    ASSETS.mkdir(exist_ok=True)
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in judge.state_dict().items()}, ASSETS / f"judge-{kind}.safetensors")
    report_path = ASSETS.parent / "results" / "judges.json"
    report = json.loads(report_path.read_text()) if report_path.exists() else {}
    data.write_whole(report_path, json.dumps({**report, kind: judge_report(kind) | {"clips": clips, "epochs": epochs, "seed": seed}}, indent=1) + "\n")
    return json.loads(report_path.read_text())[kind]


def augment_mel(x: Tensor) -> Tensor:
    """Level (+-6 dB), one masked band and one masked moment a clip: a judge must not hang on one cue. x (B, F, M), scaled."""
    b, f, m = x.shape
    x = x + (torch.rand(b, 1, 1) - 0.5) * 2 * 0.69 / 2.5
    band = (torch.arange(m) - torch.randint(0, m, (b, 1))).abs() < torch.randint(0, 5, (b, 1))
    time = (torch.arange(f) - torch.randint(0, f, (b, 1))).abs() < torch.randint(0, 5, (b, 1))
    return x.masked_fill(band[:, None, :] | time[:, :, None], float((np.log(1e-2) + 3) / 2.5))


def judge_report(kind: str, n: int = 1_000) -> dict:
    """Event-set exact match and friends of a judge on untouched clips (test split, and unheard pairs)."""
    judge, out = load_judge(kind), {"judge": kind}
    for split in ("test", "combos"):
        world = SoundWorld(split, n).prepare()
        truth, heard = factor_table(world), listen(judge, (world.wave(i) for i in range(n)))
        hit = event_match(truth["presence"], heard["presence"])
        known = ~np.isnan(truth["count"])
        pitched = np.abs(np.nan_to_num(truth["pitch"])) >= 0.5
        out[split] = {"n": n, "exact": float(hit.mean()), "interval": wilson(hit.sum(), n),
                      "by_events": {k: float(hit[truth["presence"].sum(1) == k].mean()) for k in (1, 2, 3) if (truth["presence"].sum(1) == k).any()},
                      "count": float((heard["count"].argmax(-1) + 1 == truth["count"])[known].mean()),
                      "pitch_sign": float((np.sign(heard["pitch"]) == np.sign(truth["pitch"]))[pitched].mean()),
                      "onset_mae_s": float(np.nanmean(np.abs(heard["onset"] * world.seconds - truth["onset"])))}
    return out


# --------------------------------------------------------------------------------------------------------------------------
# Metrics: pure functions of arrays.

def wilson(hits: float, n: int) -> list[float]:
    """95 % Wilson score interval of a proportion."""
    ci = scipy.stats.binomtest(int(hits), int(n)).proportion_ci(method="wilson")
    return [float(ci.low), float(ci.high)]


def event_match(presence: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Exact match of the *set* of events, (B,) bool: presence (B, 24) in {0, 1}, judge logits (B, 24) thresholded at 0."""
    return ((logits > 0) == (presence > 0.5)).all(1)


def bernoulli_kl(p: np.ndarray, q: np.ndarray, eps: float = 1e-4) -> float:
    """Mean over clips and events of KL(Bernoulli(p) || Bernoulli(q)) in nats; p, q (B, 24) probabilities, clipped to eps.

    p: the judge on the real clip of a caption, q: on the generated one (METHOD 7; multi-label form of audioldm_eval's KL)."""
    p, q = np.clip(p, eps, 1 - eps), np.clip(q, eps, 1 - eps)
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel distance of x (n, d) to reference y (m, d): unbiased MMD^2 with kernel (x.y / d + 1)^3.  # Binkowski et al. 2018, sec. 4

    Unbiased means it can be negative and is 0 on average for equal distributions; a Frechet distance at n = 500 is not. The
    kernel's 1 supposes features of order one, as Inception's are; so both are first divided by the reference's RMS."""
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    rms = max(np.sqrt(np.mean(y.astype(np.float64) ** 2)), 1e-12)   # a reference of zeros
    x, y = x.astype(np.float64) / rms, y.astype(np.float64) / rms
    kx, ky, n, m = k(x, x), k(y, y), len(x), len(y)
    return float((kx.sum() - np.trace(kx)) / (n * (n - 1)) + (ky.sum() - np.trace(ky)) / (m * (m - 1)) - 2 * k(x, y).mean())


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to x (n, d) and y (m, d): |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)).

    Biased upwards by about d^2 / n: with n = 200 and d = 128 two *equal* distributions are a third of the trace apart, so it needs
    n >= 1000 and d <= 64, or a wider margin; `kid` has no such bias.  # Heusel et al. 2017, eq. 6"""
    if len(x) <= x.shape[1] or len(y) <= y.shape[1]:
        raise ValueError(f"{min(len(x), len(y))} clips can't fit a covariance of {x.shape[1]} features; use kid")
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cx @ cy).real.clip(0)).sum()   # the trace of a root is the sum of the roots of the eigenvalues
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * root)


def log_power(x: np.ndarray) -> np.ndarray:
    """log10 power spectrogram for LSD: Hann STFT 2048/512, floor 1e-8 (NU-Wave2). (N,) -> (frames, 1025)."""
    x = np.pad(x, (0, max(0, 2_048 - len(x))))  # shorter than a window: silence follows
    spec = torch.stft(torch.as_tensor(x), 2_048, 512, window=torch.hann_window(2_048), return_complex=True)
    return spec.abs().square().clamp_min(1e-8).log10().T.numpy()


def lsd(ref: np.ndarray, est: np.ndarray, cutoff: float | None = None) -> dict:
    """Log-spectral distance of two log_power arrays: mean over frames of the RMS over bins, in decades of power (NU-Wave2).

    With cutoff: also over bins below (lsd_lf) and from int(1025 * 2 cutoff / rate) up (lsd_hf). Two draws of one Gaussian
    spectrum are 0.79 apart, the mean of the log spectrum 0.56 from a draw: smaller is not always better sound."""
    d = (ref - est) ** 2
    rms = lambda a: float(np.sqrt(a.mean(1)).mean())
    if cutoff is None:
        return {"lsd": rms(d)}
    k = int(1_025 * 2 * cutoff / RATE)
    return {"lsd": rms(d), "lsd_lf": rms(d[:, :k]), "lsd_hf": rms(d[:, k:])}


def si_sdr(ref: np.ndarray, est: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, zero-mean (Le Roux et al. 2019); silence scores -inf's stand-in, -80."""
    ref, est = ref.astype(np.float64) - ref.mean(), est.astype(np.float64) - est.mean()
    target = (est @ ref) / max(ref @ ref, 1e-12) * ref
    if target @ target < 1e-12:
        return -80.0
    return float(10 * np.log10(max(target @ target, 1e-12) / max(((est - target) ** 2).sum(), 1e-12)).clip(-80, 120))


def high_band_mel(x: np.ndarray, cutoff: float) -> np.ndarray:
    """Log-mel bands (of the codec's 64) that lie wholly above cutoff: (N,) -> (frames, bands), nats."""
    import torchaudio.functional as TAF
    fb = TAF.melscale_fbanks(513, 0.0, RATE / 2, 64, RATE, norm=None, mel_scale="slaney")
    above = fb[torch.linspace(0, RATE / 2, 513) < cutoff].sum(0) == 0
    return log_mel(torch.as_tensor(np.ascontiguousarray(x))[None])[0][:, above].numpy()


def energy_score(ref: np.ndarray, samples: list[np.ndarray]) -> float:
    """Energy score of samples x_1..x_S of a vector y, E|x - y| - E|x - x'| / 2, by frame: arrays (frames, bands).

    Proper: its mean is smallest for the true conditional distribution, unlike LSD, which prefers its blurred centre. Norms are
    divided by sqrt(bands) (nats a band); E|x - x'| runs over distinct pairs; one sample (a point forecast) has no second
    term.  # Gneiting & Raftery 2007, eq. 22"""
    norm = lambda a: np.linalg.norm(a, axis=1).mean() / np.sqrt(a.shape[1])
    spread = [norm(a - b) for i, a in enumerate(samples) for b in samples[i + 1:]]
    return float(np.mean([norm(s - ref) for s in samples]) - 0.5 * (np.mean(spread) if spread else 0.0))


def mean_interval(x) -> list[float]:
    """95 % Student-t interval of a mean over clips."""
    x = np.asarray(x, float)
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")
    return [float(x.mean() - half), float(x.mean() + half)]


# --------------------------------------------------------------------------------------------------------------------------
# How good is a teacher? A linear classifier on its frozen, pooled features, against the same classifier on mel statistics and on
# the same network at random initialisation: what pretraining added, and not what the architecture or the pooling brings.

def fit_linear(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Logistic regression (L-BFGS): x (n, d) standardized; y (n,) classes or (n, K) in {0, 1} -> weights (d, K), bias (K,)."""
    w = torch.zeros(x.shape[1], y.shape[1] if y.ndim == 2 else int(y.max()) + 1, requires_grad=True)
    b = torch.zeros(w.shape[1], requires_grad=True)
    opt = torch.optim.LBFGS([w, b], max_iter=80, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        loss = (F.binary_cross_entropy_with_logits if y.ndim == 2 else F.cross_entropy)(x @ w + b, y) + 0.5 * penalty * w.square().sum()
        loss.backward()
        return loss
    opt.step(closure)
    return w.detach(), b.detach()


def linear_probe(x: Tensor, y: Tensor, train: np.ndarray, inner: np.ndarray, test: np.ndarray, score) -> np.ndarray:
    """Scores (n_test,) of a linear probe: its penalty chosen on `inner` after fitting on `train`, refitted on both. Boolean rows."""
    def scores(fit, on, penalty):
        mean, std = x[fit].mean(0), x[fit].std(0) + 1e-6
        w, b = fit_linear((x[fit] - mean) / std, y[fit], penalty)
        return score((x[on] - mean) / std @ w + b, y[on])
    best = max((1e-3, 1e-2, 1e-1, 1.0), key=lambda penalty: scores(train, inner, penalty).mean())
    return scores(train | inner, test, best)


def correct(logits: Tensor, y: Tensor) -> np.ndarray:
    return (logits.argmax(1) == y).double().numpy()


def ranking(logits: Tensor, y: Tensor) -> np.ndarray:
    """Average precision of each clip's ranking of classes: 1 where all that are present rank above all that are not."""
    order = (-logits).argsort(1)
    hit = y.gather(1, order).double()
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
    return ((precision * hit).sum(1) / hit.sum(1)).numpy()


def probe_teacher(teacher: nn.Module, esc10: Path | None, clips: int = 3_000, inits: int = 3) -> dict:
    """Scores and paired gains over clips of the teacher against both controls (random: mean over `inits` initialisations).

    SoundWorld: which events (average precision of the ranking), fitted on train, scored on the last quarter of val. ESC-10: accuracy
    over the five official folds, the penalty chosen on the next fold."""
    worlds = [SoundWorld(s, n).prepare() for s, n in (("train", clips * 3 // 4), ("val", clips // 4))]
    sets = {"soundworld": ([torch.from_numpy(w.wave(i)) for w in worlds for i in range(len(w))],
                           torch.cat([torch.from_numpy(factor_table(w)["presence"]) for w in worlds]), np.r_[np.zeros(len(worlds[0])), np.ones(len(worlds[1]))], ranking)}
    if esc10:
        rows = data._rows(data._metadata(esc10, "train")[0])
        classes = sorted({r["category"] for r in rows})
        sets["esc10"] = ([torch.from_numpy(data.read_audio(esc10 / r["file_name"])) for r in tqdm(rows, desc="reading", unit="clip")],
                         torch.tensor([classes.index(r["category"]) for r in rows]), np.array([int(r["fold"]) for r in rows]), correct)
    def rows_of(x, y, part, score):
        if score is ranking:
            inner = (part == 0) & (np.arange(len(part)) >= 0.8 * (part == 0).sum())
            return linear_probe(x, y, (part == 0) & ~inner, inner, part == 1, score)
        out = np.zeros(len(y))
        for fold in range(1, 6):
            inner = part == fold % 5 + 1
            out[part == fold] = linear_probe(x, y, (part != fold) & ~inner, inner, part == fold, score)
        return out
    @torch.no_grad()
    def pooled(net, waves):
        mels = [log_mel(x[None]) for x in waves]
        return torch.cat([guidance.pool(m if net is None else net(m[:, : m.shape[1] // 2 * 2])) for m in mels])
    randoms, report = [], {}
    for seed in range(inits):
        torch.manual_seed(100 + seed)
        randoms.append(type(teacher)().eval())
    for name, (waves, y, part, score) in sets.items():
        per_clip = {"mel statistics": rows_of(pooled(None, waves), y, part, score),
                    "random initialisation": np.mean([rows_of(pooled(net, waves), y, part, score) for net in randoms], axis=0),
                    "teacher": rows_of(pooled(teacher, waves), y, part, score)}
        report[name] = {"n": len(per_clip["teacher"]), **{k: {"mean": float(v.mean()), "interval": mean_interval(v)} for k, v in per_clip.items()},
                        **{f"teacher - {k}": {"mean": float((per_clip["teacher"] - v).mean()), "interval": mean_interval(per_clip["teacher"] - v)}
                           for k, v in per_clip.items() if k != "teacher"}}
    return report


# --------------------------------------------------------------------------------------------------------------------------
# Runs.

@dataclass
class Run:
    """A trained model ready to use: EMA weights in eval mode, codec, vocabulary and the configuration they were made with."""
    path: Path
    config: dict
    model: DiT
    codec: Codec
    words: Words | None
    step: int

    @property
    def tokens(self) -> int:
        return self.codec.tokens(round(self.config["seconds"] * RATE))


VERSION = 2  # of run folders; raise it when saved weights or settings change their meaning (1: RMSNorm in attention)
CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")  # newest first


def load_config(path: Path) -> dict:
    """config.json of a run folder, each field checked as if it had been typed; UserError names the field."""
    import config
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: not a run folder (no config.json)")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({str(e)[:120]})") from None
    wrong = config.foreign(fields)
    if wrong:
        raise UserError(f"{file}: {wrong}")
    return fields


def load_checkpoint(path: Path) -> tuple[dict, dict]:
    """(config, checkpoint) of a run folder, or of the checkpoint before it with a warning where the newest can't be read. Weights-only
    loading, so a file from elsewhere can't run code."""
    config, failed = load_config(path), []
    for name in CHECKPOINTS:
        try:
            ckpt = torch.load(path / name, map_location="cpu", weights_only=True)
            ckpt = {"config": {}, **ckpt, "step": int(ckpt["step"])}
        except FileNotFoundError:
            continue
        except Exception as e:  # zip, pickle and key errors all mean the same to the user
            failed.append(f"{name}: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}")
            continue
        if ckpt.get("version", 1) != VERSION:
            raise UserError(f"{path / name}: of version {ckpt.get('version', 1)}, this code reads version {VERSION}; use the code that made it, or train anew")
        for field in ("task", "codec", "text", "channels", "width", "depth", "heads"):
            if config[field] != dict(ckpt["config"]).get(field):
                raise UserError(f"{path}: {field} is {config[field]!r} in config.json and {dict(ckpt['config']).get(field)!r} in {name}; one of them is from another run")
        if name != CHECKPOINTS[0]:
            print(f"warning: {path / CHECKPOINTS[0]} {f'is damaged ({failed[0]})' if failed else 'is missing'}; going on from {name}, step {ckpt['step']}", file=sys.stderr)
        return config, ckpt
    raise UserError(f"{path}: checkpoint can't be read ({'; '.join(failed)})" if failed else f"{path}: not a run folder (no checkpoint.pt)")


def has_checkpoint(path: Path) -> bool:
    """Is there one that load_checkpoint could try?"""
    return any((path / name).is_file() for name in CHECKPOINTS)


def not_written(path: Path, why: str) -> UserError:
    """What to say where a run's file can't be written."""
    return UserError(f"{path}: can't be written ({why}); the last checkpoint is intact: make room, then python train.py --resume {path.parent}")


def save_checkpoint(path: Path, **state) -> None:
    """Write, flush, read back, rename; the one before it stays as checkpoint-previous.pt. A crash at any moment leaves one that can be read."""
    tmp = path.with_suffix(".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save({"version": VERSION, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        torch.load(tmp, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as e:  # torch wraps a full disk in a RuntimeError of its own
        tmp.unlink(missing_ok=True)
        why = next((x.strerror for x in (e, e.__context__) if isinstance(x, OSError) and x.strerror), str(e).splitlines()[0][:120])
        raise not_written(path, why) from None
    if path.exists():
        os.replace(path, path.with_name(CHECKPOINTS[1]))
    os.replace(tmp, path)


def pick_device(name: str) -> str:
    """`auto` -> cuda, mps or cpu; any other name is checked."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if have[d])
    if not have.get(name.split(":")[0]):
        raise UserError(f"--device {name}: not here; available: {', '.join(d for d in have if have[d])}")
    return name


def hardware(device: str) -> str:
    """What a time was measured on: the GPU, or the CPU with its cores and what it has for bfloat16 products (Linux; else the platform's word)."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    try:
        info = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if "\t" in line)
        name, flags = info["model name"].strip(": \t"), info["flags"].split()
    except (OSError, KeyError):
        name, flags = platform.processor() or platform.machine(), []
    return ", ".join([name, f"{data.cores()} cores", *(word for flag, word in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX-BF16")) if flag in flags)])


def memory_mb(device: str) -> float | None:
    """Memory of this process in MB: on a GPU the peak that tensors took, otherwise what is resident now (where the system says it)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if statm.exists() else None


def pick_precision(trial, device: str) -> str:
    """Time `trial(bf16)` (forward + backward) in float32 and in bf16, alternating, after a warm-up: bf16 wins on tensor cores, and
    loses on CPUs that emulate it. fp16 overflows where bf16 does not, so it is no candidate."""
    seconds = {"fp32": [], "bf16": []}
    if device.startswith("mps"):
        return "fp32"  # autocast to bf16 is partial there
    for round_ in range(4):
        for name, times in seconds.items():
            start = time.perf_counter()
            trial(name == "bf16")
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_:
                times.append(time.perf_counter() - start)
    best = {k: min(v) for k, v in seconds.items()}
    choice = "bf16" if best["bf16"] < 0.9 * best["fp32"] else "fp32"
    print(f"precision: {choice} (a step's forward and backward: fp32 {1e3 * best['fp32']:.0f} ms, bf16 {1e3 * best['bf16']:.0f} ms)")
    return choice


class Laps:
    """Where a loop's time goes: `start()`, then `laps("part")` after each part. On a GPU each lap waits for the device, so only a
    profiled run (device given) does that."""

    def __init__(self, device: str = ""):
        self.seconds, self.device = {}, device
        self.start()

    def start(self) -> None:
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now

    def table(self) -> str:
        total = sum(self.seconds.values())
        rows = sorted(self.seconds.items(), key=lambda x: -x[1])
        return "\n".join([f"{'part':20s} seconds  share"] + [f"{k:20s} {v:7.1f}  {100 * v / total:4.1f} %" for k, v in rows] + [f"{'all':20s} {total:7.1f}"])


def open_codec(config: dict, device: str = "cpu", trust: bool = False, pickles: bool = False):
    """The codec that a configuration names, not yet fitted: the embedded one, or a pretrained one (trust, pickles: see pretrained.load)."""
    if config.get("codec", "mel") == "mel":
        return Codec(config["channels"])
    import pretrained
    return pretrained.PretrainedCodec(config["codec"], config["channels"], trust=trust, pickles=pickles, device=device)


def open_text(config: dict, words: list[str], device: str = "cpu", trust: bool = False, pickles: bool = False):
    """The text encoder that a configuration names: the embedded vocabulary `words`, or a pretrained encoder."""
    if config.get("text", "words") == "words":
        return Words(words)
    import pretrained
    return pretrained.PretrainedText(config["text"], trust=trust, pickles=pickles, device=device)


def open_teacher(cfg) -> nn.Module:
    """The SSL teacher that a config.Config names: the shipped one, a control, or a pretrained one."""
    if cfg.teacher in ("tiny", "shuffled"):
        return guidance.load_teacher()
    if cfg.teacher == "random":
        return guidance.random_teacher(cfg.seed)
    import pretrained
    return pretrained.PretrainedTeacher(cfg.teacher, cfg.teacher_layer, trust=cfg.trust_remote_code, pickles=cfg.allow_pickle, device=cfg.device)


def build_model(config: dict, words) -> DiT:
    """The network of a configuration; words: from open_text, or None for super-resolution."""
    features = getattr(words, "features", 0)
    return DiT(config["channels"], config["width"], config["depth"], config["heads"], len(words) if words is not None and not features else 0, config["task"] == "sr", features)


def load_run(path: str | Path, device: str = "cpu", trust: bool = False, pickles: bool = False) -> Run:
    """Open a run folder for use. Whether code or pickles of its pretrained parts may be loaded is the caller's to say, never the folder's."""
    device = pick_device(device)
    cfg, ckpt = load_checkpoint(Path(path))
    try:
        ema, codec_state, vocabulary = {k: v.float() for k, v in ckpt["ema"].items()}, ckpt["codec"], [data.printable(w) for w in ckpt["words"]]
    except (KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: its checkpoint lacks a part, or holds something else there ({type(e).__name__}: {e})") from None
    words = open_text(cfg, vocabulary, device, trust, pickles) if cfg["task"] == "t2a" else None
    with torch.device("meta"):  # without memory: the sizes that a config.json claims are believed once the weights have them
        model = build_model(cfg, words)
    load_weights(path, model, ema, assign=True)
    codec = open_codec(cfg, device, trust, pickles)
    load_weights(path, codec, codec_state)
    return Run(Path(path), cfg, model.to(device).eval().requires_grad_(False), codec, words, ckpt["step"])


def load_weights(path: str | Path, module: nn.Module, state: dict, **how) -> None:
    """load_state_dict whose refusal is one line: which weights are missing, unknown or of another shape."""
    try:
        module.load_state_dict(state, **how)
    except RuntimeError as e:
        detail = "; ".join(line.strip() for line in str(e).splitlines()[1:3])
        raise UserError(f"{path}: its weights are those of another model or version ({detail[:160]})") from None


class Log:
    """log.jsonl of a run: one object a line. Lines after `step` (of a run that died after its checkpoint) and a torn last one are dropped."""

    def __init__(self, path: Path, step: int):
        self.path, kept = path, []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        data.write_whole(path, "".join(kept))
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def __call__(self, row: dict) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise not_written(self.path, e.strerror) from None

    def sync(self) -> None:
        """Before a checkpoint: after a power cut no line up to it may be missing."""
        os.fsync(self.file.fileno())


def noise(run: Run, seeds: list[int], tokens: int) -> Tensor:
    """(B, T, C) standard normal, row j from seeds[j] alone: a clip is the same whatever batch it is made in."""
    return torch.stack([torch.randn(tokens, run.codec.channels, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def generate_latents(run: Run, captions: list[str], seeds: list[int], tokens: int | None = None, w: float | None = None, steps: int | None = None,
                     method: str = "euler") -> Tensor:
    """Captions -> z (B, T, C) on the CPU. w: guidance scale (run's `cfg` by default); tokens beyond the training length are
    covered by overlapping windows."""
    w, steps = run.config["cfg"] if w is None else w, steps or run.config["sample_steps"]
    device = next(run.model.parameters()).device
    with torch.no_grad():
        text = run.model.encode_text(run.words.encode(captions).to(device))
        null = run.model.encode_text(run.words.encode([""] * len(captions)).to(device))
        field = velocity_field(run.model, text, null, w=w, window=run.tokens, rescale=RESCALE)
        return integrate(field, noise(run, seeds, tokens or run.tokens).to(device), steps, method).cpu()


def generate(run: Run, captions: list[str], seeds: list[int], batch: int = 16, progress: str = "", decoding: dict | None = None, **how) -> np.ndarray:
    """Captions -> waveforms (B, N) float32. `decoding`: see codec.decode, `how`: see generate_latents."""
    out = []
    for i in tqdm(range(0, len(captions), batch), desc=progress, disable=not progress, unit="batch", dynamic_ncols=True):
        out.append(run.codec.decode(generate_latents(run, captions[i : i + batch], seeds[i : i + batch], **how), **decoding or {}).numpy())
    return np.concatenate(out)


def upsample(run: Run, muffled: np.ndarray, cutoff: float, seeds: list[int], steps: int | None = None, batch: int = 16) -> np.ndarray:
    """Muffled waves (B, N), one cutoff (Hz) -> full band (B, N): the band under the cutoff is the input's own."""
    x, n, device = torch.as_tensor(np.ascontiguousarray(muffled)), muffled.shape[-1], next(run.model.parameters()).device
    out = []
    for i in range(0, len(x), batch):
        part = x[i : i + batch]
        cond = run.codec.encode(part)                              # (b, T, C)
        field = velocity_field(run.model, cond=cond.to(device), window=run.tokens)
        z = integrate(field, noise(run, seeds[i : i + batch], cond.shape[1]).to(device), steps or run.config["sample_steps"]).cpu()
        out.append(run.codec.decode(z, part, cutoff)[:, :n])
    return torch.cat(out).numpy()


def upsample_long(run: Run, x: np.ndarray, cutoff: float, seed: int = 0, steps: int | None = None, segment_s: float = 30.0, progress: bool = True) -> np.ndarray:
    """One recording of any length (N,) -> (N,). Overlapped windows inside segments of 30 s; segments are cross-faded over
    0.5 s, so memory does not grow with length."""
    seg, fade = round(segment_s * RATE), RATE // 2
    starts = [0] if len(x) <= seg else list(range(0, len(x) - fade, seg - fade))
    out, weight = np.zeros(len(x)), np.zeros(len(x))
    for k, s in enumerate(tqdm(starts, desc="upsampling", unit="segment", disable=not progress or len(starts) == 1)):
        part = x[s : s + seg]
        n, whole = len(part), max(len(part), round(run.config["seconds"] * RATE))
        y = upsample(run, np.pad(part, (0, whole - n))[None], cutoff, [seed + k], steps)[0, :n]
        ramp = np.ones(n)
        if k:
            ramp[:fade] = np.linspace(0, 1, fade + 1)[1:][: n]
        if s + seg < len(x):
            ramp[-fade:] *= np.linspace(1, 0, fade + 1)[:-1]
        out[s : s + n] += ramp * y
        weight[s : s + n] += ramp
    return (out / weight.clip(1e-9)).astype(np.float32)


def find_cutoff(x: np.ndarray) -> float | None:
    """Frequency (Hz, 125 Hz grid, to about 500 Hz) above which a recording holds nothing, or None if it is full-band.

    The *noise floor* is searched for an edge, not the sound: a bell has no treble, but its recording's hiss goes on to the top; a
    low-pass takes the hiss too. Floor: 15 % quantile over time and bins of each 125 Hz band, in frames within 40 dB of the
    loudest. Edge: everything 625 Hz above it lies 18 dB under all of the 750 Hz below it. ASSUMED: these thresholds; measured
    by a test."""
    power = 10 * log_power(x)                                      # dB (frames, 1025)
    level = np.log10((10 ** (power / 10)).sum(1))
    power = power[level >= level.max() - 4]
    floor = np.quantile(rearrange(power[:, :1_024], "f (b k) -> b (f k)", b=64), 0.15, axis=1)
    drop = {b: floor[b - 6 : b].min() - floor[b + 5 :].max() for b in range(6, 58)}
    b = max(drop, key=drop.get)
    if drop[b] < 18:
        return None
    return 125.0 * next(k for k in range(b + 5, 0, -1) if floor[k - 1] >= floor[b - 6 : b].min() - 6)


# --------------------------------------------------------------------------------------------------------------------------
# Baselines of super-resolution, fitted on training clips. Both know what the metric looks at; neither knows any sound.

class SpectrumBaseline:
    """`mean`: every frame gets the training set's mean high-band log spectrum. `ridge`: per-frame ridge regression from the
    low-band to the high-band log10 power spectrum (STFT 2048/512; penalty chosen on a tenth of the frames). Both are rendered
    as Gaussian noise of that spectrum over the input's own low band."""

    def __init__(self, waves, cutoff: int):
        self.cut = int(1_025 * 2 * cutoff / RATE)
        low, high = [], []
        for x in waves:
            low.append(log_power(data.band_limit(x, cutoff))[:, : self.cut])
            high.append(log_power(x)[:, self.cut :])
        x, y = np.concatenate(low).astype(np.float64), np.concatenate(high).astype(np.float64)
        self.mx, self.mean = x.mean(0), y.mean(0)
        held = np.arange(len(x)) >= 0.9 * len(x)  # whole clips at the end, not neighbours of fitted frames
        solve = lambda x, y, lam: np.linalg.solve(x.T @ x + lam * len(x) * np.eye(x.shape[1]), x.T @ y)
        xc, yc = x - self.mx, y - self.mean
        errors = {lam: np.mean((xc[held] @ solve(xc[~held], yc[~held], lam) - yc[held]) ** 2) for lam in (1e-3, 1e-2, 1e-1, 1.0, 10.0)}
        self.penalty = min(errors, key=errors.get)
        self.w = solve(xc, yc, self.penalty)

    def predict(self, muffled: np.ndarray, kind: str) -> np.ndarray:
        """Predicted mean of the high band's log10 power, (frames, 1025 - cut)."""
        low = log_power(muffled)[:, : self.cut]
        return np.broadcast_to(self.mean, (len(low), len(self.mean))) if kind == "mean" else (low - self.mx) @ self.w + self.mean

    def render(self, muffled: np.ndarray, kind: str, seed: int) -> np.ndarray:
        """(N,) -> (N,). The log of exponential power lies Euler's gamma under the log of its mean, so that much is added."""
        win, n = torch.hann_window(2_048), len(muffled)
        spec = lambda x: torch.stft(torch.as_tensor(np.ascontiguousarray(x)), 2_048, 512, window=win, return_complex=True)
        white = spec(np.random.default_rng(seed).standard_normal(n).astype(np.float32)) / np.sqrt(float(win.square().sum()))
        out = spec(muffled)
        power = 10 ** self.predict(muffled, kind) * np.exp(np.euler_gamma)
        out[self.cut :] = white[self.cut :] * torch.as_tensor(np.sqrt(power).T.copy(), dtype=torch.float32)
        return torch.istft(out, 2_048, 512, window=win, length=n).numpy()


# --------------------------------------------------------------------------------------------------------------------------
# Scores.

def order_right(world: SoundWorld, indices, presence: np.ndarray, heard: dict, hit: np.ndarray) -> np.ndarray:
    """Among clips whose event set is right and whose caption orders events: is the heard order of onsets the caption's?"""
    out = []
    for j, i in enumerate(indices):
        scene = world.scene(i)
        first = [e for e in scene.events if not (scene.relation == "then-while" and e is scene.events[-1])]
        if hit[j] and scene.relation in ("then", "then-while"):
            onsets = [heard["onset"][j, e.sound] for e in first]
            out.append(all(a < b for a, b in itertools.pairwise(onsets)))
    return np.asarray(out, bool)


def factor_scores(world: SoundWorld, truth: dict, heard: dict, hit: np.ndarray) -> dict:
    """Is each factor right, taken alone? recall: share of the caption's events that are heard (semantics). Of events that are heard and
    countable or clearly pitched: count, pitch (sign); order: see order_right, with the number of clips it was asked of (detail). None where
    there was nothing to ask. hit (n,): is the event set right?"""
    there = (truth["presence"] > 0.5) & (heard["presence"] > 0)
    share = lambda right, asked: float(right[asked].mean()) if asked.any() else None
    order = order_right(world, range(len(there)), truth["presence"], heard, hit)
    return {"recall": share(heard["presence"] > 0, truth["presence"] > 0.5), "count": share(heard["count"].argmax(-1) + 1 == truth["count"], there & ~np.isnan(truth["count"])),
            "pitch": share(np.sign(heard["pitch"]) == np.sign(truth["pitch"]), there & (np.abs(np.nan_to_num(truth["pitch"])) >= 0.5)),
            "order": float(order.mean()) if len(order) else None, "order_n": len(order)}


def text_scores(world: SoundWorld, waves, judge: Judge, real: dict, reference: np.ndarray, new: np.ndarray) -> dict:
    """Metrics of clips 0..n-1 of a SoundWorld split rendered as `waves`; real: what the judge hears in the true clips;
    reference (m, E): judge embeddings of other real clips; new (n,): captions that training never saw word for word."""
    heard, n = listen(judge, waves), len(waves)
    truth = factor_table(world, n)
    hit, size = event_match(truth["presence"], heard["presence"]), truth["presence"].sum(1)
    sig = lambda z: 1 / (1 + np.exp(-z))
    by_size = {int(k): {"exact": float(hit[size == k].mean()), "n": int((size == k).sum())} for k in np.unique(size)}
    return {"exact": float(hit.mean()), "interval": wilson(hit.sum(), n), "n": n, "by_events": by_size,
            "new_wording": {"exact": float(hit[new].mean()), "interval": wilson(hit[new].sum(), new.sum()), "n": int(new.sum())} if new.any() else None,
            **factor_scores(world, truth, heard, hit),
            "event_kl": bernoulli_kl(sig(real["presence"]), sig(heard["presence"])), "kid": kid(heard["embedding"], reference)}


def foreign_scores(rows: dict, captions: list[str], reference, clap=None, embedder=None) -> dict[str, dict]:
    """What pretrained models (pretrained.Clap, pretrained.Embedder) say of each row {name: waves (n, N)}: clap_score, mean cosine of clip
    and caption; kid_model and, where n allows, frechet_model, distances to the reference clips (m, N) in the embedder's space."""
    out = {name: {} for name in rows}
    if clap:
        text = clap.text(captions)
        for name, waves in rows.items():
            cosine = (clap.audio(waves) * text).sum(1)
            out[name]["clap_score"] = {"mean": float(cosine.mean()), "interval": mean_interval(cosine)}
    if embedder:
        y = embedder.audio(reference)
        for name, waves in rows.items():
            x = embedder.audio(waves)
            out[name]["kid_model"] = kid(x, y)
            if min(len(x), len(y)) >= max(1_000, 2 * x.shape[1]):  # below that its bias is larger than what it measures
                out[name]["frechet_model"] = frechet(x, y)
    return out


_KEPT: dict = {}  # see kept


def kept(key: tuple, make):
    """make(), or what it gave last time, if that was for the same key: what all runs of an experiment are scored against is computed once."""
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = make()
    return _KEPT[key]


@dataclass
class Unseen:
    """Clips 0..n-1 of a SoundWorld split, and what a caption model's are compared with."""
    world: SoundWorld
    captions: list[str]
    waves: dict                # "real", "codec ceiling" -> (n, N)
    others: np.ndarray         # other real clips (n, N)
    heard: dict                # what the judge hears in the real clips
    reference: np.ndarray      # the judge's embeddings of `others`
    new: np.ndarray            # (n,) captions that training never saw word for word


def round_trip(codec, waves: np.ndarray) -> np.ndarray:
    """(n, N) -> (n, N): what the latent space leaves of sounds, the ceiling of any model in it."""
    return np.concatenate([codec.decode(codec.encode(torch.as_tensor(waves[i : i + 50]))).numpy() for i in range(0, len(waves), 50)])


def unseen_clips(codec, config: dict, clips: int, judge: Judge, split: str) -> Unseen:
    world, other = (SoundWorld(s, clips, seconds=config["seconds"]).prepare() for s in (split, "val" if split != "val" else "test"))
    real, others = (np.stack([w.wave(i) for i in range(clips)]) for w in (world, other))
    trained = SoundWorld("train", config["clips"], seconds=config["seconds"])
    captions, seen = [world.caption(i) for i in range(clips)], {trained.caption(i, k) for i in range(len(trained)) for k in range(trained.wordings)}
    return Unseen(world, captions, {"real": real, "codec ceiling": round_trip(codec, real)}, others, listen(judge, real), listen(judge, others)["embedding"], np.array([c not in seen for c in captions]))


def score_t2a(run: Run, clips: int, kind: str, split: str, w: float | None, steps: int | None, clap=None, embedder=None) -> list[dict]:
    """Rows of the caption-to-sound table on unseen captions: real clips, their codec round trip (the ceiling), the model."""
    judge = load_judge(kind)
    if run.config["data"] != "soundworld":
        return score_folder(run, clips, judge, split, w, steps, clap, embedder)
    u = kept(("t2a", run.codec.key, kind, split, clips, run.config["clips"], run.config["seconds"]), lambda: unseen_clips(run.codec, run.config, clips, judge, split))
    rows = u.waves | {"model": generate(run, u.captions, list(range(clips)), progress="generating", w=w, steps=steps)}
    foreign = foreign_scores(rows, u.captions, u.others, clap, embedder)
    return [{"row": name, **text_scores(u.world, waves, judge, u.heard, u.reference, u.new), **foreign[name]} for name, waves in rows.items()]


def score_folder(run: Run, clips: int, judge: Judge, split: str, w, steps, clap=None, embedder=None) -> list[dict]:
    """Caption-to-sound on recordings: no true factors, so KID, in an embedding trained on other (synthetic) sounds, and what pretrained
    models say."""
    sets = [open_set(run.config, split, clips), open_set(run.config, "train", run.config["clips"])]
    rng, n = np.random.default_rng(0), min(clips, len(sets[0]))
    crop = lambda d, i: _first(d.wave(i), run.config["seconds"])
    real = np.stack([crop(sets[0], i) for i in range(n)])
    others = np.stack([crop(sets[1], i) for i in rng.permutation(len(sets[1]))[: max(500, n)]])
    reference, captions = listen(judge, others)["embedding"], [sets[0].caption(i) for i in range(n)]
    made = generate(run, captions, list(range(n)), progress="generating", w=w, steps=steps)
    rows = {"real": real, "codec ceiling": round_trip(run.codec, real), "model": made}
    foreign = foreign_scores(rows, captions, others, clap, embedder)
    return [{"row": name, "n": n, "kid": kid(listen(judge, waves)["embedding"], reference), **foreign[name]} for name, waves in rows.items()]


def open_set(config: dict, split: str, n: int = 0):
    """A split of the data that a run was trained on, prepared."""
    return data.open_data(config["data"], split, n, config["val_fold"], config["seconds"], config.get("max_bad_share", 0.0)).prepare()


def _first(x: np.ndarray, seconds: float) -> np.ndarray:
    n = round(seconds * RATE)
    return np.pad(x[:n], (0, max(0, n - len(x))))


def sr_rows(reals, outputs: list[list[np.ndarray]], cutoff: int) -> list[dict]:
    """Metrics of each clip; outputs[s][i] is sample s of clip i. LSD and SI-SDR of the first sample, energy score of all."""
    return [lsd(log_power(ref), log_power(outputs[0][i]), cutoff) |
            {"energy_score": energy_score(high_band_mel(ref, cutoff), [high_band_mel(o[i], cutoff) for o in outputs]), "si_sdr": si_sdr(ref, outputs[0][i])}
            for i, ref in enumerate(reals)]


def summary(rows: list[dict], minus: list[dict] | None = None) -> dict:
    """{metric: {mean, interval}} over clips; with `minus`, of the paired differences, in which the clips' variety cancels."""
    values = {k: np.array([r[k] for r in rows]) - (0 if minus is None else np.array([r[k] for r in minus])) for k in rows[0]}
    return {k: {"mean": float(v.mean()), "interval": mean_interval(v)} for k, v in values.items()}


def score_sr(run: Run, clips: int, cutoff: int, steps: int | None, split: str = "test") -> list[dict]:
    """Rows of the super-resolution table on unseen clips: Chebyshev order 8 at `cutoff`, two samples a clip where sampled."""
    seconds = run.config["seconds"]
    def references():
        test, fit = open_set(run.config, split, clips), open_set(run.config, "train", run.config["clips"])
        reals = [_first(test.wave(i), seconds) for i in range(min(clips, len(test)))]
        muffled = [data.band_limit(x, cutoff) for x in reals]
        base = SpectrumBaseline((_first(fit.wave(i), seconds) for i in np.random.default_rng(0).permutation(len(fit))[:400]), cutoff)
        z, m = (torch.as_tensor(np.stack(x)) for x in (reals, muffled))
        z = run.codec.encode(z)
        render = lambda kind: [[base.render(x, kind, 2 * i + s) for i, x in enumerate(muffled)] for s in (0, 1)]
        methods = {"input": [muffled], "mean spectrum": render("mean"), "ridge": render("ridge"),
                   "codec ceiling": [torch.cat([run.codec.decode(z[i : i + 50], m[i : i + 50], cutoff)[:, : m.shape[1]] for i in range(0, len(z), 50)]).numpy()]}
        return reals, np.stack(muffled), {name: sr_rows(reals, out, cutoff) for name, out in methods.items()}
    reals, muffled, rows = kept(("sr", run.codec.key, run.config["data"], run.config["val_fold"], run.config["clips"], seconds, split, clips, cutoff), references)
    made = sr_rows(reals, [upsample(run, muffled, cutoff, [2 * i + s for i in range(len(reals))], steps) for s in (0, 1)], cutoff)
    rows = {"input": rows["input"], "mean spectrum": rows["mean spectrum"], "ridge": rows["ridge"], "model": made, "codec ceiling": rows["codec ceiling"]}
    table = [{"row": name, **summary(r), "n": len(reals)} for name, r in rows.items()]
    return table + [{"row": f"model - {name}", **summary(made, rows[name]), "n": len(reals)} for name in ("mean spectrum", "ridge")]


def score(runs: list[Run], clips: int = 500, judge: str = "dev", split: str = "test", cutoff: int = 2_000, w: float | None = None,
          steps: int | None = None, out: Path | None = None, clap: str = "", audio_model: str = "", trust: bool = False, pickles: bool = False,
          device: str = "cpu", **more) -> dict:
    """Score runs, print their tables, write JSON to `out`. Every number comes with n and the protocol it was made under, to which
    `more` is added. clap, audio_model: pretrained models (hub id or folder) that score captioned clips too."""
    result, judges = {}, {}
    if clap or audio_model:
        import pretrained
        judges |= {"clap": pretrained.Clap(clap, trust=trust, pickles=pickles, device=device)} if clap else {}
        judges |= {"embedder": pretrained.Embedder(audio_model, trust=trust, pickles=pickles, device=device)} if audio_model else {}
    for run in runs:
        if split == "combos" and run.config["data"] != "soundworld":
            raise UserError(f"{run.path}: --split combos is SoundWorld's, this run's data is {run.config['data']}")
        sr = run.config["task"] == "sr"
        rows = score_sr(run, clips, cutoff, steps, split) if sr else score_t2a(run, clips, judge, split, w, steps, **judges)
        protocol = {"run": str(run.path), "step": run.step, "data": run.config["data"], "split": split if run.config["data"] == "soundworld" else "held out",
                    "n": rows[0]["n"], "sample_steps": steps or run.config["sample_steps"], "candidates": 1}
        protocol |= {"cutoff_hz": cutoff, "filter": "cheby1 order 8", "stft": "Hann 2048/512, power floor 1e-8"} if sr else \
                    {"judge": judge, "w": run.config["cfg"] if w is None else w, "rescale": RESCALE,
                     **{name: f"{model.name} ({model.key}, {model.rate_in} Hz)" for name, model in judges.items()}}
        protocol |= more
        result[str(run.path)] = {"protocol": protocol, "rows": rows}
        print("\n" + ", ".join(f"{k} {v}" for k, v in protocol.items()))
        print(sr_table(rows) if sr else text_table(rows))
    if out:
        data.write_whole(Path(out), json.dumps(result, indent=1) + "\n")
    return result


def foreign_table(rows: list[dict]) -> str:
    """The columns of foreign_scores, where there are any."""
    cells = {"clap_score": ("CLAP score, 95 %", lambda v: f"{v['mean']:+.3f} [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]"),
             "kid_model": ("KID, audio model", lambda v: f"{v:.4f}"), "frechet_model": ("Frechet, audio model", lambda v: f"{v:.3f}")}
    shown = [k for k in cells if k in rows[0]]
    if not shown:
        return ""
    return "\n".join(["", f"{'':14s}" + "".join(f"{cells[k][0]:>26s}" for k in shown)] + [f"{r['row']:14s}" + "".join(f"{cells[k][1](r[k]):>26s}" for k in shown) for r in rows])


def score_codec(config: dict, clips: int = 100, **foreign) -> dict:
    """Round trip of held-out clips of config["data"] through a latent space of config["channels"]: LSD, its high half from 4 kHz up, and
    SI-SDR, before and after the PCA. To be read before a model is trained in that space: it is the ceiling."""
    train, test, codec = open_set(config, "train", 2_000), open_set(config, "test", clips), open_codec(config, **foreign)
    crop = lambda d, i: _first(d.wave(i), config["seconds"])
    codec.fit(crop(train, i) for i in np.random.default_rng(0).permutation(len(train))[:300])
    trips, n = {f"{codec.channels} channels": lambda x: codec.decode(codec.encode(x))}, min(clips, len(test))
    if hasattr(codec, "native") and codec.channels < codec.mean.shape[0]:
        trips = {f"all {codec.mean.shape[0]}": lambda x: codec.wave(codec.native(x))} | trips
    out = {"protocol": {"codec": config.get("codec", "mel"), "data": config["data"], "n": n, "seconds": config["seconds"], "tokens_per_s": codec.rate, "explained": codec.explained,
                        "stft": "Hann 2048/512, power floor 1e-8"}, "rows": []}
    for name, trip in trips.items():
        rows = []
        for i in tqdm(range(n), desc=name, unit="clip", dynamic_ncols=True):
            x = crop(test, i)
            y = trip(torch.as_tensor(x)[None])[0, : len(x)].cpu().numpy()
            rows.append(lsd(log_power(x), log_power(y), 4_000) | {"si_sdr": si_sdr(x, y)})
        out["rows"].append({"row": name, **summary(rows), "n": n})
    return out


def codec_table(result: dict) -> str:
    lines = [", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result["protocol"].items()), f"{'round trip':16s}" + "".join(f"{k:>26s}" for k in ("LSD", "LSD from 4 kHz up", "SI-SDR dB"))]
    return "\n".join(lines + [f"{r['row']:16s}" + "".join(f"{r[k]['mean']:9.3f} [{r[k]['interval'][0]:6.3f},{r[k]['interval'][1]:6.3f}]" for k in ("lsd", "lsd_hf", "si_sdr")) for r in result["rows"]])


def text_table(rows: list[dict]) -> str:
    if "exact" not in rows[0]:
        return "\n".join([f"{'':14s}    KID (judge's space, trained on SoundWorld: out of domain here)"] + [f"{r['row']:14s} {r['kid']:8.4f}" for r in rows]) + foreign_table(rows)
    lines = [f"{'':14s} event set  95 % interval   of ceiling   1 event  2 events  3 events  new wording (n)   order (n)    event KL   1000 KID"]
    ceiling = next(r["exact"] for r in rows if r["row"] == "codec ceiling")
    for r in rows:
        by = "  ".join(f"{r['by_events'][k]['exact']:7.3f}" if k in r["by_events"] else "      -" for k in (1, 2, 3))
        order = "   -   " if r["order"] is None else f"{r['order']:.3f} ({r['order_n']})"
        new = f"{r['new_wording']['exact']:.3f} ({r['new_wording']['n']})" if r["new_wording"] else "-"
        lines.append(f"{r['row']:14s}   {r['exact']:.3f}   [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]    {r['exact'] / max(ceiling, 1e-9):6.3f}   {by}   {new:15s} {order:12s} {r['event_kl']:9.4f} {1e3 * r['kid']:9.3f}")
    return "\n".join(lines) + foreign_table(rows)


def sr_table(rows: list[dict]) -> str:
    keys = ("energy_score", "lsd", "lsd_lf", "lsd_hf", "si_sdr")
    lines = [f"{'':21s}" + "".join(f"{k:>24s}" for k in ("energy score", "LSD", "LSD-LF", "LSD-HF", "SI-SDR dB"))]
    lines += [f"{r['row']:21s}" + "".join(f"{r[k]['mean']:8.3f} [{r[k]['interval'][0]:6.3f},{r[k]['interval'][1]:6.3f}]" for k in keys) for r in rows]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------------
# Pictures, and sounds on disk.

def describe(x: np.ndarray) -> dict:
    """What a level meter and an analyser say of (N,): peak, RMS, spectral centroid (Hz, power-weighted)."""
    power, freqs = np.abs(np.fft.rfft(x)) ** 2, np.fft.rfftfreq(len(x), 1 / RATE)
    return {"peak": float(np.abs(x).max()), "rms": float(np.sqrt(np.mean(x**2))), "centroid_hz": float((power * freqs).sum() / max(power.sum(), 1e-12))}


def verdict(judge: Judge, x: np.ndarray) -> list[str]:
    """Names of the events a judge hears in (N,), judged on windows of 2.56 s (its training length)."""
    n = round(data.CLIP_S * RATE)
    parts = [_first(x[s:], data.CLIP_S) for s in range(0, max(1, len(x) - n // 2), n)]
    heard = listen(judge, parts)["presence"].max(0)
    return [NAMES[k] for k in np.argsort(-heard) if heard[k] > 0]


def draw_spectrogram(ax, x: np.ndarray, title: str):
    """One spectrogram with axes in s and kHz; dB relative to full scale of the STFT. Returns the image (for a colour bar)."""
    import textwrap
    db = 20 * np.log10(np.maximum(stft(torch.as_tensor(x)[None])[0].abs().numpy().T / (N_FFT / 4), 1e-5))
    image = ax.imshow(db, origin="lower", aspect="auto", extent=(0, len(x) / RATE, 0, RATE / 2_000), vmin=-80, vmax=0, cmap="magma")
    ax.set_title("\n".join(textwrap.wrap(title, 34)[:3]), fontsize=8, parse_math=False)  # a caption may hold dollars
    ax.tick_params(labelsize=7)
    return image


def preview_pairs(run: Run, val_set, n: int = 4) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(caption, real, made) for n validation clips, always from the same noise; folders are often sorted by class, so different
    captions go first."""
    assert not run.model.training, "previews come from EMA weights in eval mode"
    captions = [val_set.caption(i) for i in range(len(val_set))]
    chosen = sorted(range(len(captions)), key=lambda i: captions.index(captions[i]) < i)[:n]  # stable: repeats go last
    real = np.stack([_first(val_set.wave(i), run.config["seconds"]) for i in chosen])
    captions = [captions[i] for i in chosen]
    if run.config["task"] == "t2a":
        return list(zip(captions, real, generate(run, captions, list(range(len(real))))))
    muffled = np.stack([data.band_limit(x, 2_000) for x in real])
    return list(zip(captions, real, upsample(run, muffled, 2_000, list(range(len(real))))))


def preview_clips(config: dict) -> int:
    """How many validation clips a quick metric hears."""
    return min(config["score_clips"], 16 if config["task"] == "sr" else 96)


def preview(run: Run, val_set) -> dict:
    """Write the four previews (wav + spectrogram png) and return quick metrics on validation clips: event-set accuracy by
    the development judge, or LSD-HF at 2 kHz, with 12 Euler steps. Rough: for curves, not for tables."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    pairs = preview_pairs(run, val_set)
    fig, axes = plt.subplots(2, len(pairs), figsize=(3.2 * len(pairs), 4.6), sharex=True, sharey=True, squeeze=False, layout="constrained")
    for col, (caption, real, made) in zip(axes.T, pairs):
        draw_spectrogram(col[0], real, caption)
        image = draw_spectrogram(col[1], made, "model")
    axes[0, 0].set_ylabel("real\nfrequency (kHz)", fontsize=8)
    axes[1, 0].set_ylabel(f"step {run.step}\nfrequency (kHz)", fontsize=8)
    for ax in axes[1]:
        ax.set_xlabel("time (s)", fontsize=8)
    fig.colorbar(image, ax=axes, label="dB", shrink=0.7)
    samples = run.path / "samples"
    fig.savefig(samples / f"step{run.step:06d}.png", dpi=90)
    plt.close(fig)
    for k, (caption, real, made) in enumerate(pairs):
        data.write_wav(samples / f"real-{k}.wav", real)
        data.write_wav(samples / f"step{run.step:06d}-{k}.wav", made)
    (samples / "captions.txt").write_text("".join(f"{k}: {c}\n" for k, (c, _, _) in enumerate(pairs)), encoding="utf-8")
    clips = min(preview_clips(run.config), len(val_set))
    if run.config["task"] == "sr":
        reals = [_first(val_set.wave(i), run.config["seconds"]) for i in range(clips)]
        made = upsample(run, np.stack([data.band_limit(x, 2_000) for x in reals]), 2_000, list(range(len(reals))), 12)
        return {"lsd_hf": float(np.mean([lsd(log_power(a), log_power(b), 2_000)["lsd_hf"] for a, b in zip(reals, made)]))}
    if run.config["data"] != "soundworld":
        return {}
    quick = {"iters": 8} if run.config["codec"] == "mel" else {}     # the judge hears no difference from 32, which take three times as long
    made = generate(run, [val_set.caption(i) for i in range(clips)], list(range(clips)), decoding=quick, steps=12)
    truth, heard = factor_table(val_set, clips), listen(load_judge("dev"), made)
    hit = event_match(truth["presence"], heard["presence"])
    return {"event_accuracy": float(hit.mean()), **factor_scores(val_set, truth, heard, hit)}


def dashboard(path: Path) -> None:
    """Draw dashboard.png of a run folder from its log and its last previews: losses, the regime and what it drives, the blocks'
    grouping at three moments, sounds."""
    if not (path / "log.jsonl").is_file():
        raise UserError(f"{path}: no log.jsonl to draw from")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    config = json.loads((path / "config.json").read_text())
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    train, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval" in r]
    fig = plt.figure(figsize=(15, 17), layout="constrained")
    top, middle, bottom = fig.subfigures(3, 1, height_ratios=(1.35, 0.75, 1))
    fig.suptitle(f"{path}: {config['task']} on {config['data']}, recipe {config.get('recipe', '-')}, {train[-1]['step'] if train else 0} of {config['steps']} steps, "
                 f"seed {config['seed']}", fontsize=11, parse_math=False)
    panels = top.subplots(2, 3)
    if train:
        _draw_losses(panels[0], config, train, evals)
        _draw_regime(panels[1], config, train)
    _draw_structure(middle, [r for r in train if "structure" in r])
    if evals:
        _draw_previews(bottom, path, evals[-1]["step"])
    tmp = path / "dashboard.tmp.png"
    fig.savefig(tmp, dpi=90)
    plt.close(fig)
    tmp.replace(path / "dashboard.png")


def _draw_losses(axes, config: dict, train: list[dict], evals: list[dict]) -> None:
    import matplotlib.pyplot as plt
    steps, loss = np.array([r["step"] for r in train]), np.array([r["loss_fm"] for r in train])
    ax, k = axes[0], max(2, len(loss) // 20)
    ax.plot(steps, loss, color="0.8", lw=0.7, label="training, single batches")
    if len(loss) >= k:
        ax.plot(steps[k - 1 :], np.convolve(loss, np.ones(k) / k, "valid"), color="C0", label=f"training, mean of {k}")
    ax.plot([r["step"] for r in evals], [r["eval"]["val_loss"] for r in evals], "o-", color="C3", ms=4, label="validation (EMA, t uniform)")
    lows = [loss.min(), *(r["eval"]["val_loss"] for r in evals)]
    ax.set(title="flow-matching loss", xlabel="step", ylabel="mean squared velocity error", ylim=(0.9 * min(lows), 1.1 * np.quantile(loss, 0.99)))
    ax.legend(fontsize=8)
    ax = axes[1]
    if evals:
        bins = np.array([r["eval"]["val_loss_t"] for r in evals])
        for j in range(bins.shape[1]):
            ax.plot([r["step"] for r in evals], bins[:, j], "o-", ms=3, color=plt.cm.viridis(j / (bins.shape[1] - 1)), label=f"t = {(j + 0.5) / bins.shape[1]:.2f}")
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(title="validation loss by noise level (t = 1 is noise)", xlabel="step", ylabel="mean squared velocity error", yscale="log")
    ax, n = axes[2], preview_clips(config)
    names = {"event_accuracy": f"event-set accuracy, n = {n}", "lsd_hf": f"LSD-HF at 2 kHz, n = {n}"}
    shown = next((x for x in names if evals and x in evals[-1]["eval"]), "val_loss")
    ax.plot([r["step"] for r in evals], [r["eval"][shown] for r in evals], "o-", color="C1", label=shown.replace("_", " "))
    for k, factor in enumerate(("recall", "order", "count", "pitch")):
        points = [(r["step"], r["eval"][factor]) for r in evals if r["eval"].get(factor) is not None]
        if points:
            ax.plot(*zip(*points), ".-", lw=0.8, color=f"{0.3 + 0.15 * k:.2f}", label=f"{factor} alone")
    ax.legend(fontsize=7)
    ax.set(title="quick metric on validation clips" + (", 12 integration steps" if shown in names else ""), xlabel="step", ylabel=names.get(shown, "validation loss"))
    if shown == "event_accuracy":
        ax.set_ylim(0, 1)


def _draw_regime(axes, config: dict, train: list[dict]) -> None:
    """D and r; lambda, mu and gradient agreement; p(t) over training."""
    column = lambda key: ([r["step"] for r in train if key in r], [r[key] for r in train if key in r])
    ax, first = axes[0], train[0]["step"]
    ax.set(title="where training is", xlabel="step (doublings)", xscale="log", xlim=(max(10, first), train[-1]["step"] + 1))
    if not column("r")[0]:
        ax.text(0.5, 0.5, "this run logged no regime", ha="center", transform=ax.transAxes)
        return
    shades = {"1.0": "C0", "0.9": "0.45", "0.7": "0.6", "0.5": "0.75"}
    for t, color in shades.items():
        points = [(r["step"], r["D_t"][t]) for r in train if t in r.get("D_t", {})]
        if points:
            ax.plot(*zip(*points), "o-" if t != "1.0" else "-", ms=3, color=color, label=f"D at t = {float(t):.1f}")
    if column("D_shuffled")[0]:
        ax.plot(*column("D_shuffled"), "x:", ms=4, color="C0", label="D at t = 1, conditions shuffled")
    ax.set_ylabel("discrepancy D" if column("D")[0] else "D: not measured by this recipe")
    other = ax.twinx()
    other.step(*column("r"), where="post", color="C3", lw=2)
    other.set(ylim=(-0.03, 1.03))
    other.set_ylabel("regime r (0 acquires, 1 refines)", color="C3")
    if any("no_signal" in r for r in train):
        ax.text(0.02, 0.3, "no significant slope: r follows the clock", fontsize=8, transform=ax.transAxes)
    if column("D")[0]:
        ax.set_ylim(-0.35, 1.05)                                   # room for the legend under the curves
        ax.legend(fontsize=7, loc="lower left", ncol=2)
    ax = axes[1]
    ax.plot(*column("lambda"), color="C2", label="lambda (guidance)")
    ax.plot(*column("mu"), color="C4", label="mu (structure)")
    ax.set(title="what r drives", xlabel="step", ylabel="loss weight", ylim=(-0.02, None))
    if column("agreement")[0]:
        other = ax.twinx()
        other.plot(*column("agreement"), "o-", ms=3, color="0.4")
        other.axhline(0, color="0.7", lw=0.7)
        other.set_ylabel("cosine of loss and guidance gradients (grey)")
    ax.legend(fontsize=8)
    ax, mid = axes[2], (torch.arange(100) + 0.5) / 100
    steps, m = column("m")
    image = ax.pcolormesh(steps, mid, np.stack([sampler.pdf(mid, x, config["t_std"]).numpy() for x in m], 1), shading="nearest", vmin=0)
    ax.set(title="density of training timesteps p(t)", xlabel="step", ylabel="t (1 is noise)")
    ax.figure.colorbar(image, ax=ax, label="p(t)")


def _draw_structure(fig, checks: list[dict]) -> None:
    """S and its groups at the first check, halfway, and the last."""
    axes = fig.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    if not checks:
        for ax in axes[1:]:
            ax.remove()
        axes[0].axis("off")
        axes[0].text(0, 0.5, "block structure: not watched by this recipe")
        return
    moments = [checks[0], checks[len(checks) // 2], checks[-1]]
    top = max(0.05, max(np.abs(np.array(c["structure"]["S"]) - np.eye(len(c["structure"]["S"]))).max() for c in moments))
    for ax, check in zip(axes, moments):
        s = check["structure"]
        S, order = np.array(s["S"]), np.argsort(s["groups"], kind="stable")
        S = np.where(np.eye(len(S)) > 0, np.nan, S)[np.ix_(order, order)]  # the diagonal is 1 and would hide the rest
        image = ax.imshow(S, vmin=-top, vmax=top, cmap="RdBu_r")
        for edge in np.flatnonzero(np.diff(np.array(s["groups"])[order])) + 0.5:
            ax.axhline(edge, color="k", lw=1.5)
            ax.axvline(edge, color="k", lw=1.5)
        ax.set(title=f"step {check['step']}: p = {s['p']:.3f}, {s['streak']} in a row", xlabel="block, by group", xticks=range(len(S)), yticks=range(len(S)),
               xticklabels=order + 1, yticklabels=order + 1)
    fig.colorbar(image, ax=axes[:3], label="similarity S of blocks", shrink=0.8)
    ax, steps = axes[3], [c["step"] for c in checks]
    ax.plot(steps, [c["structure"]["p"] for c in checks], "o-", ms=3, label="p of the grouping")
    ax.plot(steps, [c["structure"]["rand_index"] for c in checks], "s-", ms=3, color="0.6", label="agreement with the last one")
    ax.axhline(0.05, color="C3", lw=0.7)
    ax.set(title="have the blocks converged to groups?", xlabel="step", xscale="log")
    ax.legend(fontsize=8)


def _draw_previews(fig, path: Path, step: int) -> None:
    import scipy.io.wavfile
    captions = [line.split(": ", 1)[1] for line in (path / "samples" / "captions.txt").read_text(encoding="utf-8").split("\n")[:-1]]
    grid = fig.subplots(2, len(captions), sharex=True, sharey=True, squeeze=False)
    for row, (axes, who) in enumerate(zip(grid, ("real", "generated"))):
        for k, (ax, caption) in enumerate(zip(axes, captions)):
            name = f"step{step:06d}-{k}" if row else f"real-{k}"
            x = scipy.io.wavfile.read(path / "samples" / f"{name}.wav")[1].astype(np.float32) / 32_767
            image = draw_spectrogram(ax, x, f"model, step {step}" if row else caption)
            if row:
                ax.set_xlabel("time (s)", fontsize=8)
        axes[0].set_ylabel(f"{who}\nfrequency (kHz)", fontsize=8)
    fig.colorbar(image, ax=grid, label="dB re full scale", shrink=0.8)


# --------------------------------------------------------------------------------------------------------------------------
# Commands.

def check_out(path: Path) -> None:
    """Refuse, before any work, what can't be written as wav."""
    if path.suffix.lower() != ".wav" or path.is_dir():
        raise UserError(f"--out {path}: must name a .wav file")


def cmd_generate(a) -> None:
    check_out(a.out)
    run = load_run(a.run, a.device, a.trust_remote_code, a.allow_pickle)
    if run.config["task"] != "t2a":
        raise UserError(f"{a.run}: trained for super-resolution; use: python evaluate.py upsample {a.run} --input FILE")
    unknown = run.words.unknown(a.prompt)
    known = [w for w in run.words.split(a.prompt) if w not in unknown]
    if not known:
        raise UserError(f"--prompt {a.prompt!r}: this model knows none of these words; see: python evaluate.py sounds {a.run}")
    for w, near in unknown.items():
        print(f"note: unknown word {w!r} is left out" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    seconds = a.seconds or run.config["seconds"]
    if not 0.1 <= seconds <= 600:
        raise UserError(f"--seconds {seconds:g}: must be from 0.1 to 600")
    waves = generate(run, [a.prompt] * a.n, [a.seed + k for k in range(a.n)], tokens=max(run.tokens, run.codec.tokens(round(seconds * RATE))),
                     w=a.cfg, steps=a.steps, method=a.method)[:, : round(seconds * RATE)]
    judge = load_judge("dev") if run.config["data"] == "soundworld" else None
    for k, x in enumerate(waves):
        path = a.out if a.n == 1 else a.out.with_stem(f"{a.out.stem}-{k}")
        data.write_wav(path, x)
        d = describe(x)
        print(f"{path}: {len(x) / RATE:.2f} s, peak {d['peak']:.2f}, RMS {d['rms']:.3f}, centroid {d['centroid_hz']:.0f} Hz"
              + (f"; the judge hears: {', '.join(verdict(judge, x)) or 'nothing it knows'}" if judge else ""))


def cmd_upsample(a) -> None:
    check_out(a.out)
    run = load_run(a.run, a.device, a.trust_remote_code, a.allow_pickle)
    if run.config["task"] != "sr":
        raise UserError(f"{a.run}: trained for captions; use: python evaluate.py generate {a.run} --prompt ...")
    x = data.read_audio(a.input)
    cutoff = find_cutoff(x) if a.cutoff is None else a.cutoff
    if cutoff is None:
        raise UserError(f"{a.input}: no band limit found (nothing ends sharply below 8 kHz); name it with --cutoff HZ")
    if not 500 <= cutoff < RATE / 2:
        raise UserError(f"--cutoff {cutoff:.0f}: must be from 500 to 7999 Hz")
    y = upsample_long(run, x, cutoff, a.seed, a.steps)
    data.write_wav(a.out, y)
    above = lambda v: 10 * np.log10((10 ** log_power(v))[:, int(1_025 * 2 * min(cutoff + 500, 7_900) / RATE):].mean() + 1e-10)
    print(f"{a.out}: {len(y) / RATE:.2f} s at 16 kHz; band limit {cutoff:.0f} Hz ({'given' if a.cutoff else 'found'}); level 500 Hz above it and up {above(x):.0f} -> {above(y):.0f} dB")


def cmd_sounds(a) -> None:
    run = load_run(a.run)
    if run.words is None:
        raise UserError(f"{a.run}: trained for super-resolution; it takes no captions")
    if run.config["data"] == "soundworld":
        for family in data.FAMILIES:
            print(f"{family:12s} " + "; ".join(" | ".join(data.with_article(p.replace("~ ", "")) for p in s.one) for s in SOUNDS if s.family == family))
        print("how          low high (pitched sounds), near far distant, two three four; then, followed by, after, while, over, in the background")
    print(f"all {len(run.words.words)} words: {' '.join(run.words.words)}" if run.words.words else f"any words: captions are read by {run.config['text']}")


def cmd_score(a) -> None:
    if not 500 <= a.cutoff <= 7_250 or a.clips < 2:  # above that no mel band lies wholly over the cutoff
        raise UserError(f"--cutoff {a.cutoff} --clips {a.clips}: needs a cutoff from 500 to 7250 Hz and at least 2 clips")
    if bool(a.runs) == bool(a.codec):
        raise UserError("score: name runs, or a latent space with --codec mel|MODEL (and --data FOLDER)")
    if a.codec:
        result = score_codec({"codec": a.codec, "channels": a.channels, "data": a.data, "val_fold": a.val_fold, "seconds": data.CLIP_S}, a.clips,
                             device=pick_device(a.device), trust=a.trust_remote_code, pickles=a.allow_pickle)
        print(codec_table(result))
        if a.out:
            data.write_whole(a.out, json.dumps(result, indent=1) + "\n")
        return
    score([load_run(r, a.device, a.trust_remote_code, a.allow_pickle) for r in a.runs], a.clips, a.judge, a.split, a.cutoff, a.cfg, a.steps, a.out, a.clap, a.audio_model, a.trust_remote_code, a.allow_pickle,
          pick_device(a.device))


def cmd_export(a) -> None:
    """EMA weights in half precision, codec, vocabulary and config: everything `generate` and `upsample` need."""
    config, ckpt = load_checkpoint(Path(a.run))
    if has_checkpoint(a.folder) and "optimizer" in load_checkpoint(a.folder)[1]:
        raise UserError(f"{a.folder}: holds a run that can still be trained; export to another folder")
    a.folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "out": ""}  # the path is of this machine
    save_checkpoint(a.folder / "checkpoint.pt", step=ckpt["step"], ema={k: v.half() for k, v in ckpt["ema"].items()}, codec=ckpt["codec"], words=ckpt["words"], config=config)
    (a.folder / CHECKPOINTS[1]).unlink(missing_ok=True)  # of an export that stood here
    data.write_whole(a.folder / "config.json", json.dumps(config, indent=1) + "\n")
    print(f"{a.folder}: {(a.folder / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")


def cmd_probe_teacher(a) -> None:
    if not a.weights.is_file():
        raise UserError(f"--weights {a.weights}: no such file; make it with: python guidance.py pretrain")
    if a.esc10 and not a.esc10.is_dir():
        raise UserError(f"--esc10 {a.esc10}: no such folder")
    report = probe_teacher(guidance.load_teacher(a.weights), a.esc10)
    for name, rows in report.items():
        print(f"\n{name}, n {rows['n']}" + (" (accuracy, five folds)" if name == "esc10" else " (average precision of events)"))
        for k, v in rows.items():
            if k != "n":
                print(f"{k:34s} {v['mean']:+.3f}  [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]")
    if a.out:
        data.write_whole(a.out, json.dumps(report, indent=1) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True)
    positive = lambda kind: (lambda s: kind(s) if kind(s) > 0 else (_ for _ in ()).throw(argparse.ArgumentTypeError("must be positive")))
    c = sub.add_parser("generate", help="caption -> wav")
    c.add_argument("run")
    c.add_argument("--prompt", required=True)
    c.add_argument("--out", type=Path, default=Path("out.wav"))
    c.add_argument("--n", type=positive(int), default=1, help="how many, from seeds seed, seed + 1, ...")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--cfg", type=float, help="guidance scale w; 1 is plain conditional")
    c.add_argument("--steps", type=positive(int), help="integration steps")
    c.add_argument("--method", choices=("euler", "heun"), default="euler")
    c.add_argument("--seconds", type=positive(float))
    c.add_argument("--device", default="cpu")
    c.set_defaults(run_command=cmd_generate)
    c = sub.add_parser("upsample", help="muffled audio -> full band")
    c.add_argument("run")
    c.add_argument("--input", type=Path, required=True)
    c.add_argument("--out", type=Path, default=Path("clear.wav"))
    c.add_argument("--cutoff", type=float, help="Hz above which the input holds nothing; found by itself when left out")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--steps", type=positive(int))
    c.add_argument("--device", default="cpu")
    c.set_defaults(run_command=cmd_upsample)
    c = sub.add_parser("score", help="metrics with intervals")
    c.add_argument("runs", nargs="*")
    c.add_argument("--codec", metavar="mel|MODEL", help="no run, but the round trip through this latent space")
    c.add_argument("--channels", type=positive(int), default=64, help="with --codec: principal components kept")
    c.add_argument("--data", default="soundworld", help="with --codec: soundworld or a folder of recordings")
    c.add_argument("--val-fold", type=int, default=0, help="with --codec: the fold that is held out")
    c.add_argument("--clips", type=positive(int), default=500)
    c.add_argument("--judge", choices=("dev", "final"), default="dev")
    c.add_argument("--split", choices=("val", "test", "combos"), default="test")
    c.add_argument("--cutoff", type=int, default=2_000)
    c.add_argument("--cfg", type=float)
    c.add_argument("--steps", type=positive(int))
    c.add_argument("--device", default="cpu")
    c.add_argument("--out", type=Path, help="JSON")
    c.add_argument("--clap", default="", metavar="MODEL", help="a CLAP model, folder or hub id: CLAP score")
    c.add_argument("--audio-model", default="", metavar="MODEL", help="any audio model, folder or hub id: KID and Frechet distance in its space")
    c.set_defaults(run_command=cmd_score)
    c = sub.add_parser("sounds", help="what a model can be asked for")
    c.add_argument("run")
    c.set_defaults(run_command=cmd_sounds)
    c = sub.add_parser("export", help="small checkpoint for sharing")
    c.add_argument("run")
    c.add_argument("folder", type=Path)
    c.set_defaults(run_command=cmd_export)
    c = sub.add_parser("dashboard", help="draw dashboard.png again")
    c.add_argument("run", type=Path)
    c.set_defaults(run_command=lambda a: dashboard(a.run))
    c = sub.add_parser("train-judge", help="make a judge")
    c.add_argument("kind", choices=("dev", "final"))
    c.add_argument("--clips", type=positive(int), default=16_000)
    c.add_argument("--epochs", type=positive(int), default=8)
    c.set_defaults(run_command=lambda a: print(json.dumps(train_judge(a.kind, a.clips, a.epochs), indent=1)))
    c = sub.add_parser("probe-teacher", help="linear probe of the SSL teacher against its controls")
    c.add_argument("--weights", type=Path, default=guidance.WEIGHTS)
    c.add_argument("--esc10", type=Path, help="folder with file_name, category and fold in its metadata")
    c.add_argument("--out", type=Path, help="JSON")
    c.set_defaults(run_command=cmd_probe_teacher)
    for name in ("generate", "upsample", "score"):
        sub.choices[name].add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a pretrained part")
        sub.choices[name].add_argument("--allow-pickle", action="store_true", help="read pretrained weights that are not safetensors")
    args = p.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    run_cli(main)
