"""Is the SSL teacher better than its controls? A linear probe on its features says so.

    python -m lab.probe_teacher                                          # SoundWorld events
    python -m lab.probe_teacher --esc10 FOLDER --out results/teacher.json

Idea.  If a linear classifier on frozen features names what is in a clip, the features hold it. Each clip is
one vector, mean, deviation and maximum of the features over time; a logistic regression is fitted on some
clips and scored on others. The same is done with two controls:

    mel statistics          the log-mel frames themselves, pooled in the same way: no network
    random initialisation   the same network, not pretrained; mean over three initialisations

Scores are compared clip by clip, so that the interval is that of the paired gain (95 %).

    soundworld   average precision of the ranking of the 24 events; fitted on train, scored on val
    esc10        accuracy over the five official folds; FOLDER needs file_name, category and fold in its
                 metadata

Public: fit_linear, linear_probe, probe_teacher.
"""
from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from parts.arguments import Parser, new_json
from parts.audio_files import read_audio
from parts.caption_tables import find_metadata, read_rows
from parts.errors import UserError, run_cli
from parts.files import to_json, write_text
from parts.metrics import mean_interval
from parts.soundworld import SoundWorld, factor_table
from parts.spectra import log_mel
from parts.teacher import WEIGHTS, load_teacher, pool

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the logistic regression, to choose from


# --- linear probe ---------------------------------------------------------------------------------------


def fit_linear(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Logistic regression (L-BFGS): x (n, d) standardized; y (n,) classes or (n, K) in {0, 1} -> weights (d,
    K), bias (K,)."""
    several = y.ndim == 2  # labels of a clip, each there or not
    classes = y.shape[1] if several else int(y.max()) + 1
    weights = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    cross_entropy = F.binary_cross_entropy_with_logits if several else F.cross_entropy
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=80, line_search_fn="strong_wolfe")

    def loss_and_gradient() -> Tensor:
        # CE(x W + b, y) + penalty / 2 |W|^2
        optimizer.zero_grad()
        loss = cross_entropy(x @ weights + bias, y) + 0.5 * penalty * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_and_gradient)
    return weights.detach(), bias.detach()


def linear_probe(x: Tensor, y: Tensor, train: np.ndarray, inner: np.ndarray, test: np.ndarray,
                 score: Callable) -> np.ndarray:
    """Scores (n_test,) of a linear probe: its penalty chosen on `inner` after fitting on `train`, refitted on
    both. train, inner, test: boolean rows (n,). score(logits, y) -> (n,)."""

    def scores(fit: np.ndarray, on: np.ndarray, penalty: float) -> np.ndarray:
        mean = x[fit].mean(0)
        std = x[fit].std(0) + 1e-6
        weights, bias = fit_linear((x[fit] - mean) / std, y[fit], penalty)
        return score((x[on] - mean) / std @ weights + bias, y[on])

    best = max(PENALTIES, key=lambda penalty: scores(train, inner, penalty).mean())
    return scores(train | inner, test, best)


def correct(logits: Tensor, y: Tensor) -> np.ndarray:
    """(n, K), classes (n,) -> (n,): 1 where the largest logit is the class."""
    return (logits.argmax(1) == y).double().numpy()


def ranking(logits: Tensor, y: Tensor) -> np.ndarray:
    """Average precision of each clip's ranking of classes, (n, K), (n, K) in {0, 1} -> (n,): 1 where all that
    are present rank above all that are not."""
    order = (-logits).argsort(1)
    hit = y.gather(1, order).double()
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
    return ((precision * hit).sum(1) / hit.sum(1)).numpy()


# --- the two sets of clips ------------------------------------------------------------------------------


def probe_split(x: Tensor, y: Tensor, part: np.ndarray) -> np.ndarray:
    """Average precision of the clips of part 1, fitted on part 0, the penalty chosen on its last fifth."""
    train = part == 0
    inner = train & (np.arange(len(part)) >= 0.8 * train.sum())
    return linear_probe(x, y, train & ~inner, inner, part == 1, ranking)


def probe_folds(x: Tensor, y: Tensor, fold: np.ndarray) -> np.ndarray:
    """Accuracy (n,): each of the folds 1 to 5 is scored once, the penalty chosen on the next fold."""
    scores = np.zeros(len(y))
    for k in range(1, 6):
        test = fold == k
        inner = fold == k % 5 + 1
        scores[test] = linear_probe(x, y, ~test & ~inner, inner, test, correct)
    return scores


class ProbeSet(NamedTuple):
    """Clips and what is to be predicted of them; probe(x (n, d), targets, part) -> score of each clip that
    is scored."""
    waves: list[Tensor]  # (N,) each
    targets: Tensor      # (n,) classes or (n, K) in {0, 1}
    part: np.ndarray     # (n,): 0 train, 1 test, or the number of the fold
    probe: Callable


def soundworld_set(clips: int) -> ProbeSet:
    """Which events are there: three quarters of the clips from train, one from val."""
    train = SoundWorld("train", clips * 3 // 4).prepare()
    val = SoundWorld("val", clips // 4).prepare()
    waves = [torch.from_numpy(world.wave(i)) for world in (train, val) for i in range(len(world))]
    presence = [torch.from_numpy(factor_table(world)["presence"]) for world in (train, val)]
    part = np.r_[np.zeros(len(train)), np.ones(len(val))]
    return ProbeSet(waves, torch.cat(presence), part, probe_split)


def esc10_set(folder: Path) -> ProbeSet:
    """Which class it is, of recordings with official folds."""
    table, _ = find_metadata(folder, "train")
    if table is None:
        raise UserError(f"{folder}: no metadata.csv or metadata.jsonl; not the folder of ESC-10")
    rows = read_rows(table)
    classes = sorted({row["category"] for row in rows})
    waves = []
    for row in tqdm(rows, desc="reading", unit="clip"):
        waves.append(torch.from_numpy(read_audio(folder / row["file_name"])))
    targets = torch.tensor([classes.index(row["category"]) for row in rows])
    return ProbeSet(waves, targets, np.array([int(row["fold"]) for row in rows]), probe_folds)


# --- the comparison -------------------------------------------------------------------------------------


@torch.no_grad()
def pooled_features(net: nn.Module | None, waves: list[Tensor]) -> Tensor:
    """A row for each clip, (n, 3 F): pooled features of a network, or of the log-mel frames where it is
    None."""
    rows = []
    for wave in waves:
        frames = log_mel(wave[None])                               # (1, F, M)
        if net is not None:
            frames = net(frames[:, : frames.shape[1] // 2 * 2])    # whole tokens
        rows.append(pool(frames))
    return torch.cat(rows)


def probe_teacher(teacher: nn.Module, esc10: Path | None, clips: int = 3_000, inits: int = 3) -> dict:
    """Scores and paired gains over clips of the teacher against both controls (random: mean over `inits`
    initialisations) -> {set: {"n", row: {"mean", "interval"}}}.

    SoundWorld: which events (average precision of the ranking), fitted on train, scored on val, a quarter of
    the clips. ESC-10: accuracy over the five official folds, the penalty chosen on the next fold."""
    sets = {"soundworld": soundworld_set(clips)}
    if esc10:
        sets["esc10"] = esc10_set(esc10)

    untrained = []
    for seed in range(inits):
        torch.manual_seed(100 + seed)
        untrained.append(type(teacher)().eval())

    report = {}
    for name, (waves, targets, part, probe) in sets.items():
        # The score of each clip, by features.
        of_clips = {"mel statistics": probe(pooled_features(None, waves), targets, part)}
        of_random = [probe(pooled_features(net, waves), targets, part) for net in untrained]
        of_clips["random initialisation"] = np.mean(of_random, axis=0)
        of_clips["teacher"] = probe(pooled_features(teacher, waves), targets, part)
        report[name] = compare(of_clips)
    return report


def compare(of_clips: dict[str, np.ndarray]) -> dict:
    """Scores (n,) by features -> number of clips, mean and interval of each, and of the teacher's gains."""
    teacher = of_clips["teacher"]
    rows = {"n": len(teacher)}
    for name, scores in of_clips.items():
        rows[name] = {"mean": float(scores.mean()), "interval": mean_interval(scores)}
    for name, scores in of_clips.items():
        if name != "teacher":
            gain = teacher - scores
            rows[f"teacher - {name}"] = {"mean": float(gain.mean()), "interval": mean_interval(gain)}
    return rows


def print_report(report: dict) -> None:
    """A table for each set of clips."""
    for name, rows in report.items():
        metric = "accuracy, five folds" if name == "esc10" else "average precision of events"
        print(f"\n{name}, n {rows['n']} ({metric})")
        for row, value in rows.items():
            if row != "n":
                low, high = value["interval"]
                print(f"{row:34s} {value['mean']:+.3f}  [{low:+.3f}, {high:+.3f}]")


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.probe_teacher")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--esc10", type=Path, help="folder with file_name, category and fold in its metadata")
    parser.add_argument("--out", type=new_json, help="JSON")
    args = parser.parse_args()
    if not args.weights.is_file():
        raise UserError(f"--weights {args.weights}: no such file; "
                        f"make it with: python -m lab.pretrain_teacher --out {args.weights}")
    if args.esc10 and not args.esc10.is_dir():
        raise UserError(f"--esc10 {args.esc10}: no such folder")

    report = probe_teacher(load_teacher(args.weights), args.esc10)
    print_report(report)
    if args.out:
        write_text(args.out, to_json(report, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
