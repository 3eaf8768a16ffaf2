"""Train the judges of parts/judges.py on SoundWorld's true factors, and say how good they are.

    python -m lab.train_judges dev --out assets/judge-dev.safetensors [--clips 16000 --epochs 8]
    python -m lab.train_judges final --out assets/judge-final.safetensors      # about 20 CPU minutes each

These are the shipped judges (half precision), whose reports are put into results/judges.json. The clips are
the split `judge`, which nothing else uses; a report is made on untouched clips: the split `test`, and the
split `combos`, whose pairs of sounds no caption model is trained on.

All targets are known exactly, since SoundWorld draws them: which events are there, their onsets, pitches and
counts. The four losses are summed with fixed weights (ASSUMED: 10, 0.5, 0.5, 0.3).

Public: train_judge, augment_mel, judge_report.
"""
from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from parts import judges
from parts.arguments import Parser, new_weights, whole
from parts.checkpoints import load_frozen, save_half
from parts.errors import run_cli
from parts.files import to_json, write_text
from parts.judges import Judge, judge_clips
from parts.metrics import event_match, wilson
from parts.soundworld import SoundWorld, factor_table

SEEDS = {"dev": 11, "final": 22}  # the judges differ in initial values and order of clips too
BATCH = 64  # clips a step
RATES = {"dev": 2e-3, "final": 1e-3}  # peak learning rates


def train_judge(kind: str, clips: int = 16_000, epochs: int = 8, seed: int = 0) -> Judge:
    """Train a judge on the split `judge`."""
    torch.manual_seed(SEEDS[kind] + seed)
    world = SoundWorld("judge", clips).prepare()
    judge = Judge(kind)

    # Features are computed once, the targets are the factors that the scenes were rendered from.
    mel = clip_features(judge, world)
    truth = {name: torch.from_numpy(values) for name, values in factor_table(world).items()}

    steps = epochs * (clips // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), RATES[kind], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[kind], total_steps=steps, pct_start=0.15)
    bar = tqdm(total=steps, desc=f"judge {kind}", unit="step")
    for _ in range(epochs):
        judge.train()
        # Each epoch is a new order of the clips; the last, smaller batch is left out.
        for rows in torch.randperm(clips)[: clips // BATCH * BATCH].split(BATCH):
            answers = judge.heads(augment_mel(mel[rows].float()))
            loss = judge_loss(answers, {name: values[rows] for name, values in truth.items()}, world.seconds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return judge


@torch.no_grad()
def clip_features(judge: Judge, world: SoundWorld, at_once: int = 256) -> Tensor:
    """Scaled log-mel of every clip of a split, (n, F, M) float16."""
    features = []
    for start in tqdm(range(0, len(world), at_once), desc="features"):
        waves = np.stack([world.wave(i) for i in range(start, min(len(world), start + at_once))])
        features.append(judge.features(torch.from_numpy(waves)).half())
    return torch.cat(features)


def judge_loss(answers: dict, truth: dict, seconds: float) -> Tensor:
    """10 BCE(presence) + 0.5 |onset| + 0.5 |pitch| + 0.3 CE(count), scalar. truth: see factor_table, (B, 24)
    each; onset, pitch and count are asked only of events that have them (the others are NaN)."""
    loss = F.binary_cross_entropy_with_logits(answers["presence"], truth["presence"]) * 10
    for name, target in (("onset", truth["onset"] / seconds), ("pitch", truth["pitch"])):
        known = ~target.isnan()
        loss = loss + 0.5 * (answers[name][known] - target[known]).abs().mean()
    known = ~truth["count"].isnan()
    counts = truth["count"][known].long() - 1                      # 1 to 4 events -> class 0 to 3
    return loss + 0.3 * F.cross_entropy(answers["count"][known], counts)


def augment_mel(x: Tensor) -> Tensor:
    """Level (+-6 dB), one masked band and one masked moment a clip: a judge must not depend on one cue. x
    (B, F, M), scaled."""
    clips, frames, bands = x.shape
    # +-0.69 nats are +-6 dB; 2.5 is the scale of Judge.features
    x = x + (torch.rand(clips, 1, 1) - 0.5) * 2 * 0.69 / 2.5
    band = _around_random_centre(clips, bands)                     # (B, M)
    time = _around_random_centre(clips, frames)                    # (B, F)
    silence = float((np.log(1e-2) + 3) / 2.5)
    return x.masked_fill(band[:, None, :] | time[:, :, None], silence)


def _around_random_centre(clips: int, length: int) -> Tensor:
    """(B, length) True around a random centre: up to three positions on either side, or nowhere."""
    distance = (torch.arange(length) - torch.randint(0, length, (clips, 1))).abs()
    return distance < torch.randint(0, 5, (clips, 1))


def record_report(kind: str, report: dict) -> None:
    """Put a shipped judge's report into results/judges.json."""
    path = judges.ASSETS.parent / "results" / "judges.json"
    reports = json.loads(path.read_text()) if path.exists() else {}
    write_text(path, to_json({**reports, kind: report}, indent=1) + "\n")


def judge_report(judge: Judge, n: int = 1_000) -> dict:
    """How often a judge names exactly the events of untouched clips (`exact`, with a 95 % interval and by
    number of events), and how well it tells count, sign of the pitch and onset. Splits: test, and combos
    (pairs of sounds that no caption model is trained on)."""
    report = {}
    for split in ("test", "combos"):
        world = SoundWorld(split, n).prepare()
        truth = factor_table(world)
        predicted = judge_clips(judge, (world.wave(i) for i in range(n)))
        hit = event_match(truth["presence"], predicted["presence"])  # (n,)
        size = truth["presence"].sum(1)                            # (n,): events of each clip

        # Count is asked of countable events, the sign of the pitch of clearly low or high ones.
        countable = ~np.isnan(truth["count"])
        pitched = np.abs(np.nan_to_num(truth["pitch"])) >= 0.5
        count_right = predicted["count"].argmax(-1) + 1 == truth["count"]
        sign_right = np.sign(predicted["pitch"]) == np.sign(truth["pitch"])
        report[split] = {
            "n": n,
            "exact": float(hit.mean()),
            "interval": wilson(hit.sum(), n),
            "by_events": {k: float(hit[size == k].mean()) for k in (1, 2, 3) if (size == k).any()},
            "count": float(count_right[countable].mean()),
            "pitch_sign": float(sign_right[pitched].mean()),
            "onset_mae_s": float(np.nanmean(np.abs(predicted["onset"] * world.seconds - truth["onset"]))),
        }
    return report


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.train_judges")
    parser.add_argument("kind", choices=("dev", "final"))
    parser.add_argument("--clips", type=whole(BATCH), default=16_000)
    parser.add_argument("--epochs", type=whole(1), default=8)
    parser.add_argument("--seed", type=whole(), default=0)
    parser.add_argument("--out", type=new_weights, required=True)
    args = parser.parse_args()
    save_half(train_judge(args.kind, args.clips, args.epochs, seed=args.seed), args.out)

    # The report is of what was saved, in half precision.
    judge = load_frozen(Judge(args.kind), args.out)
    report = {"judge": args.kind, **judge_report(judge), "clips": args.clips, "epochs": args.epochs,
              "seed": args.seed}
    if args.out.resolve() == judges.weights_of(args.kind).resolve():
        record_report(args.kind, report)
    print(to_json(report, indent=1))


if __name__ == "__main__":
    run_cli(main)
