"""Both axes of quality, for experiments: while a run is trained, and at its end.

    captions           semantic axis: event sets by a judge (higher is better); fidelity axis: energy score of
                       texture (lower is better). At guidance scale w = 1 besides a larger one, since a scale
                       above 1 buys event sets with variety
    super-resolution   energy score of the high band and LSD-HF (lower is better)

The previews of train.py are of fewer clips (super-resolution 16; captions 96 for event sets, 24 for texture),
since they only show how a run goes. Curves of an experiment are compared with one another. Comes in: a run
with its averaged weights (evaluate.Run), a data set. Goes out: dicts for the log and for rows.

Public: both_axes, final_axes, CLIPS, SAMPLED_TWICE, SCALES, FINAL.
"""
from __future__ import annotations

from evaluate import maker
from parts.background import at_once
from parts.previews import QUICK_STEPS, quick_metrics, write_previews
from parts.soundworld import SoundWorld

CLIPS = {"t2a": 96, "sr": 48}
SAMPLED_TWICE = 48            # captions: clips whose texture is compared
FINAL = 200                   # clips of final_axes, at most
SCALES = (1.0, 1.75, 2.5, 4.0)  # w that is chosen among
AT_W1 = ("event_accuracy", "recall", "texture_score")


def both_axes(run, val_set, background=at_once) -> dict:
    """In place of evaluate.preview: writes previews; -> metrics of parts/previews.quick_metrics at the run's
    w, and those of AT_W1 at w = 1."""
    write_previews(run, val_set, maker(run), background)
    task, device = run.config["task"], run.codec.mean.device
    clips = min(run.config["score_clips"], CLIPS[task])

    def at(w: float | None) -> dict:
        make = maker(run, QUICK_STEPS, w)
        return quick_metrics(run.config, val_set, make, clips, SAMPLED_TWICE, device)
    found = at(None)
    if task == "t2a" and found:
        plain = at(1.0)
        found |= {f"{name}_w1": plain[name] for name in AT_W1}
    return found


def final_axes(run) -> dict:
    """Of a finished run on captions of SoundWorld -> {"w": the scale of SCALES with the most event sets on
    validation clips (development judge), "by_w": {w: that share}, "w1", "tuned": quick_metrics of the split
    and by the judge of its final table at w = 1 and at that w}. {}: another kind of run."""
    config, device = run.config, run.codec.mean.device
    if config["task"] != "t2a" or config["data"] != "soundworld":
        return {}
    seconds, n = config["seconds"], min(config["score_clips"], FINAL)
    tuning = min(n, CLIPS["t2a"])
    # Where validation clips are what is reported, others of the same kind.
    val_set = SoundWorld("val", tuning, seed=int(config["score_split"] == "val"), seconds=seconds)
    by_w = {}
    for w in SCALES:
        found = quick_metrics(config, val_set, maker(run, QUICK_STEPS, w), tuning, 1, device)
        by_w[w] = found["event_accuracy"]
    tuned = max(by_w, key=by_w.get)
    unseen = SoundWorld(config["score_split"], n, seconds=seconds)
    at = {w: quick_metrics(config, unseen, maker(run, None, w), n, n, device, config["judge"])
          for w in {1.0, tuned}}
    return {"w": tuned, "by_w": {str(w): share for w, share in by_w.items()}, "w1": at[1.0],
            "tuned": at[tuned]}
