"""The README does what it says: its commands run (with few steps), its snippets work as they stand, its results and files exist."""
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, in_process

import config
import data
import evaluate
import experiments
import figures
import guidance

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = list(dict.fromkeys(part.split("#")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines() for part in line.split("&&")))
ELSEWHERE = {  # what a command is too long, or too far from this machine, to run here -> what runs it in small
    "pip install": ".ci/run", "pytest": ".ci/run", "torchrun": "test_two_processes_with_half_the_batch_each_are_one_process_with_all_of_it",
    "models/": "test_pretrained_parts_in_every_slot_train_score_and_are_used_from_their_run_folder", "bench --out": "test_the_benchmark_runs_and_says_what_it_measured",
    "report": "test_a_report_is_one_page_that_asks_nobody_and_cannot_be_written_into"}


@pytest.fixture
def workplace(tmp_path, t2a_run, sr_run):
    """A folder with what the commands of the README take for granted: two runs, a muffled file, recordings."""
    for name, run in (("t2a", t2a_run), ("sr", sr_run)):
        shutil.copytree(run, tmp_path / "runs" / name)
    rng = np.random.default_rng(0)
    data.write_wav(tmp_path / "muffled.wav", data.band_limit(data.SoundWorld("val", 1).wave(0), 2_000))
    for folder in ("my_folder", "audiocaps", "clotho"):
        (tmp_path / folder).mkdir()
        for i in range(20):
            data.write_wav(tmp_path / folder / f"{i}.wav", 0.1 * rng.standard_normal(16_000).astype(np.float32))
        (tmp_path / folder / "metadata.csv").write_text("file_name,caption,fold\n" + "".join(f"{i}.wav,a hiss number {i},{1 + i % 5}\n" for i in range(20)))
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    return tmp_path


def in_small(script: str, argv: list[str], where: Path) -> list[str]:
    """The command with few steps and clips, writing where tests may write."""
    if script == "train":
        argv = [{"600": "3", "6000": "14"}.get(a, a) for a in argv]
        few = {**TINY, "steps": 3, "eval_every": 3} if "--resume" not in argv else {"workers": 0}
        return argv + [x for k, v in few.items() if f"--{k.replace('_', '-')}" not in argv for x in (f"--{k.replace('_', '-')}", str(v))]
    if script == "figures":
        return ["mechanism", "density", "--out", str(where)]
    if script == "experiments" and argv[0] == "run":
        return [*argv, "--dry-run"]
    if script == "evaluate" and argv[0] == "score":
        return [*argv, "--clips", "8"]
    if script == "evaluate" and argv[0] == "export":
        return [*argv[:2], str(where / "exported")]
    return argv


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in ELSEWHERE)])
def test_every_command_runs(command, workplace, request, monkeypatch):
    """With few steps, in a folder that holds what the README takes for granted."""
    if " train.py" in command:  # what a run ends with has tests of its own
        request.getfixturevalue("bare")
        monkeypatch.setattr(torch, "compile", lambda net: net)
    if " experiments.py run" in command:  # test_a_dry_run_tells_arms_and_hours_and_leaves_nothing measures them
        monkeypatch.setattr(experiments, "estimate_hours", lambda options: float(len(options)))
    python, file, *argv = shlex.split(command)
    assert python == "python" and (ROOT / file).is_file()
    module = sys.modules.get(Path(file).stem) or __import__(Path(file).stem)
    done = in_process(module, *in_small(Path(file).stem, argv, workplace), cwd=workplace)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_script_behind_the_tables_asks_for_what_the_recorded_results_hold(tmp_path, monkeypatch):
    """Each of its commands, on a dry run: arms, seeds and common options are those of experiment.json in the folder that it names."""
    lines = [line for line in (ROOT / "results/tables.sh").read_text().splitlines() if not line.startswith(("#", "set"))]
    options = dict(re.match(r'(\w+)="(.*)"', line).groups() for line in lines if not line.startswith("python"))
    monkeypatch.setattr(experiments, "estimate_hours", lambda options: 0.0)
    asked, plan = [], experiments.plan
    monkeypatch.setattr(experiments, "plan", lambda a: asked.append(plan(a)) or asked[-1])
    shutil.copytree(ROOT / "results/e7-dev", tmp_path / "results/e7-dev")  # what the clocks of E7 were chosen by
    for line in lines[len(options):]:
        for name, text in options.items():
            line = line.replace(f"${name} ", text + " ")
        _, _, *argv = shlex.split(line.replace("${1:-path/to/esc10}", "path/to/esc10"))
        done = in_process(experiments, *argv, "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        recorded, (arms, _, seeds, reference) = json.loads((ROOT / argv[-1] / "experiment.json").read_text()), asked[-1]
        assert recorded["seeds"] == seeds and recorded["reference"] == reference and recorded["arms"] == arms, line
    assert len(asked) == 8


def test_commands_that_do_not_run_here_are_few_and_their_flags_exist():
    """Every flag in every command of the page is known; what is not run above is run in small by the test that ELSEWHERE names."""
    commands = re.findall(r"(?:python|torchrun \S+) (train|evaluate|guidance|experiments)\.py([^\n`#]*)", TEXT)
    assert len(commands) > 30 and {c for c, _ in commands} == {"train", "evaluate", "guidance", "experiments"}
    known = {"train": {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(config.Config)} | {"--resume", "--help"},
             **{name: set(re.findall(r'"(--[a-z0-9-]+)"', (ROOT / f"{name}.py").read_text())) for name in ("evaluate", "guidance", "experiments")}}
    known["experiments"] |= {f"--{name.replace('_', '-')}" for name in experiments.COMMON}
    for script, rest in commands:
        assert set(re.findall(r"(?<!\S)--[a-z0-9-]+", rest)) <= known[script], rest
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    assert all(name in tests or (ROOT / name).exists() for name in ELSEWHERE.values())
    assert sum(any(word in c for word in ELSEWHERE) for c in COMMANDS) <= 14


def test_the_teacher_and_the_judges_that_are_shipped_are_made_by_commands_that_run(tmp_path, monkeypatch):
    """In small, into another folder than assets/."""
    report, probe = evaluate.judge_report, evaluate.probe_teacher
    monkeypatch.setattr(evaluate, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(evaluate, "judge_report", lambda kind: report(kind, 16))
    monkeypatch.setattr(evaluate, "probe_teacher", lambda teacher, folder: probe(teacher, folder, clips=200, inits=1))
    for module, *argv in ((guidance, "pretrain", "--clips", 64, "--steps", 2, "--out", "teacher.safetensors"), (evaluate, "train-judge", "dev", "--clips", 64, "--epochs", 1),
                          (evaluate, "probe-teacher", "--weights", "teacher.safetensors", "--out", "probe.json")):
        done = in_process(module, *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-500:]
    assert set(evaluate.load_judge("dev").state_dict()) and 0 <= json.loads((tmp_path / "results/judges.json").read_text())["dev"]["test"]["exact"] <= 1
    assert json.loads((tmp_path / "probe.json").read_text())["soundworld"]["n"] == 50


def test_a_fourth_mechanism_is_one_file_and_ten_lines_of_the_loop(tmp_path):
    """The file and the diff of the README, applied to a copy of the project, train; and the rate does follow r."""
    file = next(block for kind, block in BLOCKS if kind == "python" and "dropping.py" in block)
    diff = next(block for kind, block in BLOCKS if kind == "diff")
    changed = [line for line in diff.splitlines() if line[:1] in "+-"]
    assert len(changed) <= 10
    for p in ROOT.glob("*.py"):
        shutil.copy(p, tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "dropping.py").write_text(file)
    loop = (tmp_path / "train.py").read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in keep) for keep in (" -", " +"))
        assert loop.count(before) == 1, before
        loop = loop.replace(before, after)
    (tmp_path / "train.py").write_text(loop)
    argv = [x for k, v in {**TINY, "steps": 2, "eval_every": 9}.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    spy = "import sys, train, learner, evaluate; seen = []\nold = train.batch_to\ntrain.batch_to = lambda b, ids, cfg, *a: (seen.append(cfg.cond_drop), old(b, ids, cfg, *a))[1]\n" \
          "evaluate.preview = lambda *a: {}; evaluate.dashboard = lambda *a: None; evaluate.score = lambda *a, **k: None\ntrain.main(); assert seen[-2:] == [0.5, 0.5] and seen[0] == 0.5, seen"
    done = subprocess.run([sys.executable, "-c", spy, *argv, "--cond-drop", "0.5", "--out", str(tmp_path / "run")], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    space = {}
    exec(file, space)
    assert space["rate"](0, 0.1) == 0.1 and abs(space["rate"](1, 0.1) - 0.02) < 1e-9


def test_the_table_of_files_counts_their_lines():
    """So that it says what a reader will meet; a twentieth of slack, or it would be wrong after every commit."""
    for names, lines in re.findall(r"^\| (`\w+\.py`[^|]*) \|[^|]*\| ([\d, ]+) \|$", TEXT, re.MULTILINE):
        for name, said in zip(re.findall(r"\w+\.py", names), lines.split(","), strict=True):
            is_ = len((ROOT / name).read_text().splitlines())
            assert abs(int(said) - is_) <= 0.05 * is_, (name, said, is_)
    assert {p.name for p in ROOT.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", TEXT)) and len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("name", [n for n in figures.FIGURES if n != "sounds"])
def test_figures_are_drawn_from_what_is_recorded(name, tmp_path):
    """And say what is missing where it is not."""
    done = in_process(figures, name, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / f"{name}.png").stat().st_size > 5_000, done.stderr


def test_a_figure_without_its_record_says_which_file(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    done = in_process(figures, "mechanism", cwd=tmp_path)
    assert done.returncode == 2 and "regime-sr.jsonl: missing" in done.stderr
    assert in_process(figures, "portrait", cwd=tmp_path).returncode == 2


def test_the_ten_lines_about_the_regime_run_as_they_stand():
    """The README's snippet, in a trainer whose network learns until step 64."""
    code = re.search(r"```python\n(import regime\n.*?)```", TEXT, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 10
    x0, eps, seen, step_now = torch.randn(8, 4, 6), torch.randn(8, 4, 6), [], [0]
    other = torch.randn(8, 4, 6)
    def predict(x_t, t):  # x0_hat = eps - v: from `other` to x0 while log2 k goes from 0 to 6
        share = min(1.0, np.log2(max(1, step_now[0])) / 6)
        return eps - (share * x0 + (1 - share) * other)
    def train_step(weight_of_my_auxiliary_loss):
        seen.append(weight_of_my_auxiliary_loss)
        step_now[0] += 1
    exec(code, {"K": 1_024, "predict": predict, "features": lambda z: z, "x0": x0, "eps": eps, "mean": None, "train_step": train_step})
    assert len(seen) == 1_024 and seen[0] == 1.0 and seen[-1] < 0.1


def test_results_behind_the_readme_exist():
    for name in re.findall(r"results/[\w./-]+\.jsonl?", TEXT):
        text = (ROOT / name).read_text()
        assert all(json.loads(part) for part in (text.splitlines() if name.endswith("l") else [text])), name
