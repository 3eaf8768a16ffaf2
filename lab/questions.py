"""The questions put to the paper: each an experiment, a list of arms with their controls.

An arm is a name and what it sets of train.py's settings. Each experiment has a reference, one of its arms,
from which differences are taken. Everything that is not set here (steps, clips, seeds, task) is
the same for all arms of an experiment and comes from the command line (lab/experiments.py).

Five sources of r are not train.py's own; the runner makes them, as a file that is replayed (lab/runner.py):
`ramp:SHARE` rises linearly and reaches 1 after that share of the steps; `warped:ARM` is the r of that arm,
same seed, at a randomly warped time; `permuted:ARM` its values in random order, `reversed:ARM` backwards: if
these do as well, it is not staging that helps; `yoked:ARM` is the r of that arm under another seed.

E2 asks for structure. Fewer than six blocks can't be told to have groups (structure_reg.py): its runs
have eight, narrow ones (DEEP).

Public: Experiment, EXPERIMENTS, HOME, CLOCK, DEEP, reference_of.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass, field

HOME = "home"       # E7: the setting that a frozen clock was tuned in
CLOCK = "clock to"  # E7: how the name of an arm begins whose r reaches 1 after that share of the steps
# Every table compares times to quality, and a rate that falls punishes who crosses the reference early.
CONSTANT_RATE = {"cool": 0.0}
DEEP = {**CONSTANT_RATE, "depth": 8, "width": 96, "heads": 4}  # where structure is asked for


@dataclass(frozen=True)
class Experiment:
    """question; arms {name: train.py options}; reference: the arm that differences are taken from; base:
    options of all arms. An arm named "SETTING: NAME" is compared with "SETTING: REFERENCE"."""
    question: str
    arms: dict
    reference: str
    base: dict = field(default_factory=CONSTANT_RATE.copy)


def reference_of(arm: str, arms, reference: str) -> str | None:
    """The arm that `arm` is compared with: `reference`, in its own setting where it has one. None: neither
    is there."""
    setting, colon, _ = arm.rpartition(": ")
    own = setting + colon + reference
    if own in arms:
        return own
    return reference if reference in arms else None


def _recipes(*names: str) -> dict:
    return {name: {"recipe": name} for name in names}


def _sets_of_mechanisms() -> dict:
    """All eight: each mechanism follows r or is off (the timesteps: constant). And three losses on the
    blocks that know nothing of r, beside no other mechanism."""
    mechanisms = ("guidance", "timesteps", "structure")
    none = {"recipe": "stage", "guidance": "off", "timesteps": "constant", "structure": "off"}
    arms = {}
    for mask in itertools.product((False, True), repeat=3):
        adaptive = [name for name, on in zip(mechanisms, mask) if on]
        arms["+".join(adaptive) or "none"] = {**none, **dict.fromkeys(adaptive, "adaptive")}
    losses = {"groups by depth": "grouped", "dispersive": "dispersive", "diversity": "diversity"}
    for name, loss in losses.items():
        arms[name] = {**none, "structure": "constant", "struct_loss": loss}
    return arms


def _rates_and_widths() -> dict:
    """Runs that learn at different speeds."""
    arms = {}
    for factor, width in itertools.product((0.25, 1.0, 2.0), (64, 128)):
        rates = {"lr": 2e-3 * factor, "muon_lr": 5e-3 * factor}
        arms[f"lr x {factor:g}, width {width}"] = {**rates, "width": width}
    return arms


def _settings_and_clocks() -> dict:
    """In every setting: the measured r, the static baseline, and clocks of four speeds."""
    settings = {
        HOME: {},
        "half the rate": {"lr": 1e-3, "muon_lr": 2.5e-3},
        "half the width": {"width": 64},
        "batch 16": {"batch": 16},
        "fewer clips": {"clips": 1_500},
    }
    ways = _recipes("stage", "static")
    for share in (0.25, 0.5, 1.0, 2.0):
        ways[f"{CLOCK} {share:g} K"] = {"recipe": "stage", "regime": f"ramp:{share:g}"}
    arms = {}
    for setting, options in settings.items():
        for name, way in ways.items():
            arms[f"{setting}: {name}"] = {**options, **way}
    return arms


def _densities() -> dict:
    """Constant densities of timesteps: centres m from the plain one to nearly noise, two widths s."""
    arms = {}
    for s, m in itertools.product((1.0, 2.0), (0.0, 0.75, 1.5, 2.0)):
        arms[f"m {m:g}, s {s:g}"] = {"recipe": "static", "m": m, "s": s}
    return arms


EXPERIMENTS = {
    "E1": Experiment("Does stage-aware training beat the static baseline?", {
        **_recipes("vanilla", "static", "stop", "clock", "stage"),
        "permuted": {"recipe": "stage", "regime": "permuted:stage"},
    }, "static"),
    "E2": Experiment("Which mechanism helps, and do they add up?", _sets_of_mechanisms(), "none", DEEP),
    "E3": Experiment("Is it the regime's slope, or would any r do?", {
        "slope": {"recipe": "stage"},
        "loss": {"recipe": "stage", "regime": "loss"},
        "agreement": {"recipe": "stage", "regime": "agreement"},
        "clock": {"recipe": "clock"},
        "random": {"recipe": "stage", "regime": "warped:slope"},
        "permuted": {"recipe": "stage", "regime": "permuted:slope"},
        "reversed": {"recipe": "stage", "regime": "reversed:slope"},
        "yoked": {"recipe": "stage", "regime": "yoked:slope"},
        "latent proxy": {"recipe": "stage", "regime_signal": "latent"},
    }, "clock"),
    "E4": Experiment("Does it need this teacher?", {
        "tiny": {"recipe": "static"},
        "random": {"recipe": "static", "teacher": "random"},
        "shuffled": {"recipe": "static", "teacher": "shuffled"},
        "none": {"recipe": "static", "guidance": "off"},
    }, "none"),
    # No guidance in E5: it would optimise the very features that D is measured in.
    "E5": Experiment("Does r track semantic progress?", _rates_and_widths(), "lr x 1, width 128",
                     {**CONSTANT_RATE, "recipe": "static", "guidance": "off", "probe": "always"}),
    "E6": Experiment("How much sooner is a quality reached?", _recipes("vanilla", "static", "stage"),
                     "static"),
    "E7": Experiment("Does it transfer where a frozen clock does not?", _settings_and_clocks(), "stage"),
    "E8": Experiment("Do other people's adaptive samplers do better?",
                     _recipes("static", "stage", "infonoise", "curriculum"), "static"),
    # Were the best constant density the same at all steps, no schedule of it could win.
    "E9": Experiment("Does the best density of timesteps change with the steps?", _densities(), "m 1.5, s 1",
                     {**CONSTANT_RATE, "eval_every": 0}),
}
