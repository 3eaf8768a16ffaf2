"""Claims about the teacher's quality, and about the linear probe that measures it."""
import functools
import json

import numpy as np
import pytest
import scipy.io.wavfile
import torch
from conftest import in_process

from lab import probe_teacher
from parts.teacher import WEIGHTS, Teacher, load_teacher


@pytest.mark.slow
def test_the_teacher_beats_both_controls_on_soundworld_events():
    """Linear probe, paired over clips: the interval of the gain excludes 0. Negative control: a random
    network gains nothing over itself."""
    report = probe_teacher.probe_teacher(load_teacher(), None, clips=600, inits=1)["soundworld"]
    for control in ("mel statistics", "random initialisation"):
        assert report[f"teacher - {control}"]["interval"][0] > 0
    torch.manual_seed(100)
    report = probe_teacher.probe_teacher(Teacher().eval(), None, clips=200, inits=1)["soundworld"]
    assert report["teacher - random initialisation"]["mean"] == 0


def test_ranking_is_average_precision_by_hand():
    """The mean over classes that are present of the precision down to their rank."""
    logits = torch.randn(20, 6)
    present = (torch.rand(20, 6) < 0.4).float()
    present[:, 0] = 1  # at least one
    scores = probe_teacher.ranking(logits, present)
    for row, y, score in zip(logits.tolist(), present.tolist(), scores):
        order = sorted(range(6), key=lambda k: -row[k])
        hits = [rank for rank, k in enumerate(order, 1) if y[k]]
        assert abs(np.mean([n / rank for n, rank in enumerate(hits, 1)]) - score) < 1e-6


def test_the_fit_is_where_the_gradient_of_its_penalised_loss_is_zero():
    """Both kinds of target; and more penalty means smaller weights."""
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    for y in ((x[:, 0] > 0).long(), (x[:, :3] > 0).float()):
        weights, bias = probe_teacher.fit_linear(x, y, 0.1)
        logits = x @ weights + bias
        if y.ndim == 2:
            error = (logits.sigmoid() - y) / y.shape[1]
        else:
            error = logits.softmax(1) - torch.nn.functional.one_hot(y)
        assert (x.T @ error / len(x) + 0.1 * weights).abs().max() < 1e-3
        assert error.mean(0).abs().max() < 1e-3
        assert probe_teacher.fit_linear(x, y, 1.0)[0].norm() < weights.norm()


def test_each_fold_is_scored_by_a_probe_that_never_saw_it():
    """Features that name the clip, and classes drawn at random: a probe that saw a clip would know it."""
    rng = np.random.default_rng(0)
    fold = np.arange(100) % 5 + 1
    y = torch.from_numpy(rng.integers(0, 2, 100))
    assert probe_teacher.probe_folds(torch.eye(100), y, fold).mean() < 0.7
    seen = np.ones(100, bool)
    assert probe_teacher.linear_probe(torch.eye(100), y, seen, seen, seen, probe_teacher.correct).mean() == 1


@pytest.fixture(scope="module")
def folds(tmp_path_factory, waves):
    """Forty recordings of two classes with official folds, of different lengths."""
    folder = tmp_path_factory.mktemp("esc10")
    lines = ["file_name,category,fold"]
    for i in range(40):
        noise = 0.2 * np.random.default_rng(i).standard_normal(20_000 + 320 * i)
        tone = 0.2 * np.sin(np.arange(len(noise)) * (0.1 + 0.01 * i))
        samples = np.round(32_767 * (tone if i % 2 else noise).clip(-1, 1)).astype(np.int16)
        scipy.io.wavfile.write(folder / f"{i}.wav", 16_000, samples)
        lines.append(f"{i}.wav,{'tone' if i % 2 else 'noise'},{i // 8 + 1}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_recordings_with_folds_are_probed_too(folds):
    """Tones against noise: nothing could be easier."""
    report = probe_teacher.probe_teacher(load_teacher(), folds, clips=60, inits=1)
    assert report["soundworld"]["n"] == 15 and report["esc10"]["n"] == 40
    for features in ("mel statistics", "random initialisation", "teacher"):
        assert report["esc10"][features]["mean"] > 0.9, features


@pytest.mark.slow
def test_the_probe_is_a_command_that_runs(tmp_path, monkeypatch):
    """In small, on another file than the shipped one."""
    probe = functools.partial(probe_teacher.probe_teacher, clips=200, inits=1)
    monkeypatch.setattr(probe_teacher, "probe_teacher", probe)
    (tmp_path / "teacher.safetensors").write_bytes(WEIGHTS.read_bytes())
    done = in_process(probe_teacher, "--weights", "teacher.safetensors", "--out", "probe.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    report = json.loads((tmp_path / "probe.json").read_text())["soundworld"]
    assert report["n"] == 50
    assert "soundworld, n 50 (average precision of events)" in done.stdout
    assert f"{report['teacher']['mean']:+.3f}" in done.stdout


@pytest.mark.parametrize("argv, message", [
    (["--weights", "none"], "--weights none: no such file; make it with: python -m lab.pretrain_teacher "
                            "--out none"),
    (["--esc10", "none"], "--esc10 none: no such folder"),
])
def test_missing_files_end_with_status_2_and_one_line(argv, message, tmp_path):
    done = in_process(probe_teacher, *argv, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"error: {message}\n"
