"""Rows of an experiment -> its table.

A row is what one run (arm x seed) measured at one evaluation: {"arm", "seed", "step", "seconds", qualities on
validation clips, "r", "D" where it was measured}; the last row of a run also holds "final", the metrics of
the final table. Rows are all that is needed here: the runs themselves may be gone.

Every arm is compared with its reference over the seeds that both have finished: difference of the final
metric (paired interval, sign-flip p, Holm's p over the arms that have as many seeds as any) and time to
quality on the learning curves of each axis. A table, or an arm, of fewer than 8 seeds is called descriptive.

Times in seconds are compared only where the runs of each seed were made on one machine with as many threads,
and measured "seconds": runs that other work disturbed keep theirs under another name, "seconds_apart".

Public: METRICS, curves, curve_metrics, final_metric, summarize, secondary_metrics, table, track, track_table.
"""
from __future__ import annotations

import numpy as np

from lab.questions import EXPERIMENTS, reference_of
from lab.statistics import (
    format_interval,
    format_ratio,
    holm,
    interval,
    paired,
    rate_correlation,
    smallest_p,
    speed_up,
)

METRICS = {  # measured while a run is trained, at its w -> (+1: higher is better, -1: lower; how it reads)
    "event_accuracy": (1, "event sets"),
    "event_accuracy_w1": (1, "event sets at w = 1"),
    "texture_score": (-1, "energy score of texture"),
    "texture_score_w1": (-1, "energy score of texture at w = 1"),
    "energy_score": (-1, "energy score of the high band"),
    "lsd_hf": (-1, "LSD-HF"),
    "val_loss": (-1, "validation loss, uniform t"),
}
# Learning curves and times to quality are of all of these that every run has, but of the loss only where
# there is nothing else.
CURVES = ("event_accuracy", "texture_score_w1", "energy_score", "lsd_hf", "val_loss")
FINAL = {  # the table is of the first of these that a run has, in its final scores, as in METRICS
    "exact": (1, "event-set accuracy"),
    "clap_score": (1, "CLAP score"),
    "energy_score": (-1, "energy score (lower is better)"),
    "kid_model": (-1, "KID in the audio model's space (lower is better)"),
    "kid": (-1, "KID in the judge's space (lower is better)"),
}
SECONDARY = ("kid", "event_kl", "lsd_hf", "val_loss")  # compared besides; lower is better in all of them
SEMANTIC = ("event_accuracy", "recall")                # E5: which events there are
DETAIL = ("count", "pitch", "order")                   # E5: how well those are made that are there


# --- what rows hold -----------------------------------------------------------------------------------------

def curves(rows: list[dict], arm: str, seeds: list[int], metric: str, clock: str = "step") -> dict:
    """{seed: (steps or seconds (n,), quality (n,))} of an arm's finished runs; quality is turned so that
    higher is better. clock: step | seconds."""
    out = {}
    for seed in seeds:
        mine = [r for r in rows if r["arm"] == arm and r["seed"] == seed]
        if mine:
            x = np.array([r[clock] for r in mine], float)
            y = np.array([r[metric] for r in mine], float)
            out[seed] = x, METRICS[metric][0] * y
    return out


def curve_metrics(rows: list[dict]) -> list[str]:
    """Metrics of CURVES that all rows have, the main one first; the loss only where they have no other."""
    found = [metric for metric in CURVES if rows and all(metric in row for row in rows)]
    return [metric for metric in found if metric != "val_loss"] or found


def final_metric(rows: list[dict]) -> tuple[str, int, str]:
    """(key in the final scores, +1 or -1, how it reads) of the first of FINAL that all runs have."""
    ends = [r["final"] for r in rows if "final" in r]
    key = next(k for k in FINAL if all(k in end for end in ends))
    return key, *FINAL[key]


# --- the table ----------------------------------------------------------------------------------------------

def _seconds_compare(rows: list[dict], arm: str, reference: str, seeds: list[int]) -> bool:
    """Are the seconds of both arms at hand, and for each seed of one machine and as many threads?"""
    made_on = {}  # seed -> {(machine, threads)}
    for r in rows:
        if r["arm"] in (arm, reference) and r["seed"] in seeds:
            if "seconds" not in r:
                return False
            made_on.setdefault(r["seed"], set()).add((r.get("machine"), r.get("threads")))
    return all(len(found) == 1 for found in made_on.values())


def _speed_ups(rows: list[dict], arm: str, reference: str, seeds: list[int]) -> dict:
    """How much sooner than its reference an arm reaches the same quality: {metric: {"step", "seconds"}}."""
    out = {}
    clocks = ["step", "seconds"] if _seconds_compare(rows, arm, reference, seeds) else ["step"]
    for metric in curve_metrics(rows):
        out[metric] = {}
        for clock in clocks:
            ref = curves(rows, reference, seeds, metric, clock)
            mine = curves(rows, arm, seeds, metric, clock)
            out[metric][clock] = speed_up([ref[s] for s in seeds], [mine[s] for s in seeds])
    return out


def summarize(rows: list[dict], arms: dict, reference: str) -> list[dict]:
    """One row an arm: final metric over seeds, paired difference from its reference with Holm's p, speed-up
    over it on each axis in steps and seconds ("sooner"). An arm without a finished run: {"arm", "n": 0}."""
    key, *_ = final_metric(rows)
    final = {arm: {} for arm in arms}  # arm -> {seed: final metric}
    for r in rows:
        if r["arm"] in final and "final" in r:
            final[r["arm"]][r["seed"]] = r["final"][key]
    out = []
    for arm, values in final.items():
        if not values:
            out.append({"arm": arm, "n": 0})
            continue
        mean, low, high = interval(list(values.values()))
        row = {"arm": arm, "n": len(values), "mean": mean, "interval": [low, high]}

        # Against the reference, over the seeds that both have.
        other = reference_of(arm, arms, reference)
        both = sorted(set(values) & set(final.get(other, {})))
        if both and arm != other:
            row["reference"] = other
            row["against"] = paired([values[s] for s in both], [final[other][s] for s in both])
            row["sooner"] = _speed_ups(rows, arm, other, both)
        out.append(row)

    # The more arms are tested, the smaller a p must be. An arm of fewer seeds is no part of the test: it may
    # be unable to reach any small p, and would only raise that of the others.
    compared = [row["against"] for row in out if "against" in row]
    most = max((against["n"] for against in compared), default=0)
    tested = [against for against in compared if against["n"] == most]
    for against, p in zip(tested, holm([against["p"] for against in tested])):
        against["holm_p"] = p
    return out


def secondary_metrics(rows: list[dict], arms: dict, seeds: list[int], reference: str) -> dict:
    """{arm: {metric: paired difference from its reference}} of what a finished run has besides the final
    metric: what one gains may cost another. A metric that any of the runs compared lacks is left out."""
    main, *_ = final_metric(rows)
    last = {}  # (arm, seed) -> {metric: value} at the end
    for r in rows:
        if "final" in r:
            last[r["arm"], r["seed"]] = {**r["final"], "val_loss": r.get("val_loss")}
    out = {}
    for arm in arms:
        other = reference_of(arm, arms, reference)
        both = [s for s in seeds if (arm, s) in last and (other, s) in last]
        if arm == other or not both:
            continue
        found = {}
        for metric in SECONDARY:
            mine = [last[arm, s].get(metric) for s in both]
            ref = [last[other, s].get(metric) for s in both]
            if metric != main and all(isinstance(value, float) for value in mine + ref):
                found[metric] = paired(mine, ref)
        if found:
            out[arm] = found
    return out


def _format_speed_up(found: dict) -> str:
    """A speed-up, and of how much of the range and how many seeds it is where that is not all."""
    if not found["n"]:
        return "never in reach (censored)"
    text = format_ratio(found)
    if found["shared"] < 0.95:
        text += f", over {100 * found['shared']:.0f} % of its range, {found['n']} of {found['of']} seeds"
    return text


def _format_arm(row: dict, width: int) -> str:
    """An arm's line of the table; row: of summarize."""
    if not row["n"]:
        return f"{row['arm']:{width}s} 0   no finished run"
    line = f"{row['arm']:{width}s} {row['n']}  {row['mean']:6.3f} "
    line += f"{format_interval(row['interval'], sign=False):16s}"
    if "against" in row:
        d = row["against"]
        line += f"  {d['difference']:+.3f} {format_interval(d['interval']):16s}"
        line += f"  {d['p']:.3f}   " + (f"{d['holm_p']:.3f}" if "holm_p" in d else "-, descriptive")
    return line


def _format_sooner(summary: list[dict], width: int) -> list[str]:
    """Times to quality of all arms that are compared, a line an arm and metric."""
    lines = []
    for row in summary:
        for metric, found in row.get("sooner", {}).items():
            steps = found["step"]
            line = f"{row['arm']:{width}s} {METRICS[metric][1]}: steps {_format_speed_up(steps)}"
            if "seconds" in found:
                line += f"; seconds {_format_speed_up(found['seconds'])}"
            median = f" {steps['at_end']:.2f}," if steps["at_end"] else ""
            line += f"; at the end{median} {steps['reach_end']} of {steps['of']} reach it"
            lines.append(line)
    if not lines:
        return []
    return ["", "sooner: the reference's time to a quality / the arm's, 95 %; above 1 the arm is faster",
            "at the end: the same in steps, to the quality where the reference ends; median over seeds where "
            "most reach it", *lines]


def _pairs_of_two_commits(rows: list[dict], summary: list[dict]) -> list[str]:
    """Of which arms how many runs are of another commit than the reference's of their seed."""
    commit = {(r["arm"], r["seed"]): r.get("commit") for r in rows}
    found = []
    for row in summary:
        pairs = [(commit[arm, seed], commit.get((row.get("reference"), seed))) for arm, seed in commit
                 if arm == row["arm"]]
        apart = sum(None not in pair and pair[0] != pair[1] for pair in pairs)
        if apart:
            found.append(f"{apart} of {row['against']['n']} of {row['arm']}")
    return found


def table(name: str, rows: list[dict], arms: dict, seeds: list[int], reference: str) -> str:
    """The experiment's table, ready to print."""
    *_, label = final_metric(rows)
    summary = summarize(rows, arms, reference)
    n = max(row["n"] for row in summary)
    width = max(26, *map(len, arms))

    # What is asked, of how many seeds, against which arm.
    question = EXPERIMENTS[name].question if name in EXPERIMENTS else ""
    asked = f"{n} of {len(seeds)}" if n < len(seeds) else f"{n}"
    basis = f"{label}, {asked} seed{'s' * (len(seeds) > 1)}"
    if n < 8:
        basis += " - DESCRIPTIVE: fewer than 8 seeds decide nothing"
    basis += f"; smallest p that {n} seeds can reach: {smallest_p(n):.2g}; differences from {reference!r}"
    if any(": " in arm for arm in arms):
        basis += " of the same setting"
    head = f"{'arm':{width}s} n   mean  95 % interval    difference, 95 %             p  Holm p"

    commits = sorted({r["commit"] for r in rows if "commit" in r})
    if len(commits) > 1:
        basis += f"\nrows of {len(commits)} commits, {', '.join(commits)}: subtract within a seed only"
        mixed = _pairs_of_two_commits(rows, summary)
        if mixed:
            basis += "; and there pairs are of two commits: " + ", ".join(mixed)
    lines = [f"{name}: {question}", basis, head]
    lines += [_format_arm(row, width) for row in summary]
    lines += _format_sooner(summary, width)

    # What an arm gains in the main metric it may lose in others.
    others = secondary_metrics(rows, arms, seeds, reference)
    if others:
        note = "lower is better in all of these; not adjusted for their number"
        lines += ["", f"also, as differences, 95 % ({note})"]
    for arm, found in others.items():
        differences = []
        for metric, d in found.items():
            differences.append(f"{metric} {d['difference']:+.3f} {format_interval(d['interval'])}")
        lines.append(f"{arm:{width}s} " + ", ".join(differences))
    return "\n".join(line.rstrip() for line in lines)


# --- E5: does D fall where quality rises? -------------------------------------------------------------------

def track(rows: list[dict]) -> dict:
    """E5: {quality: rate correlation with D} over finished runs, at the evaluations where every run has both.
    {} below 3 runs or 3 such evaluations."""
    runs = {}  # (arm, seed) -> {step: row}
    for r in rows:
        runs.setdefault((r["arm"], r["seed"]), {})[r["step"]] = r
    common = sorted(set.intersection(*map(set, runs.values())))
    out = {}
    for quality in (*SEMANTIC, *DETAIL):
        # A factor that was asked of no clip is None there.
        steps = []
        for k in common:
            if all(run[k].get(quality) is not None and "D" in run[k] for run in runs.values()):
                steps.append(k)
        if len(runs) < 3 or len(steps) < 3:
            continue
        compared = []
        for run in runs.values():
            D = np.array([run[k]["D"] for k in steps], float)
            values = np.array([run[k][quality] for k in steps], float)
            compared.append({"x": np.log2(steps), "D": D, "quality": values})
        out[quality] = rate_correlation(compared)
    return out


def track_table(found: dict) -> str:
    """What `track` found, as text."""
    if not found:
        return "E5: fewer than 3 finished runs, or fewer than 3 common evaluations"
    n = next(iter(found.values()))["runs"]
    unit = f"less the mean over the {n} runs at that step; the unit is the run (seeds of a setting are alike)"
    if n < 8:
        unit += " - DESCRIPTIVE: fewer than 8 runs decide nothing"
    what = "Correlation of the rate at which D falls with the rate at which a quality rises, per doubling,"
    head = f"{'':26s} correlation, 95 %          p   rates a run"
    lines = [f"E5: {EXPERIMENTS['E5'].question} {what}", unit, head]
    for quality, c in found.items():
        kind = "semantic" if quality in SEMANTIC else "detail"
        label = f"{quality.replace('_', ' ')} ({kind})"
        ends = format_interval(c["interval"])
        lines.append(f"{label:26s} {c['correlation']:+.3f} {ends:18s} {c['p']:.3f}   {c['points']}")
    return "\n".join(lines)
