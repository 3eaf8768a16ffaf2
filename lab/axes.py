"""Both axes of quality on validation clips while a run of an experiment is trained.

    captions           semantic axis: event sets by the development judge (higher is better); fidelity axis:
                       energy score of texture (lower is better). At the run's guidance scale, and at w = 1
                       (names that end in _w1), since a scale above 1 buys event sets with variety
    super-resolution   energy score of the high band and LSD-HF (lower is better)

Of more clips than a run's own quick metrics: curves of an experiment are compared, those of a run are looked
at. Comes in: a run with its averaged weights (evaluate.Run), a validation set. Goes out: a
dict for the log.

Public: both_axes, CLIPS, SAMPLED_TWICE.
"""
from __future__ import annotations

from evaluate import maker
from parts.background import at_once
from parts.previews import quick_metrics, write_previews

CLIPS = {"t2a": 96, "sr": 48}
SAMPLED_TWICE = 48  # captions: clips whose texture is compared
STEPS = 12          # Euler steps, as in a run's own quick metrics
AT_W1 = ("event_accuracy", "recall", "texture_score")


def both_axes(run, val_set, background=at_once) -> dict:
    """In place of evaluate.preview: writes previews; -> metrics of parts/previews.quick_metrics, and those of
    AT_W1 at w = 1."""
    write_previews(run.path, run.step, run.config, val_set, maker(run), background)
    task, device = run.config["task"], run.codec.mean.device
    rounds = 32 if task == "sr" else 8                     # of Griffin-Lim

    def at(w: float | None) -> dict:
        make = maker(run, STEPS, rounds, w)
        return quick_metrics(run.config, val_set, make, CLIPS[task], SAMPLED_TWICE, device)
    found = at(None)
    if task == "t2a" and found:
        plain = at(1.0)
        found |= {f"{name}_w1": plain[name] for name in AT_W1}
    return found
