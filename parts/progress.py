"""What a run says while it goes on, in words.

Public: phase_line, skipped_line, MAX_SKIPPED.
"""
from __future__ import annotations

import math
from pathlib import Path

from parts.checkpoints import CHECKPOINTS
from parts.errors import UserError

MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run ends


def phase_line(r: float, lam: float, m: float, mu: float) -> str:
    """The mechanisms in words: r = 0.93 (refines), guidance off, ..."""
    guidance = f"at {lam:.2f}" if lam else "off"
    structure = f"at {mu:.3f}" if mu else "off"
    return (f"r = {r:.2f} ({'refines' if r >= 0.5 else 'acquires'}), guidance {guidance}, "
            f"sampler centre t = {1 / (1 + math.exp(-m)):.2f}, structure {structure}")


def skipped_line(folder: Path, step: int, clips: list[str], n: int) -> str:
    """The n-th step in a row whose gradient is not finite; UserError after MAX_SKIPPED of them."""
    if n == MAX_SKIPPED:
        raise UserError(f"step {step}: no finite gradient in {MAX_SKIPPED} steps; the clips are named in "
                        f"{folder / 'log.jsonl'}. If they are sound, a smaller --lr usually helps. The last "
                        f"good checkpoint is {folder / CHECKPOINTS[0]}")
    some = ", ".join(clips[:3]) + (" ..." if len(clips) > 3 else "")
    return f"step {step} is skipped: its loss or gradient is not finite; clips {some}"
