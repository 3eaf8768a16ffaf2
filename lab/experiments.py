"""The experiments: arms with their controls, over seeds, to a table and a figure.

    python -m lab.experiments list                                 # the experiments and their arms
    python -m lab.experiments run E1 --seeds 8 --out runs/e1       # runs what is missing; table and figure
    python -m lab.experiments run E1 --dry-run                     # arms and hours, before anyone waits
    python -m lab.experiments run E1 --arm 'mine={"lambda0": 1}'   # your own arm beside them (or --arms FILE)
    python -m lab.experiments run E1 --jobs 4                      # four runs at a time, on one GPU say
    python -m lab.experiments run E1 --shard 2/8 --out /shared/e1  # the second of eight machines' share
    python -m lab.experiments table results/e1                     # the table again, from the rows on disk
    python -m lab.experiments table results/e1 --against clock     # differences from another arm

Shards fill one folder, each with every eighth seed, so that arms are compared on one machine; the last to end
prints the whole table. With --jobs on a GPU this process never touches the GPU: settings are resolved and
runs made in its children (a parent's own context would take their memory, and bars them from a card that
admits one).

An experiment is a list of arms, each a name and options of train.py (lab/questions.py). An interrupted one
goes on with the same command; what is finished is not run again (lab/runner.py). The folder then holds
experiment.json (arms, seeds, reference), rows.jsonl (one row an arm x seed x evaluation), summary.json,
table.txt (lab/tables.py), figure.png (lab/learning_curves.py), plane.json and plane.png (lab/plane.py, where
runs have both axes), of E5 track.json, of E9 best.json and best.png. Runs whose rows stand there are not made
again, on whichever machine they were made.

Intervals are Student's t over seeds, of paired differences; fewer than 8 seeds are labelled descriptive.
p-values are of sign-flip tests, exact up to 16 seeds; the smallest p that n seeds can reach (2 / 2^n) is
printed (lab/statistics.py).

Public: COMMON, read_arms, tuned_clocks, shard, plan, show, main.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
import typing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import open_data
from lab.bench import estimate_hours
from lab.best_by_step import best_by_step, best_figure, best_table
from lab.learning_curves import learning_figure
from lab.plane import plane, plane_figure, plane_table
from lab.questions import CLOCK, EXPERIMENTS, HOME, reference_of
from lab.runner import (
    DERIVED,
    ROOT,
    UNLIKE,
    collect,
    derived,
    folder_of,
    job,
    other_rows,
    other_settings,
    recorded_runs,
    refuse_missing_source,
    refuse_unknown_source,
    resolve_arm,
    share,
    slug,
)
from lab.tables import final_metric, summarize, table, track, track_table
from parts.arguments import Parser, new_folder, whole
from parts.cache import parallel_map
from parts.config import CHOICES, Config, refuse_without_effect, wrong_value
from parts.devices import pick_device
from parts.errors import Stopped, UserError, run_cli
from parts.files import file_lock, read_json, reading, to_json, write_text

# Settings that the command line may give to all arms.
COMMON = ("task", "preset", "precision", "data", "val_fold", "clap", "audio_model", "device", "steps",
          "eval_every", "score_clips", "score_split", "judge", "clips")
PILOT = "PILOT: short runs, few seeds; to see the machinery work, not to decide anything\n"


# --- what is to be run --------------------------------------------------------------------------------------

def read_arms(own: list[str], file: str | None, taken=()) -> dict:
    """The user's own arms, from --arm NAME=JSON (several) and --arms FILE (a JSON object of objects); checked
    against train.py's options. taken: names of the experiment's arms. UserError says what is wrong."""
    given = []  # (name, options)
    for text in own:
        name, _, body = text.partition("=")
        try:
            given.append((name.strip(), json.loads(body)))
        except (ValueError, RecursionError) as e:
            raise UserError(f"--arm {text[:80]}: must be NAME={{...}} with options of train.py as JSON "
                            f"({str(e)[:80]})") from None
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
            given += json.loads(text, object_pairs_hook=_without_doubles).items()
        except (OSError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(f"--arms {file}: not a JSON file of arms ({str(e)[:120]})") from None

    known = {f.name for f in dataclasses.fields(Config)} - {"out", "seed"}
    folders = {slug(name): name for name in taken}
    for name, options in given:
        if not isinstance(options, dict) or not slug(name):
            raise UserError(f"arm {name!r}: must be an object of train.py options")
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(f"arm {name!r}: train.py has no option {unknown[0]!r}")
        wrong = wrong_value(options)
        if wrong:
            raise UserError(f"arm {name!r}: --{wrong}")
        if slug(name) in folders:  # its runs would be taken for the other's
            raise UserError(f"arm {name!r}: there is an arm {folders[slug(name)]!r}, and runs of both would "
                            "have one folder; choose another name")
        folders[slug(name)] = name
    return dict(given)


def _without_doubles(pairs: list[tuple]) -> dict:
    """A JSON object; ValueError for a name that stands there twice, of which Python would keep the last."""
    names = [name for name, _ in pairs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double!r} stands there twice")
    return dict(pairs)


def _read_experiment(folder: Path, otherwise: str) -> dict:
    """experiment.json of a folder; where there is none, the UserError `otherwise`."""
    path = folder / "experiment.json"
    if not path.is_file():
        raise UserError(otherwise)
    spec = read_json(path)
    with reading(path):
        for name, kind in (("experiment", str), ("arms", dict), ("seeds", list), ("reference", str)):
            if not isinstance(spec[name], kind):
                raise TypeError(f"{name} is {spec[name]!r}")
        if spec["experiment"] not in EXPERIMENTS:
            raise ValueError(f"experiment {spec['experiment']!r} is none of {', '.join(EXPERIMENTS)}")
        if not all(isinstance(options, dict) for options in spec["arms"].values()):
            raise TypeError("an arm is no object")
        if not all(isinstance(seed, int) for seed in spec["seeds"]):
            raise TypeError(f"seeds are {spec['seeds']!r}")
    return spec


def _best_clock(rows: list[dict], arms: dict, setting: str) -> str | None:
    """The clock of a setting with the best mean final metric; None: none has finished."""
    finals = {}  # clock -> its seeds' final metrics
    for arm in arms:
        if arm.startswith(f"{setting}: {CLOCK}"):
            finals[arm] = [r["final"] for r in rows if r["arm"] == arm and "final" in r]
    if not any(finals.values()):
        return None
    key, sign, _ = final_metric(rows)
    means = {arm: np.mean([final[key] for final in scores]) for arm, scores in finals.items() if scores}
    best = max(means, key=lambda arm: sign * means[arm])
    return best.rpartition(": ")[2]


def tuned_clocks(arms: dict, folder: Path, seeds: list[int]) -> dict:
    """E7's arms for fresh seeds, in the settings that `folder` (E7 on development seeds) has: of its clocks
    only the one that did best there (re-tuned), and the one that did best at home (frozen). UserError: no
    experiment there, or one that has seen these seeds or test clips."""
    first = "run E7 there first, on other seeds"
    spec = _read_experiment(folder, f"--tuned {folder}: no experiment.json; {first}")
    seen = set(spec["seeds"]) & set(seeds)
    if seen:
        raise UserError(f"--tuned {folder}: chosen on seed {min(seen)} too, which would flatter the clocks; "
                        f"use --first-seed {max(spec['seeds']) + 1}")
    if any(options.get("score_split") != "val" for options in spec["arms"].values()):
        raise UserError(f"--tuned {folder}: chosen on test clips, which its clocks would then be judged by; "
                        "run E7 there with --score-split val")
    with file_lock(folder / ".lock"):
        rows = collect(folder, spec["experiment"], spec["arms"], spec["seeds"])

    settings = []
    for setting in dict.fromkeys(arm.rpartition(": ")[0] for arm in arms):
        if setting == HOME or any(arm.startswith(f"{setting}: ") for arm in spec["arms"]):
            settings.append(setting)
    best = {}
    for setting in settings:
        best[setting] = _best_clock(rows, arms, setting)
        if best[setting] is None:
            raise UserError(f"--tuned {folder}: no finished clock of setting {setting!r}")

    chosen = {}
    for setting in settings:
        frozen, retuned = best[HOME], best[setting]
        for name in dict.fromkeys(("stage", "static", frozen, retuned)):
            roles = [role for role, clock in (("frozen", frozen), ("re-tuned", retuned)) if clock == name]
            suffix = f" ({', '.join(roles)})" if roles else ""
            chosen[f"{setting}: {name}{suffix}"] = arms[f"{setting}: {name}"]
    return chosen


def plan(args) -> tuple[dict, dict, list[int], str]:
    """Arguments of `run` -> arms {name: options}, common options, seeds, reference."""
    experiment = EXPERIMENTS[args.experiment]
    typed = {name: getattr(args, name) for name in COMMON if getattr(args, name) is not None}
    common = {**experiment.base, **typed}
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    if args.tuned and args.experiment != "E7":
        raise UserError("--tuned belongs to E7, whose clocks are chosen on development seeds")
    own = read_arms(args.arm, args.arms, experiment.arms)
    arms = tuned_clocks(experiment.arms, args.tuned, seeds) if args.tuned else experiment.arms
    arms = {**arms, **own}
    for name, options in arms.items():
        refuse_unknown_source(name, options, arms)
    for name, options in own.items():
        stand_in = {"regime": "clock"} if derived(options) else {}
        try:
            refuse_without_effect({**common, **options, **stand_in}, options)
        except UserError as e:
            raise UserError(f"arm {name!r}: {e}") from None
    if args.only:
        missing = [name for name in args.only if name not in arms]
        if missing:
            raise UserError(f"--only {missing[0]}: no such arm; there are: {', '.join(arms)}")
        arms = {name: options for name, options in arms.items() if name in args.only or name in own}

    arms = {name: {**common, **options} for name, options in arms.items()}
    return arms, common, seeds, _reference(args.experiment, arms)


def _reference(experiment: str, arms: dict) -> str:
    """The experiment's own reference; where it was left out, the first arm, in each setting its own."""
    reference = EXPERIMENTS[experiment].reference
    if any(reference_of(arm, arms, reference) for arm in arms):
        return reference
    first = next(iter(arms))
    setting, _, name = first.rpartition(": ")
    in_several = any(arm.endswith(f": {name}") for arm in arms if arm != first)
    return name if setting and in_several else first


# --- running it ---------------------------------------------------------------------------------------------

def _check(arms: dict, runs: list[tuple]) -> tuple[dict, float]:
    """Settings of every arm, checked with its data before any is run (UserError), and the hours that the runs
    take."""
    resolved, opened = {}, set()
    for name, options in arms.items():
        try:
            cfg = resolved[name] = resolve_arm(options)
            clips = (cfg.data, cfg.clips, cfg.val_fold, cfg.seconds, cfg.max_bad_share)
            if clips not in opened:
                for split in ("train", "val"):
                    open_data(clips[0], split, *clips[1:])
                opened.add(clips)
        except UserError as e:
            raise UserError(f"arm {name!r}: {e}") from None
    return resolved, estimate_hours([arms[arm] for arm, _ in runs])


def _check_apart(arms: dict, runs: list[tuple]) -> tuple[dict, float]:
    """_check; where there is a GPU, which it asks and times, in a process of its own."""
    devices = {pick_device(options.get("device", "auto")) for options in arms.values()}
    if not any(device.startswith("cuda") for device in devices):
        return _check(arms, runs)
    ((_, checked),) = parallel_map(_check, [arms], (runs,), workers=1, apart=True)
    return checked


def _describe(args, arms: dict, common: dict, runs: list[tuple], steps: int, hours: float) -> str:
    """What is about to be run, and how long it takes. common: settings of all arms; they are not repeated."""
    which = f"{len(arms)} arms x {args.seeds} seeds"
    if args.shard:
        which = f"shard {args.shard[0]} of {args.shard[1]}: {len(runs)} of the runs of {which}"
    lines = [f"{args.experiment}: {EXPERIMENTS[args.experiment].question}",
             f"{which}, {steps} steps, about {hours:.1f} hours here, one run at a time"]
    for arm, options in arms.items():
        own = {name: value for name, value in options.items() if common.get(name) != value}
        lines.append(f"  {arm:26s} {to_json(own)}")
    return "\n".join(lines)


def _refuse_other_runs(out: Path, arms: dict, seeds: list[int]) -> None:
    """UserError where a run of this folder has other settings than it would be given now."""
    for arm, seed in itertools.product(arms, seeds):
        begun = folder_of(out, arm, seed) / "config.json"
        differs = other_settings(arms[arm], seed, read_json(begun)) if begun.is_file() else None
        if differs:
            raise UserError(f"{begun.parent}: a run with {differs}; give another --out, or delete it")
    differs = other_rows(out, arms, seeds)
    if differs:
        raise UserError(f"{out / 'rows.jsonl'}: holds {differs}; give another --out")


def _runs_at_a_time(args, resolved: dict) -> int:
    """--jobs, or four where any GPU has room for several networks of the size of `smoke`."""
    if args.jobs:
        return args.jobs
    on_gpu = next(iter(resolved.values())).device.startswith("cuda")
    return 4 if on_gpu and max(cfg.width for cfg in resolved.values()) <= Config.width else 1


def _write_spec(out: Path, spec: dict) -> None:
    """experiment.json: all that this command, and those before it in this folder, were asked for. UserError
    where one was asked for something else under the same name."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "experiment.json"
    with file_lock(out / ".lock"):
        if path.is_file():
            old = _read_experiment(out, "")
            other = _other_arm(old, spec)
            if other:
                raise UserError(f"{out}: holds {other}; give the same command, or another --out")
            # In the experiment's order, whichever came first: that of its own arms, then the user's.
            both = {**old["arms"], **spec["arms"]}
            order = [arm for arm in EXPERIMENTS[spec["experiment"]].arms if arm in both]
            arms = {arm: both[arm] for arm in (*order, *both)}
            spec = {**spec, "arms": arms, "seeds": sorted({*old["seeds"], *spec["seeds"]}),
                    "reference": _reference(spec["experiment"], arms)}
        write_text(path, to_json(spec, indent=1) + "\n")


def _other_arm(old: dict, spec: dict) -> str | None:
    """What an experiment has otherwise than this one under the same name; None: nothing."""
    if old["experiment"] != spec["experiment"]:
        return f"experiment {old['experiment']}"
    for arm, options in spec["arms"].items():
        before = old["arms"].get(arm, options)
        for name in sorted({"recipe", *before, *options} - (set(UNLIKE) - {"recipe"})):
            if before.get(name) != options.get(name):
                return f"arm {arm!r} with {name} {before.get(name)}, not {options.get(name)}"
    return None


def _run_all(name: str, out: Path, arms: dict, seeds: list[int], runs: list[tuple], packed: int) -> dict:
    """Make the runs (arm, seed), `packed` at a time -> {which: why} of those that failed. Stopped: by the
    user."""
    def need(arm_seed: tuple) -> int:
        return DERIVED.get(derived(arms[arm_seed[0]]), 0)

    # By need (a replayed run comes after what it replays), then by seed: an interrupted experiment has whole
    # pairs.
    jobs = sorted(runs, key=need)
    workers = packed if packed > 1 else 0
    failed, stopped = {}, []
    bar = tqdm(total=len(jobs), desc=name, unit="run", dynamic_ncols=True)
    for _, level in itertools.groupby(jobs, key=need):
        ended = parallel_map(job, list(level), (out, arms, seeds, packed), workers, ahead=1,
                             apart=workers > 0)
        for (arm, seed), (status, why) in ended:
            bar.update()
            if status == "failed":  # one arm's failure must not cost the others
                failed[f"{arm}, seed {seed}"] = why.strip().splitlines()[-1]
                with open(out / "failures.log", "a") as f:
                    f.write(f"--- {arm}, seed {seed}\n{why}\n")
            if status == "stopped":
                stopped.append(f"{why.split(';')[0]} in arm {arm!r}, seed {seed}")
                if packed == 1:
                    break
        if stopped:
            bar.close()
            raise Stopped(f"{stopped[0]}; the same command continues")
    bar.close()
    return failed


# --- commands -----------------------------------------------------------------------------------------------

def cmd_list(args) -> None:
    for name, experiment in EXPERIMENTS.items():
        print(f"{name}  {experiment.question}\n    {', '.join(experiment.arms)}")


def cmd_run(args) -> None:
    # Every arm is checked before any is run.
    arms, common, seeds, reference = plan(args)
    out = args.out or ROOT / "runs" / args.experiment.lower()
    refuse_missing_source(out, arms, seeds)
    runs = share(arms, seeds, *(args.shard or (1, 1)))
    resolved, hours = _check_apart(arms, runs)
    print(_describe(args, arms, common, runs, next(iter(resolved.values())).steps, hours))
    if args.dry_run:
        return
    arms = {name: {**options, "steps": resolved[name].steps, "precision": resolved[name].precision}
            for name, options in arms.items()}
    _refuse_other_runs(out, arms, seeds)

    # What was asked for is written down first: `table` works on what there is, at any time.
    spec = {"experiment": args.experiment, "arms": arms, "seeds": seeds, "reference": reference,
            "pilot": args.pilot}
    was_there = (out / "experiment.json").exists()
    _write_spec(out, spec)
    recorded = recorded_runs(out, arms, seeds, runs)
    if recorded:
        print(f"{len(recorded)} of them stand in {out / 'rows.jsonl'} and are not made again")
        runs = [run for run in runs if run not in recorded]
    if not runs and args.shard:
        print("no run is left to this shard")
        return
    began = time.time()
    failed = _run_all(args.experiment, out, arms, seeds, runs, _runs_at_a_time(args, resolved))
    for which, why in failed.items():
        print(f"FAILED {which}: {why} (see {out / 'failures.log'})")
    if failed and len(failed) == len(runs) and not was_there:      # what can't be run claims no folder
        (out / "experiment.json").unlink(missing_ok=True)
        sys.exit(1)
    show(out)
    print(f"{time.time() - began:.0f} s in this call; rows: {out / 'rows.jsonl'}")
    if failed:
        sys.exit(1)


def cmd_table(args) -> None:
    if args.against is None:
        show(args.folder)
    else:
        print(_table_against(args.folder, args.against))


def _read_finished(out: Path) -> dict:
    """experiment.json of a folder whose table is asked for; UserError where it is none."""
    return _read_experiment(out, f"{out}: no experiment.json; not the folder of an experiment")


def _table_against(out: Path, reference: str) -> str:
    """The table with differences from another arm; nothing is written."""
    spec = _read_finished(out)
    if reference not in spec["arms"]:
        raise UserError(f"--against {reference}: must be one of {', '.join(spec['arms'])}")
    rows = collect(out, spec["experiment"], spec["arms"], spec["seeds"])
    if not any(row["arm"] == reference for row in rows):
        raise UserError(f"--against {reference}: no finished run yet")
    return table(spec["experiment"], rows, spec["arms"], spec["seeds"], reference)


def show(out: Path) -> None:
    """Print the table of an experiment's folder; write table.txt, summary.json, figure.png, rows.jsonl, where
    runs have both axes plane.json and plane.png; for E5 track.json, for E9 best.json and best.png. UserError
    where there is nothing to show."""
    _read_finished(out)
    # One process at a time: several shards may end together. Rows are read from the runs' own folders, so the
    # last one writes them all.
    with file_lock(out / ".lock"):
        text = _write_tables(out, _read_finished(out))
    print("\n" + text)


def _write_tables(out: Path, spec: dict) -> str:
    """The files that `show` writes; -> the table."""
    name, arms, seeds, reference = spec["experiment"], spec["arms"], spec["seeds"], spec["reference"]
    rows = collect(out, name, arms, seeds)
    if not rows:
        raise UserError(f"{out}: no finished run yet")
    finished = [arm for arm in arms if any(row["arm"] == arm and "final" in row for row in rows)]
    note = ""
    if finished and not any(reference_of(arm, arms, reference) in finished for arm in arms):
        note = f"no run of {reference!r} has finished: differences are from {finished[0]!r}\n"
        reference = finished[0]
    text = note + table(name, rows, arms, seeds, reference)
    if spec.get("pilot"):
        text = PILOT + text
    if name == "E5":
        found = track(rows)
        text += "\n\n" + track_table(found)
        write_text(out / "track.json", to_json(found, indent=1) + "\n")
    both = plane(rows, arms, reference)
    if both:
        text += "\n\n" + plane_table(both)
        write_text(out / "plane.json", to_json(both, indent=1) + "\n")
        plane_figure(out / "plane.png", both)
    if name == "E9":
        found = best_by_step(rows)
        text += "\n\n" + best_table(found)
        write_text(out / "best.json", to_json(found, indent=1) + "\n")
        best_figure(out / "best.png", found, list(arms), len(seeds))
    write_text(out / "summary.json", to_json(summarize(rows, arms, reference), indent=1) + "\n")
    write_text(out / "table.txt", text + "\n")
    learning_figure(out / "figure.png", name, rows, arms, reference)
    return text


def shard(text: str) -> tuple[int, int]:
    """An argparse type: 2/8, the second of eight."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and len(text) < 12 and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be K/N, the K-th of N shards, such as 2/8")
    return int(k), int(n)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument("--out", type=new_folder)
    parser.add_argument("--seeds", type=whole(1), default=8)
    parser.add_argument("--first-seed", type=whole(), default=0)
    parser.add_argument("--only", nargs="+", action="extend", metavar="ARM",
                        help="these of its arms alone (your own are run anyway)")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=JSON", help="your own arm")
    parser.add_argument("--arms", metavar="FILE", help="your own arms: a JSON object of objects")
    parser.add_argument("--tuned", type=Path, metavar="FOLDER",
                        help="E7: keep the best clock of each setting, by this folder's E7 on other seeds")
    parser.add_argument("--jobs", type=whole(), default=0,
                        help="runs at a time; 0: one, or four on a GPU if none is wider than `smoke`")
    parser.add_argument("--shard", type=shard, metavar="K/N",
                        help="this share of the runs alone; N machines with one command fill one folder")
    parser.add_argument("--pilot", action="store_true", help="mark the table as a pilot")
    parser.add_argument("--dry-run", action="store_true")
    types = typing.get_type_hints(Config)
    for name in COMMON:
        parser.add_argument("--" + name.replace("_", "-"), dest=name, type=types[name],
                            choices=CHOICES.get(name), help="as in train.py, for all arms")


def main() -> None:
    parser = Parser(__doc__, prog="python -m lab.experiments")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="the experiments and their arms")
    command.set_defaults(run_command=cmd_list)
    command = commands.add_parser("run", help="run what is missing, print the table")
    _add_run_arguments(command)
    command.set_defaults(run_command=cmd_run)
    command = commands.add_parser("table", help="table and figure again")
    command.add_argument("folder", type=Path)
    command.add_argument("--against", metavar="ARM", help="print differences from this arm; write nothing")
    command.set_defaults(run_command=cmd_table)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    run_cli(main)
