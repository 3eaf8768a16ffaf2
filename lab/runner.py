"""Runs of an experiment: make what is missing, find what exists, write it all down as rows.

Every arm x seed is an ordinary run folder, OUT/runs/ARM-sSEED, made by train.train, so it can be resumed,
generated from and scored like any other. A finished one is not run again, nor one that another experiment
beside this one has made. All arms of one seed see the same data, steps, initial weights, batches and
evaluation noise.

Comes in: OUT, the experiment's folder; arms {name: train.py options}; seeds. Goes out: rows.jsonl, one row an
arm x seed x evaluation (lab/tables.py), and next to each run made.json, what it was made with.

Arms may name five sources of r that train.py does not know (lab/questions.py). They are made here, most
from other runs' logs, as a file that the run replays; so the runs that they are made of must come first.

Public: DERIVED, derived, slug, folder_of, share, resolve_arm, provenance, other_settings, other_rows,
find_finished_run, run_arm, job, recorded_runs, collect, refuse_unknown_source, refuse_missing_source,
ROOT, UNLIKE.
"""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
import subprocess
import traceback
from pathlib import Path

import numpy as np
import torch

import evaluate
import regime
import train
from lab.axes import both_axes, final_axes
from parts import config
from parts.cache import cores
from parts.dashboard import steps_and_values
from parts.devices import hardware
from parts.errors import UserError
from parts.files import read_json, reading, to_json, write_text
from parts.runs import read_log, read_scores

ROOT = Path(__file__).resolve().parents[1]
# Settings that two runs may differ in and still be the same. (What a recipe sets is compared itself.)
UNLIKE = ("out", "recipe", "device", "workers", "profile")
R_CHANGES = "r_changes"  # key of a run's last row: [[step, r], ...], each r from that step on


# --- names --------------------------------------------------------------------------------------------------

def slug(name: str) -> str:
    """An arm's name as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "-+." else "-" for c in name).strip("-")


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """The run folder of an arm x seed."""
    return out / "runs" / f"{slug(arm)}-s{seed}"


# --- sources of r that are made of other runs ---------------------------------------------------------------

# Kind of source -> which runs must come first: none (0), the same seed's (1), all seeds' (2).
DERIVED = {"ramp": 0, "warped": 1, "permuted": 1, "reversed": 1, "yoked": 2}


def derived(options: dict) -> str | None:
    """The kind of an arm's source of r if it is made here and replayed, else None."""
    kind = str(options.get("regime", "")).split(":")[0]
    return kind if kind in DERIVED else None


def warp(steps: np.ndarray, r: np.ndarray, K: int, seed: int) -> np.ndarray:
    """r (n,), written at steps (n,), at a randomly warped time: r(K u^g) at u = k / K, k = 1 ... K, with log2
    g uniform in [-1, 1]. As smooth and as monotone as r, at the wrong moments. -> (K,)."""
    g = 2 ** np.random.default_rng([seed, 31]).uniform(-1, 1)
    u = np.arange(1, K + 1) / K
    return regime.hold_last(steps, r, K * u**g)


def _seed_replayed(kind: str, seed: int, seeds: list[int]) -> int:
    """Of which seed is the run that this kind of source replays under `seed`?"""
    return seeds[(seeds.index(seed) + 1) % len(seeds)] if kind == "yoked" else seed


def _r_of(out: Path, arm: str, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps, r) of a finished run: of its log, or of its rows where its folder is gone. None: of neither."""
    log = folder_of(out, arm, seed) / "log.jsonl"
    if (log.parent / "scores.json").is_file():
        return regime.read_r(log)
    recorded = _recorded_rows(out).get((arm, seed))
    if recorded and R_CHANGES in recorded[-1]:
        steps, r = zip(*recorded[-1][R_CHANGES])
        return np.array(steps), np.array(r)
    return None


def _replayed(kind: str, what: str, K: int, out: Path, arm: str, seed: int, seeds: list[int]) -> np.ndarray:
    """r (K,) of another run: the same seed's, warped, permuted or reversed, or the next seed's, as it was."""
    if kind == "yoked" and len(seeds) < 2:
        raise UserError(f"arm {arm!r} replays another seed's regime; give at least --seeds 2")
    replayed = _seed_replayed(kind, seed, seeds)
    found = _r_of(out, what, replayed)
    if found is None:
        log = folder_of(out, what, replayed) / "log.jsonl"
        raise UserError(f"arm {arm!r} replays {log}, which is missing or of a run that has not ended; "
                        f"run arm {what!r} first")
    steps, r = found
    if kind == "warped":
        return warp(steps, r, K, seed)
    r = regime.hold_last(steps, r, np.arange(1, K + 1))
    # The same values, so the same lambda and p(t) on average over the run: what differs is when they come.
    if kind == "permuted":
        return np.random.default_rng([seed, 37]).permutation(r)
    if kind == "reversed":
        return r[::-1]
    return r


def source_file(source: str, options: dict, out: Path, arm: str, seed: int, seeds: list[int]) -> str:
    """`warped:ARM`, `permuted:ARM`, `reversed:ARM`, `yoked:ARM` and `ramp:SHARE` -> replay:FILE, written next
    to the run. UserError: ARM has not run, or there is no other seed."""
    kind, _, what = source.partition(":")
    K = options["steps"]
    if kind == "ramp":
        r = np.minimum(1.0, np.arange(1, K + 1) / (float(what) * K))
    else:
        r = _replayed(kind, what, K, out, arm, seed, seeds)
    path = out / "runs" / f"{slug(arm)}-s{seed}.r.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json({"step": k, "r": float(v)}) + "\n" for k, v in enumerate(r, 1)))
    return f"replay:{path}"


def refuse_unknown_source(arm: str, options: dict, arms: dict) -> None:
    """UserError where an arm's r is to be made of an arm that is none of `arms`, or is to reach 1 after a
    share of the steps that is not positive (above 1: it does not get there)."""
    kind, _, what = str(options.get("regime", "")).partition(":")
    if kind == "ramp":
        try:
            possible = 0 < float(what) < float("inf")
        except ValueError:
            possible = False
        if not possible:
            raise UserError(f"arm {arm!r}: regime ramp:{what}: must be ramp:SHARE, with a positive share of "
                            "the steps")
    elif kind in DERIVED and what not in arms:
        raise UserError(f"arm {arm!r}: regime {kind}:{what}: there is no arm {what!r}; there are: "
                        f"{', '.join(arms)}")


def refuse_missing_source(out: Path, arms: dict, seeds: list[int]) -> None:
    """UserError where an arm's r is to be made of an arm that is neither run now nor finished in `out`."""
    for name, options in arms.items():
        kind, _, what = str(options.get("regime", "")).partition(":")
        if DERIVED.get(kind) and what not in arms and any(_r_of(out, what, seed) is None for seed in seeds):
            raise UserError(f"arm {name!r} replays the r of arm {what!r}, which is not to be run and has not "
                            f"finished in {out}; add it to --only")


# --- shards -------------------------------------------------------------------------------------------------

def share(arms: dict, seeds: list[int], k: int, n: int) -> list[tuple[str, int]]:
    """Runs (arm, seed) of the k-th (from 1) of n shards: whole seeds, of which it has every n-th, so that
    arms that are compared are of one machine; with each run those that replay it, so that no shard waits."""
    runs = []
    for seed, arm in itertools.product(seeds, arms):
        _, origin = _origin(arm, seed, arms, seeds)
        if 1 + seeds.index(origin) % n == k:
            runs.append((arm, seed))
    return runs


def _replayed_by(arm: str, seed: int, arms: dict, seeds: list[int]) -> tuple[str, int] | None:
    """The run whose r this one replays; None: it replays none."""
    kind = derived(arms.get(arm, {}))
    if not kind or kind == "ramp":
        return None
    return arms[arm]["regime"].partition(":")[2], _seed_replayed(kind, seed, seeds)


def _origin(arm: str, seed: int, arms: dict, seeds: list[int]) -> tuple[str, int]:
    """The run whose r this one replays, or that one's, and so on; itself where it replays none."""
    for _ in arms:
        arm, seed = _replayed_by(arm, seed, arms, seeds) or (arm, seed)
    return arm, seed


# --- which runs are the same --------------------------------------------------------------------------------

def resolve_arm(options: dict, **more) -> config.Config:
    """Settings of an arm, checked (UserError). A source of r that is made later can't be checked: the clock
    stands in."""
    stand_in = {"regime": "clock"} if derived(options) else {}
    cfg = config.resolve({**options, **stand_in, **more, "out": "unused"})
    train.open_regime(cfg)
    return cfg


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def provenance(device: str = "cpu") -> dict:
    """What a run on a device was made with: commit (with + where any .py file of the tree differs from it),
    versions, machine."""
    # Git's * also matches slashes: this is every .py file below ROOT, whatever its folder.
    changed = _git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
    commit = _git("rev-parse", "--short", "HEAD").stdout.strip()
    return {
        "commit": commit + ("+" if changed else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": hardware(device),
        "threads": torch.get_num_threads(),
    }


def _first_difference(made_with: dict, wanted: dict, *ignored: str) -> str | None:
    """The first setting that differs, as "steps 100, not 3000"; None: there is none. What `made_with` lacks
    did not exist when the run was made, and counts as equal."""
    for name, value in wanted.items():
        if name not in (*UNLIKE, *ignored) and made_with.get(name, value) != value:
            return f"{name} {made_with[name]}, not {value}"
    return None


def other_settings(options: dict, seed: int, made_with: dict) -> str | None:
    """What a run with the settings `made_with` has otherwise than one with these options would, as "steps
    100, not 3000"; None: nothing."""
    wanted = dataclasses.asdict(resolve_arm(options, seed=seed))
    ignored = []
    if derived(options):
        ignored.append("regime")     # made_with holds the path of a file
    if wanted["codec"] != "mel":
        ignored.append("channels")   # made_with holds what the codec has
    if wanted["data"] == "soundworld":
        ignored.append("val_fold")   # it has none
    return _first_difference(made_with, wanted, *ignored)


def find_finished_run(out: Path, options: dict, seed: int) -> Path | None:
    """A finished run of an experiment beside `out` with the very same settings, made at this commit: E1's
    `stage` is E3's `slope`. None: there is none."""
    commit = provenance()["commit"]
    # A derived source is made of other runs of its own experiment; code that is not committed may have
    # changed.
    if derived(options) or not commit or commit.endswith("+"):
        return None
    wanted = dataclasses.asdict(resolve_arm(options, seed=seed))
    for made in sorted(out.parent.glob("*/runs/*/made.json")):
        same_commit = read_json(made).get("commit") == commit
        if same_commit and not _first_difference(config.load_config(made.parent), wanted):
            return made.parent
    return None


# --- runs ---------------------------------------------------------------------------------------------------

def _copy_or_link(source: str, target: str) -> None:
    """Weights are linked: they are large, and only ever replaced."""
    if source.endswith(".pt"):
        with contextlib.suppress(OSError):                 # another disk, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def run_arm(out: Path, arm: str, options: dict, seed: int, seeds: list[int]) -> Path:
    """Train one arm x seed, or continue it, or find it finished, here or beside. Returns its folder."""
    path = folder_of(out, arm, seed)
    if (path / "made.json").is_file():
        return path
    same = None if path.exists() else find_finished_run(out, options, seed)
    if same:
        # It appears whole, or a copy that was broken off would count as finished.
        copied = out / f"copying-{path.name}-{os.getpid()}"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(same, copied, copy_function=_copy_or_link)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(copied, path)
        return path

    # The commit is that of the code as it is now, before hours of training; a resumed run may have several.
    begun = path.with_name(f"{path.name}.commits.json")
    commits = []
    if begun.is_file() and path.exists():
        with reading(begun, "delete it"):
            commits = list(json.loads(begun.read_text(encoding="utf-8")))
    commits = list(dict.fromkeys([*commits, provenance()["commit"]]))
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_text(begun, to_json(commits) + "\n")

    # What may run code is never taken from a run's own settings.
    trust = {name: options.get(name, False) for name in config.TRUST}
    if (path / "config.json").is_file():
        # Begun; also if it died before its first checkpoint.
        if not (path / "scores.json").is_file():
            train.train({name: True for name, given in trust.items() if given}, str(path), both_axes)
    else:
        if path.exists():
            shutil.rmtree(path)
        if derived(options):
            options = {**options, "regime": source_file(options["regime"], options, out, arm, seed, seeds)}
        train.train({**options, "seed": seed, "out": str(path)}, quick=both_axes)
    device = config.load_config(path)["device"]
    run = evaluate.load_run(path, device, trust["trust_remote_code"], trust["allow_pickle"])
    axes = final_axes(run)
    write_text(path / "axes.json", to_json(axes) + "\n")
    made = {**provenance(device), "commit": ", ".join(commits)}
    write_text(path / "made.json", to_json(made) + "\n")
    begun.unlink()
    return path


def job(arm_seed: tuple, out: Path, arms: dict, seeds: list[int], packed: int = 1) -> tuple[str, str]:
    """One run (arm, seed), in this process or (packed > 1) one of `packed` worker processes
    -> ("done" | "stopped" | "failed", why)."""
    arm, seed = arm_seed
    try:
        if packed == 1:
            run_arm(out, arm, arms[arm], seed, seeds)
            return "done", ""
        # Side by side: the cores are shared out, and what a run prints goes to a file beside it, because its
        # bar and its lines would be mixed with the others'.
        torch.set_num_threads(max(1, cores() // packed))
        (out / "runs").mkdir(parents=True, exist_ok=True)
        with open(f"{folder_of(out, arm, seed)}.txt", "a") as f:
            with contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
                run_arm(out, arm, {**arms[arm], "workers": 0}, seed, seeds)
        return "done", ""
    except train.Stopped as e:
        return "stopped", str(e)
    except Exception:  # whatever it was, the other runs go on
        return "failed", traceback.format_exc()


# --- rows ---------------------------------------------------------------------------------------------------

def _recorded_rows(out: Path) -> dict:
    """{(arm, seed): rows} of rows.jsonl as it is."""
    recorded = {}
    path = out / "rows.jsonl"
    if path.is_file():
        for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            with reading(f"{path}, line {k}", "take the line out: its run is then made again"):
                row = json.loads(line)
                for key, kind in (("arm", str), ("seed", int), ("step", int), ("config", dict)):
                    if not isinstance(row.get(key, kind()), kind):
                        raise TypeError(f"{key} is {row[key]!r}")
                recorded.setdefault((row["arm"], row["seed"]), []).append(row)
    return recorded


def other_rows(out: Path, arms: dict, seeds: list[int]) -> str | None:
    """A recorded run of these arms and seeds that has other settings than it would be given now, as "arm
    'static', seed 0, with steps 400, not 3000"; None: there is none."""
    for (arm, seed), rows in _recorded_rows(out).items():
        if arm in arms and seed in seeds:
            differs = other_settings(arms[arm], seed, rows[-1].get("config", {}))
            if differs:
                return f"arm {arm!r}, seed {seed}, with {differs}"
    return None


def recorded_runs(out: Path, arms: dict, seeds: list[int], runs: list[tuple]) -> set[tuple]:
    """Of these runs (arm, seed) those that need not be made: their folders are gone, on another machine say,
    but all their rows stand in rows.jsonl, made with the same settings. Of a run that one of the others
    replays they must hold its r."""
    done, recorded = set(), _recorded_rows(out)
    for (arm, seed), rows in recorded.items():
        if (arm, seed) not in runs or folder_of(out, arm, seed).exists() or "final" not in rows[-1]:
            continue
        if not other_settings(arms[arm], seed, rows[-1].get("config", {})):
            done.add((arm, seed))
    for _ in arms:                                         # what replays may be replayed
        replayed = {_replayed_by(arm, seed, arms, seeds) for arm, seed in runs if (arm, seed) not in done}
        done -= {run for run in replayed & done if R_CHANGES not in recorded[run][-1]}
    return done


def _final_scores(path: Path) -> dict:
    """The model's row of a run's final table, {metric: number}."""
    final = {}
    for metric, value in read_scores(path)["rows"]["model"].items():
        final[metric] = value["mean"] if isinstance(value, dict) and "mean" in value else value
    return final


def _rows_of_run(path: Path, name: str, arm: str, seed: int, options: dict) -> list[dict]:
    """The rows of one finished run."""
    settings = config.load_config(path)
    if derived(options):
        settings["regime"] = options["regime"]  # what was asked for, not the path of the file made of it
    settings = {k: v for k, v in settings.items() if k != "out"}
    made = read_json(path / "made.json") if (path / "made.json").is_file() else {}
    log = read_log(path)
    evaluations = [line for line in log if "eval" in line]
    steps_of_r, r = regime.read_r(path / "log.jsonl")
    probed_at, D = steps_and_values(log, "D")

    rows = []
    for line in evaluations:
        step = line["step"]
        row = {"experiment": name, "arm": arm, "seed": seed, "step": step}
        row |= line["eval"]
        row["r"] = float(regime.hold_last(steps_of_r, r, step))
        if D:
            row["D"] = float(np.interp(np.log2(step), np.log2(probed_at), D))
        if line is evaluations[-1]:
            row["final"] = _final_scores(path)
            changes = np.flatnonzero(np.diff(r, prepend=np.nan))
            row[R_CHANGES] = [[int(steps_of_r[i]), float(r[i])] for i in changes]
            if (path / "axes.json").is_file():
                row["axes"] = read_json(path / "axes.json")
        rows.append(row | {"config": settings, **made})
    return rows


def collect(out: Path, name: str, arms: dict, seeds: list[int]) -> list[dict]:
    """Rows of all finished runs of experiment `name`: one an arm x seed x evaluation, `final` with the
    table's metrics on the last; D and r as they stood there (D interpolated in log2 k between probes).

    Written to rows.jsonl, where the rows of runs whose folder is gone stay, and those of arms, seeds and
    settings that are not asked for now."""
    recorded = _recorded_rows(out)
    rows, not_asked_for = [], []
    for arm, seed in itertools.product(arms, seeds):
        path = folder_of(out, arm, seed)
        if (path / "scores.json").is_file():
            with reading(path, "delete it: the run is then made again"):
                rows += _rows_of_run(path, name, arm, seed, arms[arm])
        else:
            # Those of other settings under that name are kept, and not in the table.
            for row in recorded.get((arm, seed), []):
                other = _first_difference(row.get("config", {}), arms[arm])
                (not_asked_for if other else rows).append(row)
    for (arm, seed), run in recorded.items():
        if arm not in arms or seed not in seeds:
            not_asked_for += run
    write_text(out / "rows.jsonl", "".join(to_json(row) + "\n" for row in rows + not_asked_for))
    return rows
