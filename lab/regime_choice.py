r"""Which discrepancy should the regime follow? Chosen by a rule, on recorded runs. And: is its r steady?

    python train.py --recipe static --probe always --eval-every 0 ...    # a run that measures all of them
    python -m lab.regime_choice record runs/A runs/B --out results/regime/recorded
    python -m lab.regime_choice choose results/regime/recorded/*.jsonl   # the table of all signals
    python -m lab.regime_choice check results/regime/default/*.jsonl     # r of the runs as they were driven
    python -m lab.regime_choice track results/regime/*/*.jsonl           # does D fall where progress rises?
    python -m lab.regime_choice normal results/regime/default/def-sr-s*.jsonl \
        results/regime/default-6000/*.jsonl --out results/bands.json
    python -m lab.regime_choice means assets/demo                        # why not t = 1

`normal` makes the bands that a run's page draws behind its curves (parts/page.py): where a further run with
the same settings lies with 95 % probability.

Measured progress is 0 for what needs no learning about the clip, 1 for the codec's ceiling:

    captions           event sets that are right / those of real clips through the codec
    super-resolution   (E_mean - E) / (E_mean - E_codec): energy scores of the model, of a spectrum that is
                       the same for all clips, and of real clips through the codec; clips of the previews

both as isotonic fits over training, since single evaluations scatter. **The rule**, written before the runs
were made: of all signals (regime.SIGNALS) whose r never goes back by more than 0.15 in the mean over runs,
take the one whose r has the smallest mean error |r - progress| at the evaluations, the mean of the two tasks;
of those that all runs measured (with `--probe auto` a run measures what its own signal needs). Each run is
judged by the signal that the *other* runs choose (leave one run out). It has to stay within 0.12 in captions
and 0.15 in super-resolution.

Public: main, record, read, r_of, driven_r, error, back, choose, check, controls, ranges, track, normal,
means.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import data
import evaluate
import guidance
import regime
import sampler
from lab.statistics import format_interval, isotonic, rate_correlation
from parts.arguments import Parser, new_folder, new_json
from parts.band_limit import CUTOFF
from parts.config import Config
from parts.errors import UserError, run_cli
from parts.files import reading, to_json, write_text
from parts.runs import read_log, read_scores
from parts.scoring import preview_clips, superresolution_references
from parts.teacher import TeacherFeatures, load_teacher

BOUNDS = {"t2a": 0.12, "sr": 0.15}  # of the mean error
MOST_BACK = 0.15                    # how far r may go back
ACQUIRES, REFINES = (0.3, 0.3), (0.6, 0.7)  # (r below, while progress is below), (r above, where it is above)
KEPT = ("task", "seed", "steps", "recipe", "regime", "regime_signal", "lr", "muon_lr", "width", "depth",
        "cool")


# --- runs as small files ------------------------------------------------------------------------------------

def record(path: Path) -> list[dict]:
    """A run folder -> a header with its settings, then one row a probe or an evaluation."""
    run = evaluate.load_run(path)
    log = read_log(path)
    clips = preview_clips(run.config, [line for line in log if "eval" in line])
    worst, best, metric = _references(run, clips)
    rows: dict[int, dict] = {}
    for line in log:
        row = rows.setdefault(line["step"], {"step": line["step"]})
        if "D_of" in line and None not in line["D_of"].values():   # null stands for what was not finite
            row["D_of"] = {name: round(D, 5) for name, D in line["D_of"].items()}
            row["r"] = round(line["r"], 5)
        for name in ("agreement", "agreement_t", "struct_share"):
            if name in line:
                row[name] = line[name]
        if line.get("eval", {}).get(metric) is not None:
            row["progress"] = round((line["eval"][metric] - worst) / (best - worst), 4)
    header = {name: run.config[name] for name in KEPT}
    return [header, *(row for _, row in sorted(rows.items()) if len(row) > 1)]


def _references(run, clips: int) -> tuple[float, float, str]:
    """(value at progress 0, at progress 1, name) of the quick metric. Captions: event sets; the
    ceiling is that of the run's final table. Super-resolution: energy score, of as many validation clips."""
    config = run.config
    if config["task"] == "t2a":
        scores = read_scores(run.path)
        if scores is None or "exact" not in scores["rows"].get("codec ceiling", {}):
            raise UserError(f"{run.path}: has no final table of SoundWorld's captions (scores.json), where "
                            "the codec's ceiling stands")
        return 0.0, scores["rows"]["codec ceiling"]["exact"], "event_accuracy"
    sets = (data.open_set(config, split, n) for split, n in (("val", clips), ("train", config["clips"])))
    _, _, rows = superresolution_references(run.codec, config, *sets, clips, CUTOFF)
    worst, best = (float(np.mean([clip["energy_score"] for clip in rows[name]]))
                   for name in ("mean spectrum", "codec ceiling"))
    return worst, best, "energy_score"


def read(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows) of a recorded file."""
    make_it = f"make it with: python -m lab.regime_choice record RUN --out {path.parent}"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {make_it}")
    with reading(path, make_it):
        header, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        missing = [name for name in KEPT if name not in header]
        evaluated, probed = (any(name in row for row in rows) for name in ("progress", "D_of"))
    if missing or not evaluated or not probed:
        raise UserError(f"{path}: not a file of `record`, or of a run without evaluations or without probes "
                        "(--probe always)")
    return header, rows


def _alike(recorded: list[tuple], task: str) -> list[tuple]:
    """Of the runs of a task the largest set that differ in nothing but the seed; the first where several are
    as large."""
    by_setting: dict[tuple, list] = {}
    for header, rows in recorded:
        if header["task"] == task:
            setting = tuple(str(value) for name, value in header.items() if name != "seed")
            by_setting.setdefault(setting, []).append((header, rows))
    return max(by_setting.values(), key=len)


# --- r of a signal, and how far it is from progress ---------------------------------------------------------

def r_of(rows: list[dict], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """r that a signal would have given: (steps, r) at the probes."""
    probes = [row for row in rows if "D_of" in row]
    last = max(row["step"] for row in rows)
    follower, steps = regime.Regime("slope", last), set(regime.probe_steps(last))
    found = []
    for row in probes:
        if row["step"] in steps:
            follower.update(row["step"], regime.signal(kind, row["D_of"]))
            found.append((row["step"], follower.r(row["step"])))
    return tuple(np.array(column) for column in zip(*found))


def driven_r(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """r as the run was driven by it: (steps, r) at the probes."""
    return tuple(np.array(column) for column in zip(*((row["step"], row["r"]) for row in rows
                                                      if "D_of" in row)))


def progress_of(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, isotonic fit of measured progress) at the evaluations."""
    points = [(row["step"], row["progress"]) for row in rows if "progress" in row]
    steps, values = (np.array(column) for column in zip(*points))
    return steps, isotonic(values)


def error(rows: list[dict], steps: np.ndarray, r: np.ndarray) -> float:
    """Mean |r - progress| over the evaluations."""
    at, progress = progress_of(rows)
    return float(np.abs(regime.hold_last(steps, r, at) - progress).mean())


def back(r: np.ndarray) -> float:
    """How far r goes back from the highest value that it had."""
    return float((np.maximum.accumulate(r) - r).max())


# --- the choice ---------------------------------------------------------------------------------------------

def choose(recorded: list[tuple[dict, list[dict]]]) -> dict:
    """-> {"signals": {kind: {"t2a": error, "sr": error, "back": mean}}, "chosen", "left_out": each run's
    error under the choice of the others}."""
    measured = set.intersection(*({name for row in rows for name in row.get("D_of", ())}
                                  for _, rows in recorded))
    kinds = [kind for kind, names in regime.SIGNALS.items()
             if kind != "latent" and measured.issuperset(names)]
    tasks = [header["task"] for header, _ in recorded]
    alone = [task for task in set(tasks) if tasks.count(task) < 2]
    if alone:
        raise UserError(f"choose: one run of task {alone[0]} only; each run is judged by the others")
    curves = [{kind: r_of(rows, kind) for kind in kinds} for _, rows in recorded]
    errors = np.array([[error(rows, *curve[kind]) for kind in kinds]
                       for (_, rows), curve in zip(recorded, curves)])                     # (runs, kinds)
    backs = np.array([[back(curve[kind][1]) for kind in kinds] for curve in curves])

    def best(runs: list[int]) -> int:
        by_task = [errors[[n for n in runs if tasks[n] == task]].mean(0) for task in sorted(set(tasks))]
        mean = np.mean(by_task, 0)
        steady = backs[runs].mean(0) <= MOST_BACK
        return int(np.argmin(np.where(steady, mean, mean + 1)))   # without a steady one: the nearest

    everyone, left_out = list(range(len(recorded))), []
    for n, (header, _) in enumerate(recorded):
        k = best([other for other in everyone if other != n])
        left_out.append({**{name: header[name] for name in ("task", "seed", "lr", "steps")},
                         "signal": kinds[k], "error": errors[n, k], "back": backs[n, k]})
    table = {}
    for k, kind in enumerate(kinds):
        row = {task: float(errors[[t == task for t in tasks], k].mean()) for task in sorted(set(tasks))}
        table[kind] = {**row, "back": float(backs[:, k].mean())}
    return {"signals": table, "chosen": kinds[best(everyone)], "left_out": left_out}


def choice_text(found: dict) -> str:
    tasks = [task for task in ("t2a", "sr") if task in next(iter(found["signals"].values()))]
    lines = [f"{'signal':16s}" + "".join(f"{'error ' + task:>12s}" for task in tasks) + f"{'goes back':>12s}"]
    for kind, row in found["signals"].items():
        mark = "  <- chosen" if kind == found["chosen"] else ""
        values = "".join(f"{row[name]:12.3f}" for name in (*tasks, "back"))
        lines.append(f"{kind:16s}{values}{mark}")
    lines += ["", "each run under the signal that the others choose"]
    for run in found["left_out"]:
        verdict = "within" if run["error"] <= BOUNDS[run["task"]] else "NOT within"
        lines.append(f"{run['task']:4s} seed {run['seed']:<4d} lr {run['lr']:g}: {run['signal']:14s} error "
                     f"{run['error']:.3f} ({verdict} {BOUNDS[run['task']]:g}), goes back {run['back']:.2f}")
    return "\n".join(lines)


# --- is it steady? ------------------------------------------------------------------------------------------

def check(recorded: list[tuple[dict, list[dict]]]) -> dict:
    """r as the runs were driven by it. Per task: each run's error, how far r went back, evaluations at which
    it was on the wrong side (ACQUIRES, REFINES); over the seeds of each learning rate the mean error and the
    largest deviation of r past the first tenth."""
    result = {}
    for task in sorted({header["task"] for header, _ in recorded}):
        runs, curves = [], {}
        settings: dict[float, dict] = {}  # learning rate -> settings of its runs, without the seed
        for header, rows in recorded:
            if header["task"] != task:
                continue
            setting = {name: value for name, value in header.items() if name != "seed"}
            for name, value in settings.setdefault(header["lr"], setting).items():
                if setting.get(name) != value:
                    raise UserError(f"check: runs of {task} with {name} {value} and {setting.get(name)}; "
                                    "check them apart")
            steps, r = driven_r(rows)
            at, progress = progress_of(rows)
            r_at = regime.hold_last(steps, r, at)
            early = (progress < ACQUIRES[1]) & (r_at >= ACQUIRES[0])
            late = (progress > REFINES[1]) & (r_at <= REFINES[0])
            runs.append({"seed": header["seed"], "lr": header["lr"], "error": error(rows, steps, r),
                         "back": back(r), "too_early": int(early.sum()), "too_late": int(late.sum()),
                         "evaluations": len(at)})
            every = np.unique(np.round(np.geomspace(0.1 * header["steps"], header["steps"], 50)).astype(int))
            curves.setdefault(header["lr"], []).append(regime.hold_last(steps, r, every))
        rates = {}
        for lr, many in sorted(curves.items()):
            spread = float(np.std(many, axis=0, ddof=1).max()) if len(many) > 1 else None
            errors = [run["error"] for run in runs if run["lr"] == lr]
            rates[f"{lr:g}"] = {"seeds": len(many), "mean_error": float(np.mean(errors)), "spread": spread}
        alike = [rows for _, rows in _alike(recorded, task)]
        result[task] = {"runs": runs, "rates": rates, "ranges": ranges(alike),
                        "controls": controls(alike)}
    return result


def controls(runs: list[list[dict]]) -> dict:
    """Mean error of what measures nothing, over runs with the same settings: r = k / K; r = log(k / k_0) /
    log(K / k_0), k_0 the first probe; and the mean progress of the other runs. Both r and progress rise, so
    an r that says something has to be nearer to progress than the clocks are; the last is a floor."""
    found: dict[str, list] = {"clock": [], "clock in log k": []}
    progress = [progress_of(rows) for rows in runs]
    for at, mine in progress:
        K, first = at[-1], regime.FIRST
        found["clock"].append(np.abs(at / K - mine).mean())
        found["clock in log k"].append(np.abs(np.log(at / first) / np.log(K / first) - mine).mean())
    every = np.array([values for at, values in progress if len(at) == len(progress[0][0])])
    if len(every) > 1:
        others = [np.delete(every, n, 0).mean(0) for n in range(len(every))]
        found["other seeds' progress"] = list(np.abs(every - others).mean(1))
    return {name: float(np.mean(errors)) for name, errors in found.items()}


def ranges(runs: list[list[dict]]) -> dict:
    """Runs with the same settings -> {step (doublings from 64 on): {"D", "r", "progress": [least, most]}}."""
    found = {}
    for step in (64 * 2**k for k in range(20)):
        rows = [row for run in runs for row in run if row["step"] == step and "D_of" in row]
        if len(rows) < len(runs):
            break
        values = {"D": [regime.signal("levels", row["D_of"]) for row in rows],
                  "r": [row["r"] for row in rows],
                  "progress": [row["progress"] for row in rows if "progress" in row]}
        found[step] = {name: [min(many), max(many)] for name, many in values.items() if many}
    return found


def check_text(found: dict) -> str:
    lines = []
    for task, result in found.items():
        for run in result["runs"]:
            lines.append(f"{task:4s} seed {run['seed']:<4d} lr {run['lr']:g}: error {run['error']:.3f}, goes "
                         f"back {run['back']:.2f}, of {run['evaluations']} evaluations r is too early at "
                         f"{run['too_early']}, too late at {run['too_late']}")
        for lr, rate in result["rates"].items():
            spread = "-" if rate["spread"] is None else f"{rate['spread']:.3f}"
            lines.append(f"{task:4s} lr {lr}, seeds: {rate['seeds']}: mean error {rate['mean_error']:.3f} "
                         f"(at most {BOUNDS[task]:g}); largest deviation of r over seeds past the first "
                         f"tenth: {spread}")
        for name, mean_error in result["controls"].items():
            lines.append(f"{task:4s} control, {name} in the place of r: mean error {mean_error:.3f}")
        for step, of_step in result["ranges"].items():
            ends = [f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in of_step.items()]
            lines.append(f"{task:4s} step {step}: {', '.join(ends)}")
    return "\n".join(lines)


# --- does D fall where progress rises? ----------------------------------------------------------------------

def track(recorded: list[tuple[dict, list[dict]]]) -> dict:
    """Does a run that is ahead of the others in D at some time rise faster in progress at that time? Two
    trends always correlate, so rates are compared, each less its mean over the runs of the task at that step.
    -> {task: {signal: rate correlation (lab/statistics.py)}}, of what all of its runs measured at common
    evaluations. UserError: fewer than three runs of a task."""
    result = {}
    for task in sorted({header["task"] for header, _ in recorded}):
        runs = [{row["step"]: row for row in rows if "D_of" in row and "progress" in row}
                for header, rows in recorded if header["task"] == task]
        steps = sorted(set.intersection(*map(set, runs)))
        if len(runs) < 3 or len(steps) < 3:
            raise UserError(f"track: {len(runs)} runs of task {task} with {len(steps)} common evaluations; "
                            "three or more of each are needed")
        measured = set.intersection(*({*run[k]["D_of"]} for run in runs for k in steps))
        result[task] = {}
        for kind, names in regime.SIGNALS.items():
            if kind != "latent" and measured.issuperset(names):
                result[task][kind] = rate_correlation([
                    {"x": np.log2(steps), "D": [regime.signal(kind, run[k]["D_of"]) for k in steps],
                     "quality": [run[k]["progress"] for k in steps]} for run in runs])
    return result


def track_text(found: dict) -> str:
    lines = ["correlation of the rates at which D falls and progress rises, per doubling, each less its mean "
             "over runs, 95 %"]
    for task, signals in found.items():
        for kind, c in signals.items():
            lines.append(f"{task:4s} {kind:16s} {c['correlation']:+.3f} {format_interval(c['interval']):18s} "
                         f"p {c['p']:.3f}, {c['runs']} runs x {c['points']} rates")
    return "\n".join(lines)


# --- is a run normal? ---------------------------------------------------------------------------------------

def normal(recorded: list[tuple[dict, list[dict]]]) -> dict:
    """Runs over seeds, those of the commonest learning rate of each task -> {task: {"runs", "setting",
    "steps", name: [lowest, highest]}} for D, r and what r drives, lambda and m, at the probes.

    Between lowest and highest a further run lies with 95 %: mean +- t s sqrt(1 + 1 / n), t of n - 1 degrees
    of freedom; of D, which is positive and whose spread is a factor, in its logarithm. (The range of five
    runs would miss a third of the probes of a sixth.)"""
    result = {}
    for task in sorted({header["task"] for header, _ in recorded}):
        alike = _alike(recorded, task)
        if len(alike) < 3:
            raise UserError(f"normal: {len(alike)} runs of task {task} with the same settings; three or more "
                            "are needed")
        steps = driven_r(alike[0][1])[0]
        D = [[regime.signal("levels", row["D_of"]) for row in rows if "D_of" in row] for _, rows in alike]
        r_low, r_high = np.clip(_prediction([driven_r(rows)[1] for _, rows in alike]), 0, 1)
        cfg = Config(task=task)
        m_of = [sampler.between(r, sampler.LogitNormal(cfg.m_early), sampler.LogitNormal(cfg.m_late)).m
                for r in (*r_low, *r_high)]
        lam_of = [guidance.ssl_weight(r, cfg.lambda0, cfg.gamma) for r in (*r_low, *r_high)]
        n = len(steps)
        band = {"D": np.exp(_prediction(np.log(D))), "r": (r_low, r_high),
                "lambda": (lam_of[n:], lam_of[:n]), "m": (m_of[n:], m_of[:n])}   # both fall as r rises
        result[task] = {"runs": len(alike), "setting": {k: v for k, v in alike[0][0].items() if k != "seed"},
                        "steps": steps.tolist(),
                        **{name: np.round(np.array(ends, float), 4).tolist() for name, ends in band.items()}}
    return result


def _prediction(curves) -> np.ndarray:
    """(n, steps) -> (2, steps): lowest and highest value of a further curve at each step, 95 %."""
    curves = np.array(curves)
    n = len(curves)
    reach = scipy.stats.t.ppf(0.975, n - 1) * np.sqrt(1 + 1 / n) * curves.std(0, ddof=1)
    return np.array([curves.mean(0) - reach, curves.mean(0) + reach])


def normal_text(found: dict) -> str:
    lines = ["where a further run lies with 95 %"]
    for task, band in found.items():
        for k, step in enumerate(band["steps"]):
            if np.log2(step) % 1 == 0:
                ends = [f"{name} {band[name][0][k]:.2f} to {band[name][1][k]:.2f}" for name in ("D", "r")]
                lines.append(f"{task:4s} step {step:5d}, {band['runs']} runs: {', '.join(ends)}")
    return "\n".join(lines)


# --- why not t = 1 ------------------------------------------------------------------------------------------

@torch.no_grad()
def means(run: evaluate.Run, clips: int = 6_000, draws: int = 8) -> dict:
    """D between the mean of n true clips of a caption and another true clip of it -> {n: {"frames", "pooled",
    "captions"}}. At t = 1 the best prediction is such a mean, of all clips that the caption allows."""
    world = data.open_set({**run.config, "data": "soundworld"}, "train", clips)
    of_caption: dict[str, list[int]] = {}
    for i in range(clips):
        of_caption.setdefault(world.caption(i), []).append(i)
    ns, rng = (1, 2, 4, 8), np.random.default_rng(0)
    enough = [same for same in of_caption.values() if len(same) > max(ns)]
    extract = TeacherFeatures(run.codec, load_teacher())
    z = {i: run.codec.encode(torch.from_numpy(world.wave(i))[None])[0] for same in enough for i in same}
    phi_mean = torch.cat([extract(x[None])[0] for x in z.values()]).mean(0)

    found = {}
    for n in ns:
        frames, pooled = [], []
        for same in enough:
            for _ in range(draws):
                target, *others = (z[i] for i in rng.permutation(same)[: n + 1])
                a, b = extract(torch.stack(others).mean(0)[None]), extract(target[None])
                frames.append(float(regime.discrepancy(a, b, phi_mean)))
                a, b = (regime.over_tokens(x)[:, None] for x in (a, b))
                pooled.append(float(regime.discrepancy(a, b, phi_mean)))
        found[n] = {"frames": np.mean(frames), "pooled": np.mean(pooled), "captions": len(enough)}
    return found


def means_text(found: dict) -> str:
    lines = ["mean of n true clips of a caption against another one: D token by token, pooled"]
    lines += [f"n = {n}: {row['frames']:.3f}, {row['pooled']:.3f}" for n, row in found.items()]
    return "\n".join(lines)


# --- commands -----------------------------------------------------------------------------------------------

OF_RECORDINGS = {"choose": (choose, choice_text), "check": (check, check_text), "track": (track, track_text),
                 "normal": (normal, normal_text)}


def record_all(paths: list[Path], out: Path) -> None:
    """Run folders -> OUT/NAME.jsonl of each."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise UserError("record: two runs have folders of one name, and would have one file; rename one")
    for path in paths:
        lines = [to_json(row) for row in record(path)]
        write_text(out / f"{path.name}.jsonl", "\n".join(lines) + "\n")
        print(f"{out / path.name}.jsonl: {len(lines) - 1} rows")


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.regime_choice")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record", help="runs as small files")
    command.add_argument("paths", nargs="+", type=Path, metavar="RUN")
    command.add_argument("--out", type=new_folder, required=True, help="folder of the files")
    command = commands.add_parser("means", help="D of means of true clips, by a run's codec and teacher")
    command.add_argument("paths", nargs=1, type=Path, metavar="RUN")
    command.add_argument("--out", type=new_json, help="JSON")
    for name in OF_RECORDINGS:
        command = commands.add_parser(name, help="of files of `record`")
        command.add_argument("paths", nargs="+", type=Path, metavar="FILE")
        command.add_argument("--out", type=new_json, help="JSON")
    args = parser.parse_args()

    if args.command == "record":
        record_all(args.paths, args.out)
        return
    if args.command == "means":
        found, text = means(evaluate.load_run(args.paths[0])), means_text
    else:
        function, text = OF_RECORDINGS[args.command]
        found = function([read(path) for path in args.paths])
    print(text(found))
    if args.out:
        write_text(args.out, to_json(found, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
