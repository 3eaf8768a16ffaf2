"""The learned decoder against Griffin-Lim: round trips of held-out clips through the same latents.

    python -m lab.score_decoder --out results/decoder.json                           # SoundWorld
    python -m lab.score_decoder --folder shared/esc10 --val-fold 5 --out decoder.json  # and recordings

For each decoder: how far the fine texture of its sound is from the clip's (metrics.fine_texture: crest,
roughness in time and in frequency; what mel frames can't say, and so the decoder's own), and the texture of
the mel frames, which it is given; log-spectral distance, where two draws of one noise are 0.79 apart; event
sets that the final judge finds; milliseconds a clip, in turns. Means over clips, 95 % intervals.

Public: compare, table.
"""
from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

import data
from lab.bench import in_turns
from lab.griffin_lim import decode_by_griffin_lim
from parts.arguments import Parser, new_json, whole
from parts.audio import CLIP_S, first_seconds
from parts.codec import Codec
from parts.config import NO_FOLD
from parts.errors import UserError, run_cli
from parts.files import to_json, write_text
from parts.judges import judge_clips, load_judge
from parts.metrics import event_match, fine_texture, log_power, lsd, mean_interval, texture
from parts.scoring import round_trip
from parts.soundworld import factor_table

AT_ONCE = 20  # clips in one call
METRICS = ("fine", "crest", "rough_time", "rough_frequency", "texture", "lsd", "event_set")


def _measure(real: np.ndarray, made: np.ndarray, hit) -> dict:
    """{metric: (n,)} of round trips (n, N). hit(made): is each clip's event set right? or None."""
    pairs = list(zip(real, made))
    fine = np.stack([np.abs(fine_texture(x) - fine_texture(y)).mean(1) for x, y in pairs])            # (n, 3)
    coarse = [np.sqrt(np.mean((texture(x) - texture(y)) ** 2)) for x, y in pairs]
    found = {
        "fine": fine.mean(1),
        "crest": fine[:, 0],
        "rough_time": fine[:, 1],
        "rough_frequency": fine[:, 2],
        "texture": np.array(coarse),
        "lsd": np.array([lsd(log_power(x), log_power(y))["lsd"] for x, y in pairs]),
    }
    return found | ({"event_set": hit(made).astype(float)} if hit else {})


def _event_sets(world):
    """-> hit(made (n, N)): (n,) bool, by the final judge."""
    judge = load_judge("final")

    def hit(made: np.ndarray) -> np.ndarray:
        presence = factor_table(world, len(made))["presence"]
        return event_match(presence, judge_clips(judge, made)["presence"])
    return hit


def compare(config: dict, clips: int, fitted_on: int = 2_000, rounds: int = 5) -> dict:
    """Settings of a data set -> {"data", "n", "rows", "ms"}: a row a decoder, and their difference.
    fitted_on: training clips that the latent space is fitted on."""
    train_set, test_set = data.open_set(config, "train", fitted_on), data.open_set(config, "test", clips)
    n = min(clips, len(test_set))
    fitting = (first_seconds(train_set.wave(i), CLIP_S) for i in range(min(fitted_on, len(train_set))))
    codec = Codec(config["channels"]).fit(fitting)
    real = np.stack([first_seconds(test_set.wave(i), CLIP_S) for i in range(n)])       # (n, N)
    decoders = {"Griffin-Lim": lambda z: decode_by_griffin_lim(codec, z),
                "learned": lambda z: codec.decode(z, seeds=list(range(len(z))))}
    hit = _event_sets(test_set) if config["data"] == "soundworld" else None
    found = {}
    for name, decode in decoders.items():
        made = round_trip(codec, real, decode, AT_ONCE)[:, : real.shape[1]]
        found[name] = _measure(real, made, hit)
    found["learned - Griffin-Lim"] = {name: found["learned"][name] - found["Griffin-Lim"][name]
                                      for name in found["learned"]}
    if hit:
        found["real"] = {"event_set": hit(real).astype(float)}
    rows = []
    for name, metrics in found.items():
        rows.append({"row": name} | {metric: {"mean": float(x.mean()), "interval": mean_interval(x)}
                                     for metric, x in metrics.items()})
    z = codec.encode(torch.from_numpy(real[:AT_ONCE]))
    seconds = in_turns({name: functools.partial(decode, z) for name, decode in decoders.items()}, rounds, 1)
    ms = {name: float(np.median(each)) / len(z) * 1_000 for name, each in seconds.items()}
    return {"data": config["data"], "n": n, "threads": torch.get_num_threads(), "ms": ms, "rows": rows}


def table(result: dict) -> str:
    lines = [f"round trips of {result['n']} held-out clips of {result['data']}, 95 % intervals over clips"]
    lines.append(f"{'':22s}" + "".join(f"{metric.replace('_', ' '):>24s}" for metric in METRICS))
    for row in result["rows"]:
        cells = []
        for metric in METRICS:
            found = row.get(metric)
            low, high = found["interval"] if found else (0, 0)
            cells.append(f"{found['mean']:8.3f} [{low:6.3f},{high:6.3f}]" if found else "-")
        lines.append(f"{row['row']:22s}" + "".join(f"{cell:>24s}" for cell in cells))
    ms = ", ".join(f"{name} {x:.0f}" for name, x in result["ms"].items())
    lines.append(f"milliseconds a clip, {result['threads']} threads: {ms}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.score_decoder")
    parser.add_argument("--clips", type=whole(2), default=200)
    parser.add_argument("--folder", default="", help="recordings besides")
    parser.add_argument("--val-fold", type=whole(), default=NO_FOLD, help="their fold that is held out")
    parser.add_argument("--out", type=new_json, help="JSON")
    args = parser.parse_args()
    if args.folder and not Path(args.folder).is_dir():             # before SoundWorld's minutes
        raise UserError(f"--folder {args.folder}: no such folder")
    results = []
    for name in filter(None, ("soundworld", args.folder)):
        config = {"data": name, "val_fold": args.val_fold, "seconds": CLIP_S, "channels": 64, "task": "t2a"}
        results.append(compare(config, args.clips))
        print(table(results[-1]), flush=True)
    if args.out:
        for result in results:
            result["data"] = Path(result["data"]).name             # not where it lies on this machine
        write_text(args.out, to_json(results, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
