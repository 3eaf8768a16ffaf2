"""The questions put to the paper: arms with their controls, seeds, statistics, tables.

    python experiments.py list                                         # the experiments and their arms
    python experiments.py run E1 --seeds 8 --out results/e1            # runs what is missing, prints the table, draws the figure
    python experiments.py run E1 --dry-run                             # arms and hours, before anyone waits
    python experiments.py run E1 --arm 'mine={"lambda0": 1.0}'         # your own arm beside them (or --arms FILE.json)
    python experiments.py table results/e1                             # the table again, from the rows on disk
    python experiments.py report runs/a runs/b --out report.html       # one file to look at and listen to

An experiment is a list of arms: name -> options of train.py. All arms of one seed see the same data, steps, initial weights, batches
and evaluation noise. Every arm x seed is an ordinary run folder made by train.train, so it can be resumed, listened to and scored like
any other; a finished one is not run again, nor one that another experiment beside this one has made. Rows go to rows.jsonl, one an arm x seed x evaluation.

Intervals are Student's t over seeds, of paired differences; fewer than 8 seeds are labelled descriptive. p-values are exact sign-flip
tests; the smallest p that n seeds can reach (2 / 2^n) is printed. "Time to quality" compares isotonic fits over all of the quality that
both arms reach, because the first passage of a noisy curve makes an arm faster than itself.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from tqdm import tqdm

import config
import data
import evaluate
import regime
import train
from data import UserError, parallel_map, run_cli

ROOT = Path(__file__).resolve().parent


# --- the questions ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """question; arms {name: train.py options}; reference: the arm that differences are taken from; base: options of all arms.

    An arm named "SETTING: NAME" is compared with "SETTING: REFERENCE"."""
    question: str
    arms: dict
    reference: str
    base: dict = field(default_factory=dict)


HOME, CLOCK = "home", "clock to"  # E7: the setting that a frozen clock was tuned in; the name of an arm whose r reaches 1 after that share of K
_MECHANISMS = ("guidance", "timesteps", "structure")
_RUNS_OF_E5 = {f"lr x {a:g}, width {w}": {"lr": 2e-3 * a, "muon_lr": 5e-3 * a, "width": w} for a in (0.25, 1.0, 2.0) for w in (64, 128)}
EXPERIMENTS = {
    "E1": Experiment("Does stage-aware training beat the static baseline?", {name: {"recipe": name} for name in config.RECIPES}, "static"),
    "E2": Experiment("Which mechanism helps, and do they add up?",
                     {"+".join(n for n, on in zip(_MECHANISMS, mask) if on) or "none":
                      {"recipe": "stage", **{n: "adaptive" if on else "constant" if n == "timesteps" else "off" for n, on in zip(_MECHANISMS, mask)}}
                      for mask in itertools.product((0, 1), repeat=3)}, "none"),
    "E3": Experiment("Is it the regime's slope, or would any r do?",
                     {"slope": {"recipe": "stage"}, "loss": {"recipe": "stage", "regime": "loss"}, "clock": {"recipe": "clock"},
                      "random": {"recipe": "stage", "regime": "warped:slope"}, "yoked": {"recipe": "stage", "regime": "yoked:slope"},
                      "latent proxy": {"recipe": "stage", "signal": "latent"}}, "clock"),
    "E4": Experiment("Does it need this teacher?", {"tiny": {"recipe": "static"}, "random": {"recipe": "static", "teacher": "random"},
                                                    "shuffled": {"recipe": "static", "teacher": "shuffled"}, "none": {"recipe": "static", "guidance": "off"}}, "none"),
    "E5": Experiment("Does r track semantic progress?", _RUNS_OF_E5, "lr x 1, width 128",
                     {"recipe": "static", "guidance": "off", "probe": "always"}),  # no guidance: it would optimise the very phi that D reads
    "E6": Experiment("How much sooner is a quality reached?", {name: {"recipe": name} for name in ("vanilla", "static", "stage")}, "static"),
    "E7": Experiment("Does it transfer where a frozen clock does not?",
                     {f"{setting}: {name}": {**options, **how} for setting, options in
                      {HOME: {}, "half the rate": {"lr": 1e-3, "muon_lr": 2.5e-3}, "half the width": {"width": 64}, "batch 16": {"batch": 16}, "fewer clips": {"clips": 1_500}}.items()
                      for name, how in {"stage": {"recipe": "stage"}, "static": {"recipe": "static"},
                                        **{f"{CLOCK} {c:g} K": {"recipe": "stage", "regime": f"ramp:{c:g}"} for c in (0.25, 0.5, 1.0, 2.0)}}.items()}, "stage"),
}
QUALITY = {"event_accuracy": 1, "lsd_hf": -1, "val_loss": -1}  # curves are of the first that a run has -> which way is better


# --- statistics: pure functions -----------------------------------------------------------------------------------------------

def interval(x) -> tuple[float, float, float]:
    """Mean and 95 % Student-t interval of x (n,); all equal: no width; n = 1: NaN ends."""
    return (float(np.mean(x)), *evaluate.mean_interval(x))


@functools.lru_cache
def _signs(n: int) -> np.ndarray:
    """All 2^n sign patterns up to n = 16, else 100,000 random ones and the observed one."""
    if n <= 16:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    return np.concatenate([np.ones((1, n)), np.random.default_rng(0).choice((1.0, -1.0), (100_000, n))])


def sign_flip(d) -> tuple[float, float]:
    """Two-sided sign-flip permutation test of paired differences d (n,) -> (p, smallest p that n can reach). All zero: p = 1."""
    d = np.asarray(d, float)
    return float(np.mean(np.abs(_signs(len(d)) @ d) >= abs(d.sum()) - 1e-12)), max(2 / 2 ** len(d), 1e-5)


def holm(ps) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order, out, worst = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[k]))
        out[k] = float(worst)
    return out


def paired(a, b) -> dict:
    """Arm a against arm b over the same seeds: mean difference, interval, p, and the smallest p there is at this n."""
    d = np.asarray(a, float) - np.asarray(b, float)
    mean, lo, hi = interval(d)
    p, least = sign_flip(d)
    return {"difference": mean, "interval": [lo, hi], "p": p, "least_p": least, "n": len(d)}


def isotonic(y) -> np.ndarray:
    """Least-squares non-decreasing fit of a curve (n,)."""
    return scipy.optimize.isotonic_regression(np.asarray(y, float)).x


def passage(x, y, q: np.ndarray) -> np.ndarray:
    """log x at which the isotonic fit of the curve (x, y) reaches each q, linear in log x between points."""
    fit, lx = isotonic(y), np.log(np.asarray(x, float))
    first = np.concatenate([[True], np.diff(fit) > 1e-12])          # the start of each level: a plateau is reached when it begins
    return np.interp(q, fit[first], lx[first])


def time_to_quality(x_ref, ref, x_arm, arm, grid: int = 20) -> tuple[float, float]:
    """One seed's log(T_ref(q) / T_arm(q)), averaged over the quality that both fits reach, and the share of the reference's range that
    this is (the rest is censored). > 0: the arm is sooner. NaN where they share no range. Antisymmetric in its arguments.

    x: steps or seconds, y: quality (higher is better), (n,) each."""
    a, b = isotonic(ref), isotonic(arm)
    lo, hi = max(a[0], b[0]), min(a[-1], b[-1])
    if hi <= lo:
        return float("nan"), 0.0
    q = np.linspace(lo, hi, grid + 2)[1:-1]
    return float(np.mean(passage(x_ref, ref, q) - passage(x_arm, arm, q))), float((hi - lo) / max(a[-1] - a[0], 1e-12))


def speed_up(curves_ref: list[tuple], curves_arm: list[tuple]) -> dict:
    """T_ref / T_arm over seeds, curves as (x, y): geometric mean with a t interval of the log ratios, and the share of quality compared."""
    logs, shares = zip(*(time_to_quality(*r, *a) for r, a in zip(curves_ref, curves_arm)))
    logs, known = np.array(logs), ~np.isnan(logs)
    if known.sum() == 0:
        return {"ratio": float("nan"), "interval": [float("nan")] * 2, "n": 0, "of": len(logs), "shared": 0.0}
    mean, lo, hi = interval(logs[known])
    return {"ratio": float(np.exp(mean)), "interval": [float(np.exp(lo)), float(np.exp(hi))], "n": int(known.sum()), "of": len(logs), "shared": float(np.mean(shares))}


def rate_correlation(runs: list[dict]) -> dict:
    """Do runs learn semantics where D falls? Each run {x: log2 step, D, quality} (n,), the same x. Rates between neighbouring points,
    less their mean over runs at that point (two trends always correlate: what is left is which run is ahead *there*), correlated over
    all runs and points. The unit is the run: interval by the jackknife over runs (Fisher z), p by exchanging whole runs."""
    rates = lambda key: np.array([np.diff(r[key]) / np.diff(r["x"]) for r in runs])
    a, b = -rates("D"), rates("quality")                           # (runs, points - 1); falling D is progress
    corr = lambda a, b: float(np.clip(np.corrcoef((a - a.mean(0)).ravel(), (b - b.mean(0)).ravel())[0, 1], -0.999999, 0.999999))  # Fisher's z of 1 is infinite
    n, whole = len(runs), corr(a, b)
    keep = [np.delete(np.arange(n), k) for k in range(n)]
    pseudo = [n * np.arctanh(whole) - (n - 1) * np.arctanh(corr(a[k], b[k])) for k in keep]
    _, lo, hi = interval(pseudo)
    orders = list(itertools.permutations(range(n))) if n <= 6 else [np.arange(n), *(np.random.default_rng(k).permutation(n) for k in range(2_000))]  # the observed order is one of them
    null = [corr(a[list(o)], b) for o in orders]
    return {"correlation": whole, "interval": [float(np.tanh(lo)), float(np.tanh(hi))], "p": float(np.mean(np.abs(null) >= abs(whole) - 1e-12)), "runs": n, "points": a.shape[1]}


# --- the runner ---------------------------------------------------------------------------------------------------------------

def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-+." else "-" for c in name).strip("-")


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{slug(arm)}-s{seed}"


def warp(steps: np.ndarray, r: np.ndarray, K: int, seed: int) -> np.ndarray:
    """The same r(k) at a randomly warped time: r(K u^g) with log2 g uniform in [-1, 1]; as smooth and as monotone, at the wrong moments."""
    g = 2 ** np.random.default_rng([seed, 31]).uniform(-1, 1)
    return regime.held(steps, r, K * (np.arange(1, K + 1) / K) ** g)


DERIVED = {"ramp": 0, "warped": 1, "yoked": 2}  # sources of r made here -> which runs must come first: none; the same seed's; all seeds'


def derived(options: dict) -> str | None:
    """The kind of an arm's source of r if it is made here and replayed, else None."""
    kind = options.get("regime", "").split(":")[0]
    return kind if kind in DERIVED else None


def source_file(kind: str, options: dict, out: Path, arm: str, seed: int, seeds: list[int]) -> str:
    """`warped:ARM`, `yoked:ARM` and `ramp:SHARE` -> replay:FILE, written next to the run. ARM must have run."""
    name, _, what = kind.partition(":")
    K = options["steps"]
    if name in ("warped", "yoked"):
        other = seed if name == "warped" else seeds[(seeds.index(seed) + 1) % len(seeds)]
        if name == "yoked" and len(seeds) < 2:
            raise UserError(f"arm {arm!r} replays another seed's regime; give at least --seeds 2")
        log = folder_of(out, what, other) / "log.jsonl"
        if not (log.parent / "scores.json").is_file():
            raise UserError(f"arm {arm!r} replays {log}, which is missing or of a run that has not ended; run arm {what!r} first")
        steps, r = regime.read_r(log)
        r = warp(steps, r, K, seed) if name == "warped" else regime.held(steps, r, np.arange(1, K + 1))
    else:
        r = np.minimum(1.0, np.arange(1, K + 1) / (float(what) * K))
    path = out / "runs" / f"{slug(arm)}-s{seed}.r.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": k, "r": float(v)}) + "\n" for k, v in enumerate(r, 1)))
    return f"replay:{path}"


def provenance() -> dict:
    """What a run was made with: commit (+ where a .py file differs from it), versions, machine."""
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = "+" if git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1 else ""
    return {"commit": git("rev-parse", "--short", "HEAD").stdout.strip() + changed, "python": platform.python_version(), "torch": torch.__version__,
            "machine": evaluate.hardware(evaluate.pick_device("auto")), "threads": torch.get_num_threads()}


UNLIKE = ("out", "recipe", "workers", "profile")  # settings that two runs may differ in and still be the same


def other_settings(options: dict, seed: int, made_with: dict) -> str | None:
    """What a run with the settings `made_with` has otherwise than one with these options would, as "steps 100, not 3000"; None: nothing."""
    wanted = dataclasses.asdict(config.resolve({**options, **({"regime": "clock"} if derived(options) else {}), "seed": seed, "out": "unused"}))
    skip = {*UNLIKE, "device", *(["regime"] if derived(options) else []), *(["precision"] if wanted["precision"] == "auto" else []), *(["channels"] if wanted["codec"] != "mel" else [])}
    return next((f"{k} {made_with[k]}, not {v}" for k, v in wanted.items() if k not in skip and k in made_with and made_with[k] != v), None)


def twin(out: Path, options: dict, seed: int) -> Path | None:
    """A finished run of an experiment beside `out` with the very same settings, made at this commit: E1's `stage` is E3's `slope`."""
    commit, kept = provenance()["commit"], lambda fields: {k: v for k, v in fields.items() if k not in UNLIKE}
    if derived(options) or not commit or commit.endswith("+"):     # made of other runs of its own experiment; code that is not committed may have changed
        return None
    wanted = kept(dataclasses.asdict(config.resolve({**options, "seed": seed, "out": "unused"})))
    for made in sorted(out.parent.glob("*/runs/*/made.json")):
        if json.loads(made.read_text())["commit"] == commit and kept(json.loads((made.parent / "config.json").read_text())) == wanted:
            return made.parent
    return None


def run_arm(out: Path, arm: str, options: dict, seed: int, seeds: list[int]) -> Path:
    """Train one arm x seed, or continue it, or find it finished, here or beside. Returns its folder."""
    path = folder_of(out, arm, seed)
    if (path / "scores.json").is_file():
        return path
    same = None if path.exists() else twin(out, options, seed)
    if same:
        shutil.copytree(same, path, copy_function=lambda a, b: (os.link if a.endswith(".pt") else shutil.copy2)(a, b))  # weights are linked: they are large, and only ever replaced
        return path
    if (path / "config.json").is_file():  # begun; also if it died before its first checkpoint
        train.train({}, str(path))
    else:
        if path.exists():
            shutil.rmtree(path)
        if derived(options):
            options = {**options, "regime": source_file(options["regime"], options, out, arm, seed, seeds)}
        train.train({**options, "seed": seed, "out": str(path)})
    data.write_whole(path / "made.json", json.dumps(provenance()) + "\n")
    return path


def job(arm_seed: tuple, out: Path, arms: dict, seeds: list[int], packed: int = 1) -> tuple[str, str]:
    """One run, in this process or (packed > 1) one of `packed` workers -> ("done" | "stopped" | "failed", why)."""
    arm, seed = arm_seed
    try:
        if packed == 1:
            run_arm(out, arm, arms[arm], seed, seeds)
            return "done", ""
        torch.set_num_threads(max(1, data.cores() // packed))
        (out / "runs").mkdir(parents=True, exist_ok=True)
        with open(f"{folder_of(out, arm, seed)}.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            run_arm(out, arm, {**arms[arm], "workers": 0}, seed, seeds)  # its bar and its lines would be mixed with the others'
        return "done", ""
    except train.Stopped as e:
        return "stopped", str(e)
    except Exception:
        return "failed", traceback.format_exc()


def collect(out: Path, name: str, arms: dict, seeds: list[int]) -> list[dict]:
    """Rows of all finished runs: one an arm x seed x evaluation, `final` with the table's metrics on the last; D and r as they stood
    there (D interpolated in log2 k between probes). Written to rows.jsonl, where the rows of runs whose folder is gone are kept, and those
    of arms and seeds that are not asked for now."""
    kept, rows = {}, []
    if (out / "rows.jsonl").is_file():
        for line in (out / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            kept.setdefault((row["arm"], row["seed"]), []).append(row)
    for arm, seed in itertools.product(arms, seeds):
        path = folder_of(out, arm, seed)
        if not (path / "scores.json").is_file():
            given = {k: v for k, v in arms[arm].items() if k not in (*UNLIKE, "device")}
            rows += [r for r in kept.get((arm, seed), []) if all(r.get("config", {}).get(k, v) == v for k, v in given.items())]  # not an older experiment's of that name
            continue
        made_with = json.loads((path / "config.json").read_text())
        if derived(arms[arm]):
            made_with["regime"] = arms[arm]["regime"]              # what was asked for, not the path of the file made of it
        made = json.loads((path / "made.json").read_text()) if (path / "made.json").is_file() else {}
        log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        evals, probes, follows = [r for r in log if "eval" in r], [(r["step"], r["D"]) for r in log if "D" in r], regime.read_r(path / "log.jsonl")
        final = next(r for r in next(iter(json.loads((path / "scores.json").read_text()).values()))["rows"] if r["row"] == "model")
        for k, r in enumerate(evals):
            rows.append({"experiment": name, "arm": arm, "seed": seed, "step": r["step"], **{m: v for m, v in r["eval"].items() if m != "val_loss_t"},
                         "r": float(regime.held(*follows, r["step"])), **({"D": float(np.interp(np.log2(r["step"]), *zip(*((np.log2(k), d) for k, d in probes))))} if probes else {}),
                         **({"final": {m: v["mean"] if isinstance(v, dict) and "mean" in v else v for m, v in final.items()}} if k == len(evals) - 1 else {}),
                         "config": {m: v for m, v in made_with.items() if m != "out"}, **made})
    others = [r for (arm, seed), run in kept.items() if arm not in arms or seed not in seeds for r in run]
    data.write_whole(out / "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows + others))
    return rows


# --- tables and figures ---------------------------------------------------------------------------------------------------------

def curves(rows: list[dict], arm: str, seeds: list[int], metric: str, clock: str = "step") -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{seed: (steps or seconds, quality)} of an arm's finished runs; quality is turned so that higher is better."""
    out = {}
    for seed in seeds:
        mine = [r for r in rows if r["arm"] == arm and r["seed"] == seed]
        if mine:
            out[seed] = np.array([r[clock] for r in mine], float), QUALITY[metric] * np.array([r[metric] for r in mine], float)
    return out


def final_metric(rows: list[dict]) -> tuple[str, str]:
    """(key in the final scores, how it reads): event-set accuracy, CLAP score (higher is better), energy score or KID (lower is better)."""
    words = {"exact": "event-set accuracy", "clap_score": "CLAP score", "energy_score": "energy score (lower is better)",
             "kid_model": "KID in the audio model's space (lower is better)", "kid": "KID in the judge's space (lower is better)"}
    key = next(k for k in words if any(k in r.get("final", {}) for r in rows))
    return key, words[key]


def reference_of(arm: str, arms, reference: str) -> str | None:
    """The arm that `arm` is compared with: `reference`, in its own setting where it has one. None: there is none."""
    setting, colon, _ = arm.rpartition(": ")
    own = setting + colon + reference
    return own if own in arms else reference if reference in arms else None


def summarize(rows: list[dict], arms: dict, seeds: list[int], reference: str) -> list[dict]:
    """One row an arm: final metric over seeds, paired difference from its reference with Holm's p, speed-up over it in steps and seconds."""
    key, _ = final_metric(rows)
    metric = next((m for m in QUALITY if rows and m in rows[0]), None)
    final = {arm: {r["seed"]: r["final"][key] for r in rows if r["arm"] == arm and "final" in r} for arm in arms}
    out = []
    for arm in arms:
        values, other = final[arm], reference_of(arm, arms, reference)
        if not values:
            out.append({"arm": arm, "n": 0})
            continue
        mean, lo, hi = interval(list(values.values()))
        row, both = {"arm": arm, "n": len(values), "mean": mean, "interval": [lo, hi]}, sorted(set(values) & set(final.get(other, {})))
        if both and arm != other:
            row |= {"reference": other, "against": paired([values[s] for s in both], [final[other][s] for s in both])}
            if metric:
                for clock in ("step", "seconds"):
                    if any(clock not in r for r in rows if r["arm"] in (arm, other)):
                        continue                                   # made on another day or machine: no seconds to compare
                    ref, mine = (curves(rows, a, both, metric, clock) for a in (other, arm))
                    row[f"speed_up_{clock}"] = speed_up([ref[s] for s in both], [mine[s] for s in both])
        out.append(row)
    tested = [r for r in out if "against" in r]
    for r, p in zip(tested, holm([r["against"]["p"] for r in tested])):
        r["against"]["holm_p"] = p
    return out


def between(x: tuple[float, float], sign: bool = True, digits: int = 3) -> str:
    """An interval as text; "-" where one seed has none."""
    return "-" if np.isnan(x[0]) else f"[{x[0]:{'+' if sign else ''}.{digits}f}, {x[1]:{'+' if sign else ''}.{digits}f}]"


def table(name: str, rows: list[dict], arms: dict, seeds: list[int], reference: str) -> str:
    """The experiment's table, ready to print."""
    _, label = final_metric(rows)
    n, summary = len(seeds), summarize(rows, arms, seeds, reference)
    wide = max(26, *map(len, arms))
    lines = [f"{name}: {EXPERIMENTS[name].question if name in EXPERIMENTS else ''}", f"{label}, {n} seed{'s' * (n > 1)}"
             + (" - DESCRIPTIVE: fewer than 8 seeds decide nothing" if n < 8 else "") + f"; smallest p that {n} seeds can reach: {max(2 / 2**n, 1e-5):.2g}; differences from {reference!r}"
             + (" of the same setting" if any(": " in arm for arm in arms) else ""),
             f"{'arm':{wide}s} n   mean  95 % interval    difference, 95 %             p  Holm p   sooner by, in steps: 95 %     in seconds"]
    f = lambda x: f"{x['ratio']:.2f} {between(x['interval'], False, 2)}" + (f", over {100 * x['shared']:.0f} % of its range" if x["shared"] < 0.95 else "") \
        if x["n"] else "never in reach (censored)"
    for r in summary:
        if not r["n"]:
            lines.append(f"{r['arm']:{wide}s} 0   no finished run")
            continue
        line = f"{r['arm']:{wide}s} {r['n']}  {r['mean']:6.3f} {between(r['interval'], False):16s}"
        if "against" in r:
            d = r["against"]
            line += f"  {d['difference']:+.3f} {between(d['interval']):16s}  {d['p']:.3f}   {d['holm_p']:.3f}"
            line += "".join(f"   {f(r[k])}" for k in ("speed_up_step", "speed_up_seconds") if k in r)
        lines.append(line)
    others = also(rows, arms, seeds, reference)
    if others:
        lines += ["", "also, as differences, 95 % (lower is better in all of these; not adjusted for their number)"]
        lines += [f"{arm:{wide}s} " + ", ".join(f"{k} {d['difference']:+.3f} {between(d['interval'])}" for k, d in by.items()) for arm, by in others.items()]
    return "\n".join(line.rstrip() for line in lines)


def also(rows: list[dict], arms: dict, seeds: list[int], reference: str) -> dict:
    """{arm: {metric: paired difference from its reference}} of what a finished run has besides the final metric: what one gains may cost another."""
    key, out = final_metric(rows)[0], {}
    last = {(r["arm"], r["seed"]): {**r["final"], "val_loss": r.get("val_loss")} for r in rows if "final" in r}
    for arm in arms:
        other = reference_of(arm, arms, reference)
        both = [s for s in seeds if (arm, s) in last and (other, s) in last]
        if arm != other and both:
            out[arm] = {k: paired([last[arm, s][k] for s in both], [last[other, s][k] for s in both]) for k in ("kid", "event_kl", "lsd_hf", "val_loss")
                        if k != key and all(isinstance(last[a, s].get(k), float) for a in (arm, other) for s in both)}
    return {arm: by for arm, by in out.items() if by}


SEMANTIC, DETAIL = ("event_accuracy", "recall"), ("count", "pitch", "order")  # what is heard | how well it is made, of what is heard


def track(rows: list[dict]) -> dict:
    """E5: {quality: rate correlation with D} over finished runs, at the evaluations where every run has both. {} below 3 runs."""
    runs = {}
    for r in rows:
        runs.setdefault((r["arm"], r["seed"]), {})[r["step"]] = r
    out = {}
    for quality in (*SEMANTIC, *DETAIL):
        steps = [k for k in sorted(set.intersection(*map(set, runs.values()))) if all(run[k].get(quality) is not None and "D" in run[k] for run in runs.values())]
        if len(runs) >= 3 and len(steps) >= 3:
            column = lambda run, key: np.array([run[k][key] for k in steps], float)
            out[quality] = rate_correlation([{"x": np.log2(steps), "D": column(run, "D"), "quality": column(run, quality)} for run in runs.values()])
    return out


def track_table(rows: list[dict]) -> str:
    found = track(rows)
    if not found:
        return "E5: fewer than 3 finished runs, or fewer than 3 common evaluations"
    n = next(iter(found.values()))["runs"]
    lines = [f"E5: {EXPERIMENTS['E5'].question} Correlation of the rate at which D falls with the rate at which a quality rises, per doubling,",
             f"less the mean over the {n} runs at that step; the unit is the run" + (" - DESCRIPTIVE: fewer than 8 runs decide nothing" if n < 8 else ""),
             f"{'':26s} correlation, 95 %          p   rates a run"]
    for quality, c in found.items():
        kind = "semantic" if quality in SEMANTIC else "detail"
        lines.append(f"{quality.replace('_', ' ') + ' (' + kind + ')':26s} {c['correlation']:+.3f} {between(c['interval']):18s} {c['p']:.3f}   {c['points']}")
    return "\n".join(lines)


def figure(out: Path, name: str, rows: list[dict], arms: dict, seeds: list[int]) -> None:
    """Learning curves by arm, mean and t interval over seeds: quality against steps and seconds, r; for captions also each factor alone."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metric = next((m for m in QUALITY if rows and m in rows[0]), None)
    if metric is None:
        return
    words = {"event_accuracy": "event-set accuracy", "lsd_hf": "LSD-HF at 2 kHz (lower is better)", "val_loss": "validation loss (lower is better)", "r": "regime r", "recall": "events heard (semantic)",
             "count": "count, of heard events (detail)", "pitch": "high or low, of heard events (detail)", "order": "order, of right sets (detail)"}
    panels = [(metric, "step"), (metric, "seconds"), ("r", "step")] + [(m, "step") for m in ("recall", "count", "pitch", "order") if any(r.get(m) is not None for r in rows)]
    n = -(-len(panels) // 4) if len(panels) > 4 else 1
    fig, axes = plt.subplots(n, -(-len(panels) // n), figsize=(5 * -(-len(panels) // n), 3.8 * n + 0.6), layout="constrained", squeeze=False)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for ax, (m, clock) in zip(axes.flat, panels):
        for k, arm in enumerate(arms):
            mine = [[r for r in rows if r["arm"] == arm and r["seed"] == s and m in r and clock in r] for s in seeds]
            mine = [c for c in mine if c]
            if not mine:
                continue
            x, y = np.mean([[r[clock] for r in c] for c in mine], 0), np.array([[np.nan if r[m] is None else r[m] for r in c] for c in mine])
            known = ~np.isnan(y).any(0)                            # a factor that was not asked of some seed has no paired mean
            style = dict(color=f"C{k % 10}", ls=("-", "--", ":")[k // 10 % 3])
            ax.plot(x[known], y[:, known].mean(0), marker="o", ms=3, label=f"{arm} (n = {len(mine)})", **style)
            if len(mine) > 1:
                half = scipy.stats.t.ppf(0.975, len(mine) - 1) * y.std(0, ddof=1) / np.sqrt(len(mine))
                ax.fill_between(x[known], (y.mean(0) - half)[known], (y.mean(0) + half)[known], color=style["color"], alpha=0.12, lw=0)
        ax.set(xlabel="training step" if clock == "step" else "training seconds (evaluation excluded)", ylabel=words[m], ylim=(-0.03, 1.03) if m != metric else None)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if len(panels) < axes.size:
        axes.flat[-1].legend(handles, labels, loc="center", fontsize=8, ncol=1 + (len(labels) > 16), frameon=False)
    else:
        axes.flat[0].legend(handles, labels, fontsize=8)
    fig.suptitle(f"{name}: {EXPERIMENTS[name].question} Validation clips; " + (f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: descriptive" if len(seeds) < 8 else f"{len(seeds)} seeds; bands: 95 %"))
    fig.savefig(out / "figure.png", dpi=90)
    plt.close(fig)


# --- the report: one HTML file, nothing fetched ---------------------------------------------------------------------------------

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:1200px;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}img{max-width:100%;height:auto}figcaption,.note{color:#555;font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}th,td{border-bottom:1px solid #ddd;padding:.35rem .7rem;text-align:left;vertical-align:top}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:1rem;margin:.5rem 0 1.5rem}.big{grid-template-columns:repeat(auto-fill,minmax(320px,1fr))}.cards figure{margin:0;min-width:0;border:1px solid #ddd;border-radius:6px;padding:.5rem}
audio{width:100%}figcaption,blockquote{overflow-wrap:anywhere}table{min-width:100%}th,td{min-width:8rem;max-width:24rem;overflow-wrap:anywhere}td.differs{background:#fff3c4}blockquote{margin:.8rem 0 .2rem;font-weight:600}
"""


def _png(fig) -> str:
    import base64
    import io

    import matplotlib.pyplot as plt
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100)
    plt.close(fig)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _wav(x: np.ndarray) -> str:
    import base64
    import tempfile

    from data import write_wav
    with tempfile.TemporaryDirectory() as d:
        write_wav(Path(d) / "x.wav", x)
        return "data:audio/wav;base64," + base64.b64encode((Path(d) / "x.wav").read_bytes()).decode()


def _card(title: str, x: np.ndarray) -> str:
    from html import escape

    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(3.4, 2.2), layout="constrained")
    evaluate.draw_spectrogram(ax, x, "")
    ax.set_xlabel("time (s)", fontsize=8)
    ax.set_ylabel("frequency (kHz)", fontsize=8)
    return (f'<figure><figcaption>{escape(title)}</figcaption><img alt="spectrogram: {escape(title)}" src="{_png(fig)}">'
            f'<audio controls preload="metadata" src="{_wav(x)}"></audio></figure>')


def _sounds(runs: list[tuple], n: int) -> str:
    """The same test clips, captions and noise for every (name, run) of a task: real, codec ceiling, (muffled input,) each run."""
    from html import escape
    first = runs[0][1]
    test = evaluate.open_set(first.config, "test", 64)
    rows = sorted(range(min(64, len(test))), key=lambda i: (len(test.caption(i)), i))[:: max(1, min(64, len(test)) // n)][:n]
    real = np.stack([evaluate._first(test.wave(i), first.config["seconds"]) for i in rows])
    captions = [test.caption(i) for i in rows]
    columns = [("real", real), ("codec ceiling", first.codec.decode(first.codec.encode(torch.as_tensor(real))).numpy())]
    if first.config["task"] == "sr":
        muffled = np.stack([data.band_limit(x, 2_000) for x in real])
        columns.append(("muffled input, 2 kHz", muffled))
    for name, run in runs:
        made = evaluate.generate(run, captions, list(range(len(rows)))) if run.config["task"] == "t2a" else evaluate.upsample(run, muffled, 2_000, list(range(len(rows))))
        columns.append((f"{name}, step {run.step}", made[:, : real.shape[1]]))
    return "".join(f"<blockquote>{escape(c)}</blockquote><div class=cards>{''.join(_card(name, waves[k]) for name, waves in columns)}</div>" for k, c in enumerate(captions))


def _results(runs: list) -> list[tuple[str, list[str]]]:
    """(what, [text of each run]): what was trained, its result, its ceiling, the protocol."""
    def of(run):
        score = next(iter(json.loads((run.path / "scores.json").read_text()).values())) if (run.path / "scores.json").is_file() else None
        model, ceiling = ({r["row"]: r for r in score["rows"]}.get(name) for name in ("model", "codec ceiling")) if score else (None, None)
        def text(r):
            if r is None:
                return "no final table"
            if "exact" in r:
                return f"event set {r['exact']:.3f} {between(r['interval'], False)}"
            if "energy_score" in r:
                return f"energy score {r['energy_score']['mean']:.3f} {between(r['energy_score']['interval'], False)}"
            return f"KID {r['kid']:.4f}"
        return (run.config.get("recipe", "-"), f"{run.config['task']}, {run.config['data']}", str(run.step), text(model), text(ceiling),
                ", ".join(f"{k} {v}" for k, v in score["protocol"].items() if k not in ("run", "step")) if score else "-")
    heads = ("recipe", "task, data", "steps", "result, 95 % interval over clips", "ceiling: real clips through the codec", "protocol")
    return list(zip(heads, zip(*map(of, runs))))


def _curve_figures(runs: list, names: list[str]) -> list[tuple[str, str]]:
    """(title, png) of validation loss, each quality measured, and r, all runs overlaid."""
    import matplotlib.pyplot as plt
    logs = [[json.loads(line) for line in (r.path / "log.jsonl").read_text().splitlines()] if (r.path / "log.jsonl").is_file() else [] for r in runs]
    def drawn(title, ylabel, rows_of, ylim=None, **style):
        fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
        some = False
        for k, (name, log) in enumerate(zip(names, logs)):
            points = rows_of(log)
            some |= bool(points)
            if points:
                ax.plot(*zip(*points), color=f"C{k % 10}", ls=("-", "--", ":")[k // 10 % 3], label=name, **style)
        ax.set(xlabel="step", ylabel=ylabel, ylim=ylim)
        if some:
            ax.legend(fontsize=9)
            return [(title, _png(fig))]
        plt.close(fig)
        return []
    of = lambda metric: (lambda log: [(x["step"], x["eval"][metric]) for x in log if x.get("eval", {}).get(metric) is not None])
    out = drawn("Validation loss", "mean squared velocity error", of("val_loss"), marker="o", ms=3)
    for metric, text in (("event_accuracy", "event-set accuracy"), ("lsd_hf", "LSD-HF at 2 kHz")):
        out += drawn("Quick metric on validation clips", text, of(metric), marker="o", ms=3)
    moved = lambda log: [(x["step"], x["r"]) for x in log if "r" in x] if any("D" in x or x.get("r") for x in log) else []  # nothing to see where r was never measured
    return out + drawn("Regime r", "r (0 acquires, 1 refines)", moved, (-0.03, 1.03), drawstyle="steps-post")


def report(paths: list[Path], out: Path, clips: int = 4) -> None:
    """Write one self-contained HTML file about runs: results, curves, sounds, settings that differ, dashboards."""
    import base64
    from html import escape

    import matplotlib
    matplotlib.use("Agg")
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"--out {out}: must name an .html file")
    runs = [evaluate.load_run(p) for p in paths]
    shared = os.path.commonpath([p.resolve().parent for p in paths])  # what all names begin with tells nothing apart
    names, parts = [os.path.relpath(p.resolve(), shared) for p in paths], []
    cell = lambda x, cls="": f"<td{cls}>{escape(str(x))}</td>"
    head = "<tr><th></th>" + "".join(f"<th>{escape(n)}</th>" for n in names) + "</tr>"
    grid = lambda rows: f"<div class=wide><table>{head}{''.join(rows)}</table></div>"
    parts.append("<h2>Results</h2>" + grid(f"<tr><th>{escape(k)}</th>{''.join(map(cell, v))}</tr>" for k, v in _results(runs)))
    parts.append("<h2>Learning curves</h2><div class='cards big'>" + "".join(f'<figure><figcaption>{t}</figcaption><img alt="{t}, all runs" src="{png}"></figure>'
                                                                               for t, png in _curve_figures(runs, names)) + "</div>")
    for task in dict.fromkeys((r.config["task"], r.config["data"], r.config["seconds"]) for r in runs):
        same = [(n, r) for n, r in zip(names, runs) if (r.config["task"], r.config["data"], r.config["seconds"]) == task]
        parts.append(f"<h2>Sounds: {escape(task[0])} on {escape(str(task[1]))}</h2><p class=note>Unseen clips; the same noise for every run.</p>" + _sounds(same, clips))
    fields = {k: [r.config.get(k, "-") for r in runs] for k in dict.fromkeys(k for r in runs for k in r.config) if k not in ("out", "workers", "profile")}
    differ = {k: v for k, v in fields.items() if len(set(map(str, v))) > 1}
    parts.append("<h2>Settings that differ</h2>" + (grid(f"<tr><th>{escape(k)}</th>{''.join(cell(x, ' class=differs' if str(x) != str(v[0]) else '') for x in v)}</tr>"
                                                         for k, v in differ.items()) if differ else "<p>None.</p>"))
    boards = [(n, r.path / "dashboard.png") for n, r in zip(names, runs) if (r.path / "dashboard.png").is_file()]
    parts.append("<h2>Dashboards</h2>" + ("".join(f'<details><summary>{escape(n)}</summary><img alt="dashboard of {escape(n)}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}"></details>'
                                                  for n, p in boards) or "<p>None.</p>"))
    html = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>Report: {escape(', '.join(names))}</title><style>{STYLE}</style></head><body><h1>Report of {len(runs)} run{'s' * (len(runs) > 1)}</h1>{''.join(parts)}</body></html>")
    data.write_whole(out, html)
    print(f"{out}: {len(html) / 1e6:.1f} MB, {len(runs)} run{'s' * (len(runs) > 1)}")


# --- commands -------------------------------------------------------------------------------------------------------------------

def estimate_hours(options: list[dict]) -> float:
    """Hours for runs with these options, one after another: a measured forward and backward pass of each distinct shape, times the steps,
    plus a quarter for the rest of a step; and the clips that previews and final tables generate and decode. Rendering of data not counted."""
    from bench import in_turns
    from model import N_FFT, DiT, flow_matching_loss, griffin_lim
    fastest = lambda what: float(in_turns({"it": what}, rounds=3, warm_up=1)["it"].min())
    known, total = {}, 0.0
    for given in options:
        cfg = config.resolve({**given, "out": "unused", "regime": "clock"})
        sr, T = cfg.task == "sr", round(25 * cfg.seconds)
        shape = (cfg.device, cfg.channels, cfg.width, cfg.depth, cfg.heads, cfg.batch, cfg.task, T)
        if shape not in known:
            model = DiT(cfg.channels, cfg.width, cfg.depth, cfg.heads, 0 if sr else 200, sr).to(cfg.device)
            x, t, ids = torch.randn(cfg.batch, T, cfg.channels, device=cfg.device), torch.rand(cfg.batch, device=cfg.device), torch.ones(cfg.batch, 10, dtype=torch.long, device=cfg.device)
            known[shape] = (fastest(lambda: flow_matching_loss(model(x, t, None if sr else model.encode_text(ids)), x).mean().backward()),
                            fastest(lambda: griffin_lim(torch.rand(16, 2 * T + 1, N_FFT // 2 + 1), 640 * T)) / 16)
        step, decode = known[shape]
        one = cfg.sample_steps * (1 if sr else 2) * step / 3 / cfg.batch    # one clip: a forward pass a step, two with guidance
        previews = -(-cfg.steps // cfg.eval_every) * evaluate.preview_clips(dataclasses.asdict(cfg)) * (one + decode / (1 if sr else 4))
        table = cfg.score_clips * ((2 * one + 7 * decode) if sr else (one + 2 * decode))  # model, ceiling; in super-resolution two samples, two baselines
        total += (1.25 * cfg.steps * step + previews + table) / 3_600
    return total


def precision_here(cfg: config.Config) -> str:
    """fp32 or bf16, whichever is faster at this shape: measured once, so that all runs of an experiment compute alike."""
    from learner import Learner, pick_precision
    from model import Words
    sr, x = cfg.task == "sr", torch.randn(cfg.batch, round(25 * cfg.seconds), cfg.channels, device=cfg.device)
    b = {"x0": x, "eps": x.flip(0), "t": torch.rand(cfg.batch, device=cfg.device), "drop": torch.zeros(cfg.batch, dtype=torch.bool, device=cfg.device),
         **({"cond": x} if sr else {"ids": torch.ones(cfg.batch, 10, dtype=torch.long, device=cfg.device)})}
    return pick_precision(Learner(cfg, None if sr else Words(["x"] * 200)), b)


def read_arms(a) -> dict:
    """The user's own arms, from --arm NAME=JSON and --arms FILE (a JSON object of objects); checked against train.py's options."""
    own = {}
    for text in a.arm:
        name, _, body = text.partition("=")
        try:
            own[name.strip()] = json.loads(body)
        except json.JSONDecodeError as e:
            raise UserError(f"--arm {text}: must be NAME={{...}} with options of train.py as JSON ({e.msg})") from None
    if a.arms:
        try:
            own |= json.loads(Path(a.arms).read_text())
        except (OSError, json.JSONDecodeError, TypeError) as e:
            raise UserError(f"--arms {a.arms}: not a JSON file of arms ({e})") from None
    fields = {f.name for f in dataclasses.fields(config.Config)} - {"out", "seed"}
    for name, options in own.items():
        if not isinstance(options, dict) or not name:
            raise UserError(f"arm {name!r}: must be an object of train.py options")
        unknown = sorted(set(options) - fields)
        if unknown:
            raise UserError(f"arm {name!r}: train.py has no option {unknown[0]!r}")
    return own


COMMON = {"task": str, "preset": str, "precision": str, "data": str, "val_fold": int, "clap": str, "audio_model": str, "device": str, "steps": int, "eval_every": int, "score_clips": int, "score_split": str, "judge": str, "clips": int}


def tuned_clocks(arms: dict, folder: Path, seeds: list[int]) -> dict:
    """E7's arms for fresh seeds, in the settings that `folder` (E7 on development seeds) has: of its clocks only the one that did best
    there (re-tuned), and the one that did best at home (frozen)."""
    if not (folder / "experiment.json").is_file():
        raise UserError(f"--tuned {folder}: no experiment.json; run E7 there first, on other seeds")
    spec = json.loads((folder / "experiment.json").read_text())
    if set(spec["seeds"]) & set(seeds):
        raise UserError(f"--tuned {folder}: chosen on seed {min(set(spec['seeds']) & set(seeds))} too, which would flatter the clocks; use --first-seed {max(spec['seeds']) + 1}")
    rows = collect(folder, spec["experiment"], spec["arms"], spec["seeds"])
    key, _ = final_metric(rows)
    settings = [x for x in dict.fromkeys(arm.rpartition(": ")[0] for arm in arms) if x == HOME or any(arm.startswith(f"{x}: ") for arm in spec["arms"])]
    best = {}
    for setting in settings:
        means = {arm: np.mean([r["final"][key] for r in rows if r["arm"] == arm and "final" in r]) for arm in arms
                 if arm.startswith(f"{setting}: {CLOCK}") and any(r["arm"] == arm and "final" in r for r in rows)}
        if not means:
            raise UserError(f"--tuned {folder}: no finished clock of setting {setting!r}")
        best[setting] = (max if key in ("exact", "clap_score") else min)(means, key=means.get).rpartition(": ")[2]
    out = {}
    for setting in settings:
        for name in dict.fromkeys(("stage", "static", best[HOME], best[setting])):
            roles = [role for role, c in (("frozen", best[HOME]), ("re-tuned", best[setting])) if c == name]
            out[f"{setting}: {name}" + (f" ({', '.join(roles)})" if roles else "")] = arms[f"{setting}: {name}"]
    return out


def plan(a) -> tuple[dict, dict, list[int], str]:
    """-> arms {name: options}, common options, seeds, reference."""
    e = EXPERIMENTS[a.experiment]
    common = {**e.base, **{k: getattr(a, k) for k in COMMON if getattr(a, k) is not None}}
    seeds = list(range(a.first_seed, a.first_seed + a.seeds))
    if a.tuned and a.experiment != "E7":
        raise UserError("--tuned belongs to E7, whose clocks are chosen on development seeds")
    own = read_arms(a)
    arms = {**(tuned_clocks(e.arms, a.tuned, seeds) if a.tuned else e.arms), **own}
    if a.only:
        missing = [x for x in a.only if x not in arms]
        if missing:
            raise UserError(f"--only {missing[0]}: no such arm; there are: {', '.join(arms)}")
        arms = {k: v for k, v in arms.items() if k in a.only or k in own}
    reference = e.reference if any(reference_of(arm, arms, e.reference) for arm in arms) else next(iter(arms))
    return {k: {**common, **v} for k, v in arms.items()}, common, seeds, reference


def cmd_run(a) -> None:
    arms, common, seeds, reference = plan(a)
    resolved = {}
    for name, options in arms.items():  # every arm is checked before any is run
        resolved[name] = config.resolve({**options, **({"regime": "clock"} if derived(options) else {}), "out": "unused"})
        arms[name] = {**options, "steps": resolved[name].steps}
    hours = estimate_hours([o for o in arms.values() for _ in seeds])
    print(f"{a.experiment}: {EXPERIMENTS[a.experiment].question}\n{len(arms)} arms x {len(seeds)} seeds, {next(iter(resolved.values())).steps} steps, about {hours:.1f} hours here")
    for name, options in arms.items():
        print(f"  {name:26s} {json.dumps({k: v for k, v in options.items() if k not in common and k != 'steps'})}")
    if a.dry_run:
        return
    out = a.out or ROOT / "results" / a.experiment.lower()
    for arm, seed in itertools.product(arms, seeds):
        begun = folder_of(out, arm, seed) / "config.json"
        differs = other_settings(arms[arm], seed, json.loads(begun.read_text())) if begun.is_file() else None
        if differs:
            raise UserError(f"{begun.parent}: a run with {differs}; give another --out, or delete it")
    before = json.loads((out / "experiment.json").read_text())["arms"] if (out / "experiment.json").is_file() else {}
    undecided = [name for name, cfg in resolved.items() if cfg.precision == "auto" and cfg.text == "words" and cfg.codec == "mel"]
    if undecided:
        chosen = next((o["precision"] for o in before.values() if o.get("precision", "auto") != "auto"), None) or precision_here(resolved[undecided[0]])
        arms |= {name: {**arms[name], "precision": chosen} for name in undecided}
    out.mkdir(parents=True, exist_ok=True)
    spec = {"experiment": a.experiment, "arms": arms, "seeds": seeds, "reference": reference, "pilot": a.pilot}
    data.write_whole(out / "experiment.json", json.dumps(spec, indent=1) + "\n")
    # By need (a replayed run comes after what it replays), then by seed: an interrupted experiment has whole pairs.
    need = lambda j: DERIVED.get(derived(arms[j[0]]), 0)
    jobs = sorted(((arm, seed) for seed in seeds for arm in arms), key=need)
    packed = a.jobs or (4 if next(iter(resolved.values())).device.startswith("cuda") and max(c.width for c in resolved.values()) <= 384 else 1)
    failed, stopped, began = {}, [], time.time()
    bar = tqdm(total=len(jobs), desc=a.experiment, unit="run", dynamic_ncols=True)
    for _, level in itertools.groupby(jobs, key=need):
        for (arm, seed), (status, why) in parallel_map(job, list(level), (out, arms, seeds, packed), packed if packed > 1 else 0, ahead=1):
            bar.update()
            if status == "failed":  # one arm's failure must not cost the others
                failed[f"{arm}, seed {seed}"] = why.strip().splitlines()[-1]
                with open(out / "failures.log", "a") as f:
                    f.write(f"--- {arm}, seed {seed}\n{why}\n")
            if status == "stopped":
                stopped.append(f"{why.split(';')[0]} of {arm!r}, seed {seed}")
                if packed == 1:
                    break
        if stopped:
            raise UserError(f"{stopped[0]}; the same command continues")
    bar.close()
    for who, why in failed.items():
        print(f"FAILED {who}: {why} (see {out / 'failures.log'})")
    show(out)
    print(f"{time.time() - began:.0f} s in this call; rows: {out / 'rows.jsonl'}")
    if failed:
        sys.exit(1)


def cmd_bench(a) -> None:
    import bench
    if a.rounds < 3:
        raise UserError(f"--rounds {a.rounds}: must be at least 3")
    if a.estimate:
        rows = [r for task in ("t2a", "sr") for r in bench.estimate(task)]
        print(bench.estimate_table(rows))
        if a.out:
            data.write_whole(a.out, json.dumps(rows, indent=1) + "\n")
        return
    bench.bench(a.device, a.preset, a.rounds, a.compile, a.out)


def show(out: Path) -> None:
    """Table (also table.txt), figure and rows of an experiment's folder."""
    if not (out / "experiment.json").is_file():
        raise UserError(f"{out}: no experiment.json; not the folder of an experiment")
    spec = json.loads((out / "experiment.json").read_text())
    name, arms, seeds = spec["experiment"], spec["arms"], spec["seeds"]
    rows = collect(out, name, arms, seeds)
    if not rows:
        raise UserError(f"{out}: no finished run yet")
    text = ("PILOT: short runs, few seeds; to see the machinery work, not to decide anything\n" if spec.get("pilot") else "") + table(name, rows, arms, seeds, spec["reference"])
    if name == "E5":
        text += "\n\n" + track_table(rows)
        data.write_whole(out / "track.json", json.dumps(track(rows), indent=1) + "\n")
    data.write_whole(out / "summary.json", json.dumps(summarize(rows, arms, seeds, spec["reference"]), indent=1) + "\n")
    data.write_whole(out / "table.txt", text + "\n")
    figure(out, name, rows, arms, seeds)
    print("\n" + text)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True)
    c = sub.add_parser("list", help="the experiments and their arms")
    c.set_defaults(run_command=lambda a: print("\n".join(f"{k}  {e.question}\n    " + ", ".join(e.arms) for k, e in EXPERIMENTS.items())))
    c = sub.add_parser("run", help="run what is missing, print the table")
    c.add_argument("experiment", choices=tuple(EXPERIMENTS))
    c.add_argument("--out", type=Path)
    c.add_argument("--seeds", type=int, default=8)
    c.add_argument("--first-seed", type=int, default=0)
    c.add_argument("--only", nargs="+", action="extend", metavar="ARM", help="these of its arms alone (your own are run anyway)")
    c.add_argument("--arm", action="append", default=[], metavar="NAME=JSON", help="your own arm")
    c.add_argument("--arms", metavar="FILE", help="your own arms: a JSON object of objects")
    c.add_argument("--tuned", type=Path, metavar="FOLDER", help="E7: keep the best clock of each setting, by this folder's E7 on other seeds")
    c.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: one, or four small ones on a GPU")
    c.add_argument("--pilot", action="store_true", help="mark the table as a pilot")
    c.add_argument("--dry-run", action="store_true")
    for name, kind in COMMON.items():
        c.add_argument("--" + name.replace("_", "-"), dest=name, type=kind, choices=config.CHOICES.get(name), help="as in train.py, for all arms")
    c.set_defaults(run_command=cmd_run)
    c = sub.add_parser("table", help="table and figure again")
    c.add_argument("folder", type=Path)
    c.set_defaults(run_command=lambda a: show(a.folder))
    c = sub.add_parser("bench", help="speed of training, generation and data against a plain DiT")
    c.add_argument("--device", default="auto")
    c.add_argument("--preset", choices=config.CHOICES["preset"], default="auto")
    c.add_argument("--rounds", type=int, default=20)
    c.add_argument("--compile", action="store_true", help="compiled rows too")
    c.add_argument("--estimate", action="store_true", help="measure nothing: FLOP and memory of each preset")
    c.add_argument("--out", type=Path, help="JSON")
    c.set_defaults(run_command=cmd_bench)
    c = sub.add_parser("report", help="one HTML file about runs")
    c.add_argument("runs", nargs="+", type=Path)
    c.add_argument("--out", type=Path, default=Path("report.html"))
    c.add_argument("--clips", type=int, default=4)
    c.set_defaults(run_command=lambda a: report(a.runs, a.out, a.clips))
    a = p.parse_args()
    if getattr(a, "seeds", 1) < 1:
        raise UserError(f"--seeds {a.seeds}: must be positive")
    a.run_command(a)


if __name__ == "__main__":
    run_cli(main)
