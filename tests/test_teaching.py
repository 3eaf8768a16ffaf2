"""Claims about docs/teaching.md and docs/tour.ipynb: the example of a mechanism applies, trains, is logged
and drawn; the notebook's cells run without Jupyter."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

TOUR = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
DIFF = re.search(r"```diff\n(.*?)```", (ROOT / "docs/teaching.md").read_text(), re.DOTALL).group(1)
CODE = ["".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "code"]

DRIVER = """
import json, sys, evaluate, train
from matplotlib.figure import Figure
evaluate.preview = lambda *a: {}
evaluate.score = lambda *a, **k: None
train.write_moment = lambda *a: None
import parts.dashboard as dashboard
dashboard._draw_last_previews = lambda *a: None
labels, save = set(), Figure.savefig

def savefig(fig, *a, **k):
    for ax in fig.axes:
        labels.update(line.get_label() for line in ax.get_lines() if len(line.get_xdata()))
    save(fig, *a, **k)

Figure.savefig = savefig
train.main()
print("labels", json.dumps(sorted(labels)))
evaluate.load_run("assets/demo")
"""


@pytest.fixture(scope="module")
def with_the_example(tmp_path_factory, t2a_run):
    """A copy of the project with the diff applied. (The shared run has the clips cached.)"""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    copy = tmp_path_factory.mktemp("copy")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("parts", "lab", "assets"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    (copy / "fourth.diff").write_text(DIFF)
    apply = [git, "apply", "fourth.diff"]
    done = subprocess.run(apply, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return copy


def test_the_example_of_a_mechanism_applies_trains_is_logged_and_drawn(with_the_example):
    """The rate at step k is that of r = k / K; a shipped model still opens."""
    settings = {**TINY, "steps": 20, "eval_every": 20, "cond_drop": 0.5, "regime": "clock", "out": "run",
                "dropping": "adaptive", "recipe": "vanilla"}
    settings.pop("variants")                               # of super-resolution alone
    argv = [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]
    done = subprocess.run([sys.executable, "-c", DRIVER, *argv], cwd=with_the_example, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    rows = [json.loads(line) for line in (with_the_example / "run/log.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["drop"] for row in rows if "drop" in row}
    assert rates == pytest.approx({k: 0.5 * (1 - k / 20) + 0.02 * k / 20 for k in rates}) and 20 in rates
    labels = json.loads(re.search(r"^labels (.*)$", done.stdout, re.MULTILINE).group(1))
    assert "rate of dropped conditions" in labels, labels


def test_the_switch_is_a_switch(with_the_example):
    space = {}
    exec((with_the_example / "parts/dropping.py").read_text(), space)
    assert {space["rate"]("off", r, 0.1) for r in (0, 0.5, 1)} == {0.1}
    assert space["rate"]("adaptive", 0, 0.1) == 0.1 and np.isclose(space["rate"]("adaptive", 1, 0.1), 0.02)
    config = (with_the_example / "parts/config.py").read_text()
    assert 'dropping: str = "off"' in config and '"dropping": ("off", "adaptive")' in config


def test_the_tour_is_a_notebook_without_outputs_whose_answers_are_folded():
    """Every question comes with its answer, and nothing needs Jupyter's own commands."""
    assert TOUR["nbformat"] == 4 and 14 <= len(TOUR["cells"]) <= 20
    assert all(not cell["outputs"] and cell["execution_count"] is None
               for cell in TOUR["cells"] if cell["cell_type"] == "code")
    prose = "".join("".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "markdown")
    assert prose.count("**Predict") >= 4 and prose.count("<details><summary>Look") >= 4
    assert not any(line.startswith(("%", "!")) for cell in CODE for line in cell.splitlines())


@pytest.mark.parametrize("steps", [33, pytest.param(200, marks=pytest.mark.slow)])
def test_the_cells_of_the_tour_run_from_top_to_bottom(steps, sr_run, monkeypatch, capsys):
    """With few steps the arms of the comparison are the first run again. (The shared run has the clips
    cached.)"""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    space = {"__name__": "tour"}
    assert CODE[0].count("STEPS = 200") == 1
    for cell in [CODE[0].replace("STEPS = 200", f"STEPS = {steps}"), *CODE[1:]]:
        exec(compile(cell, "tour.ipynb", "exec"), space)
        if steps < 200 and "first" in space:
            space["training"] = lambda seed=0, **options: space["first"]
    said = capsys.readouterr().out
    first, second = (float(re.search(rf"r from D of {name} +mean [^:]+: ([\d.]+)", said).group(1))
                     for name in (r"t1\.0", "levels"))
    assert second < first, "the mending"
    assert space["first"]["D"][0][1] < 0.4, "at step 32; of the network without its condition it is above 0.5"
    assert len(space["first"]["r"]) == steps and len(space["ends"]) == 3
