"""Judges: classifiers that detect what is in a clip, trained on SoundWorld's true factors (lab/train_judges).

A caption model is scored by whether the events that its caption names can be detected in its sound. Two
judges of different architecture, seed and front end do that, so that a model tuned under one (`dev`) is
reported under the other (`final`). Neither is ever used in training.

    wav (B, N) -> log-mel of the judge's own front end -> trunk: features over time
               -> linear heads, one set for each of the 24 sound classes

A judge answers, for each class: is it present, when does it start, how high is its pitch, how often does it
sound. Its last common features are the space in which KID compares generated with real clips.

Waveforms are float32 in [-1, 1] at 16 kHz; judges were trained on clips of 2.56 s.

Public: ASSETS, ConvJudge, AttentionJudge, Judge, weights_of, load_judge, judge_clips, judged_events.
"""
from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from parts.audio import CLIP_S, RATE, first_seconds
from parts.checkpoints import load_frozen
from parts.errors import UserError
from parts.soundworld import NAMES, SOUNDS
from parts.spectra import log_mel

ASSETS = Path(__file__).resolve().parents[1] / "assets"  # shipped weights: judge-KIND.safetensors


def _conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """3 x 3 convolution, then half the frames and half the bands."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class ConvJudge(nn.Module):
    """Trunk of the development judge: a 2D convolutional network on 64 mel bands."""

    front = dict(n_fft=1_024, hop=320, n_mels=64)  # arguments of log_mel
    width = 128

    def __init__(self):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(1, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        blocks = nn.Sequential(stem, _conv_block(24, 40), _conv_block(40, 80), _conv_block(80, 128))
        self.net = blocks.to(memory_format=torch.channels_last)

    def forward(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (B, F, 64) -> features over time (B, F / 16, 128)."""
        h = self.net(mel[:, None])                                 # (B, 128, F / 16, 4)
        return (h.mean(-1) + h.amax(-1)).mT                        # (B, F / 16, 128)


class AttentionJudge(nn.Module):
    """Trunk of the final judge: a transformer on time-frequency patches of 80 mel bands with a finer time
    step."""

    front = dict(n_fft=800, hop=256, n_mels=80)  # arguments of log_mel
    width = 112

    def __init__(self):
        super().__init__()
        self.patch = nn.Sequential(
            nn.Conv2d(1, 32, (5, 5), (2, 2), padding=2),
            nn.GELU(),
            nn.Conv2d(32, 16, 3, (2, 2), padding=1),
            nn.GELU(),
        )
        self.embed = nn.Linear(16 * 20, self.width)
        self.pos = nn.Parameter(0.02 * torch.randn(512, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, 4, 3 * self.width, dropout=0.05, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def forward(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (B, F, 80) -> features over time (B, F / 4, 112)."""
        patches = self.patch(mel[:, None])                         # (B, 16, F / 4, 20)
        h = self.embed(rearrange(patches, "b c t f -> b t (c f)"))  # (B, F / 4, 112)
        return self.layers(h + self.pos[: h.shape[1]])


class Judge(nn.Module):
    """A trunk and one set of linear heads for each sound class. kind: `dev` or `final`.

    __call__(wav (B, N)) -> dict of presence logits (B, 24), onset in [0, 1] of the clip (B, 24), pitch in
    [-1, 1] (B, 24), count logits (B, 24, 4) for one to four, and embedding (B, 128), the input of the heads,
    used by KID."""

    kinds = {"dev": ConvJudge, "final": AttentionJudge}

    def __init__(self, kind: str):
        super().__init__()
        self.trunk = self.kinds[kind]()
        width = self.trunk.width
        classes = len(SOUNDS)
        self.embed = nn.Sequential(nn.Linear(2 * width, 128), nn.ReLU())
        self.presence = nn.Linear(128, classes)
        self.pitch = nn.Linear(128, classes)
        self.count = nn.Linear(128, 4 * classes)
        self.when = nn.Linear(width, classes)

    def features(self, wav: Tensor) -> Tensor:
        """(B, N) -> log-mel of the trunk's front end (B, F, M), scaled to order one."""
        return (log_mel(wav, **self.trunk.front) + 3) / 2.5

    def heads(self, mel: Tensor) -> dict:
        """Scaled log-mel (B, F, M) -> what __call__ returns."""
        h = self.trunk(mel)                                        # (B, T', width)
        embedding = self.embed(torch.cat([h.mean(1), h.amax(1)], -1))  # (B, 128)

        # Onset: the mean time under a distribution over frames, one for each class.
        times = torch.linspace(0, 1, h.shape[1], device=h.device)  # (T',) as a share of the clip
        onset = torch.einsum("btk,t->bk", self.when(h).softmax(1), times)
        return {
            "presence": self.presence(embedding),                  # (B, 24)
            "onset": onset,                                        # (B, 24)
            "pitch": self.pitch(embedding),                        # (B, 24)
            "count": rearrange(self.count(embedding), "b (k n) -> b k n", n=4),  # (B, 24, 4)
            "embedding": embedding,
        }

    def forward(self, wav: Tensor) -> dict:
        return self.heads(self.features(wav))


def weights_of(kind: str) -> Path:
    """The file of a shipped judge."""
    return ASSETS / f"judge-{kind}.safetensors"


def load_judge(kind: str) -> Judge:
    """The shipped judge `dev` or `final`, frozen, float32, eval mode. UserError where its weights are
    missing."""
    path = weights_of(kind)
    if not path.is_file():
        raise UserError(f"{path}: missing; make it with: python -m lab.train_judges {kind} --out {path}")
    return load_frozen(Judge(kind), path)


@torch.no_grad()
def judge_clips(judge: Judge, waves, batch: int = 64) -> dict:
    """Judge an iterable of equally long (N,) waveforms, where the judge is -> dict of numpy arrays, a row for
    each clip (see Judge)."""
    waves, device = list(waves), judge.presence.weight.device
    answers = []
    for i in range(0, len(waves), batch):
        answers.append(judge(torch.as_tensor(np.stack(waves[i : i + batch])).to(device)))
    return {name: torch.cat([answer[name] for answer in answers]).cpu().numpy() for name in answers[0]}


def judged_events(judge: Judge, x: np.ndarray) -> list[tuple[str, float]]:
    """Events that a judge detects in (N,), as (name, onset in s), in order of onset.

    Judged on windows of 2.56 s, its training length, of which the last ends where the clip does: an onset is
    that in the first window in which the event is detected. It is an estimate, off by 0.1 s on average in
    SoundWorld (results/judges.json)."""
    n = round(CLIP_S * RATE)
    starts = sorted({*range(0, len(x) - n + 1, n), max(0, len(x) - n)})
    windows = [first_seconds(x[start:], CLIP_S) for start in starts]
    answers = judge_clips(judge, windows)
    found = answers["presence"] > 0                                # (windows, 24)
    events = []
    for k in np.flatnonzero(found.any(0)):
        first = int(found[:, k].argmax())
        onset_s = starts[first] / RATE + CLIP_S * float(answers["onset"][first, k])
        events.append((NAMES[k], onset_s))
    return sorted(events, key=itemgetter(1))
