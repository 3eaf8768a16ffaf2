"""What a run says while it goes on, in words.

Public: introduction, Phases, nonfinite_clips, skipped_line, MAX_SKIPPED.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from parts.checkpoints import CHECKPOINTS
from parts.devices import WORLD
from parts.errors import UserError

REFINES = 0.6      # r from which training is said to refine
MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run ends


def introduction(cfg, clips: int, model, testable: int) -> str:
    """What is about to be trained, on what, where. clips: how many; testable: blocks that it takes to tell
    groups from depth."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    where = cfg.device if WORLD == 1 else f"{WORLD} x {cfg.device}"
    compiled = ", compiled" if cfg.compile else ""
    said = (f"{cfg.task} on {cfg.data}: {clips} clips, {parameters:.2f} M parameters, recipe {cfg.recipe}, "
            f"{cfg.steps} steps of {cfg.batch} on {where} in {cfg.precision}{compiled}, run folder {cfg.out}")
    if cfg.structure == "adaptive" and cfg.depth < testable:
        said += (f"\nnote: groups among {cfg.depth} blocks can't be told from depth; the structure loss "
                 f"needs --depth {testable} or more")
    return said


class Phases:
    """What changes in the course of a run, each said once: r moves to and fro, and a line a crossing would
    say nothing. resumed: what holds at the first step was said before."""

    def __init__(self, cfg, resumed: bool = False):
        self.cfg, self.said, self.resumed = cfg, set(), resumed

    def reached(self, r: float, lam: float, share: float) -> list[str]:
        """What is reached for the first time, in words."""
        cfg = self.cfg
        if not cfg.adaptive:
            return []
        conditions = {
            "acquires semantics": r < REFINES and "refines detail" not in self.said,
            "refines detail": r >= REFINES,
            "guidance ends": cfg.guidance == "adaptive" and not lam,
            "the blocks have converged to groups: the structure loss sets in":
                cfg.structure == "adaptive" and share > 0,
        }
        new = [text for text, now in conditions.items() if now and text not in self.said]
        self.said.update(new)
        return new

    def new(self, k: int, r: float, lam: float, share: float) -> list[str]:
        """Lines for what is reached at step k for the first time."""
        new = self.reached(r, lam, share)
        if self.resumed:
            self.resumed = False
            return []
        return [f"step {k}: {text} (r = {r:.2f})" for text in new]


def nonfinite_clips(drawn: dict, train_set) -> list[str]:
    """Names of the clips of a batch that are not finite themselves, or of all of them; of all devices."""
    inputs = [torch.as_tensor(drawn[name]) for name in ("x0", "cond", "phi") if name in drawn]
    finite = np.all([torch.isfinite(x).all(2).all(1).cpu().numpy() for x in inputs], 0)
    broken = [train_set.name(int(i)) for i in drawn["i"][~finite]]
    everyone = [train_set.name(int(i)) for i in drawn["i"]]
    found = [(broken, everyone)] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, found[0])
    named = {name for names, _ in found for name in names}
    return sorted(named or {name for _, names in found for name in names})


def skipped_line(folder: Path, step: int, clips: list[str], n: int) -> str:
    """The n-th step in a row whose gradient is not finite; UserError after MAX_SKIPPED of them."""
    if n == MAX_SKIPPED:
        raise UserError(f"step {step}: no finite gradient in {MAX_SKIPPED} steps; the clips are named in "
                        f"{folder / 'log.jsonl'}. If they are sound, a smaller --lr usually helps. The last "
                        f"good checkpoint is {folder / CHECKPOINTS[0]}")
    some = ", ".join(clips[:3]) + (" ..." if len(clips) > 3 else "")
    return f"step {step} is skipped: its loss or gradient is not finite; clips {some}"
