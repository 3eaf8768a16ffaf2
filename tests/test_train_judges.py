"""Claims about how the judges are made."""
import json
import sys

import numpy as np
import pytest
import torch

from lab import train_judges
from parts import judges
from parts.errors import UserError
from parts.judges import Judge, load_judge
from parts.soundworld import SoundWorld, factor_table


def test_the_judges_that_are_shipped_are_made_by_a_command_that_runs(tmp_path, monkeypatch, capsys):
    """In small, into another folder than assets/."""
    report = train_judges.judge_report
    monkeypatch.setattr(judges, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(train_judges, "judge_report", lambda judge: report(judge, 16))
    argv = ["train_judges", "dev", "--clips", "64", "--epochs", "1", "--out"]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "assets" / "judge-dev.safetensors")])
    train_judges.main()
    assert set(load_judge("dev").state_dict()) == set(Judge("dev").state_dict())
    recorded = json.loads((tmp_path / "results" / "judges.json").read_text())["dev"]
    world = SoundWorld("test", 16)
    detected = judges.judge_clips(load_judge("dev"), [world.wave(i) for i in range(16)])["presence"] > 0
    exact = (detected == (factor_table(world, 16)["presence"] > 0.5)).all(1).mean()
    assert recorded["test"]["exact"] == pytest.approx(exact)
    assert (recorded["clips"], recorded["epochs"], recorded["seed"]) == (64, 1, 0)
    assert json.loads(capsys.readouterr().out) == recorded

    # Another file leaves the shipped judge and its recorded report as they are.
    shipped = (tmp_path / "assets" / "judge-dev.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "mine.safetensors"), "--seed", "1"])
    train_judges.main()
    assert json.loads(capsys.readouterr().out)["seed"] == 1
    assert (tmp_path / "mine.safetensors").read_bytes() != shipped
    assert (tmp_path / "assets" / "judge-dev.safetensors").read_bytes() == shipped
    assert json.loads((tmp_path / "results" / "judges.json").read_text()) == {"dev": recorded}


@pytest.mark.parametrize("argv", [["third"], ["dev", "--clips", "63"], ["dev", "--epochs", "-1"], ["dev"]])
def test_a_wrong_kind_or_size_is_refused_before_anything_is_made(argv, monkeypatch):
    monkeypatch.setattr(train_judges, "train_judge", lambda *args: pytest.fail("began"))
    monkeypatch.setattr(sys, "argv", ["train_judges", *argv])
    with pytest.raises(UserError, match="invalid choice|of at least (64|1)|required: --out"):
        train_judges.main()


def test_the_loss_falls_to_nothing_for_true_answers_and_asks_only_what_is_there():
    """Onset, pitch and count of absent events are NaN; no answer about them may move the loss."""
    truth = {name: torch.from_numpy(values) for name, values in factor_table(SoundWorld("val", 16)).items()}
    counts = torch.nn.functional.one_hot(truth["count"].nan_to_num(1).long() - 1, 4)
    answers = {
        "presence": 40.0 * (2 * truth["presence"] - 1),
        "onset": (truth["onset"] / 2.56).nan_to_num(0.7),
        "pitch": truth["pitch"].nan_to_num(-0.3),
        "count": 40.0 * counts,
    }
    assert train_judges.judge_loss(answers, truth, 2.56) < 1e-6
    wrong = answers | {"onset": 1 - answers["onset"]}
    assert train_judges.judge_loss(wrong, truth, 2.56) > 0.05


def test_augmentation_masks_one_band_and_one_moment_and_shifts_the_level():
    torch.manual_seed(0)
    x = torch.zeros(200, 30, 20)
    y = train_judges.augment_mel(x)
    silence = (np.log(1e-2) + 3) / 2.5
    masked = (y - silence).abs() < 1e-6
    for clip, mask in zip(y, masked):
        levels = clip[~mask].unique()
        assert len(levels) == 1 and levels.abs().item() <= 0.69 / 2.5
        assert mask.all(0).sum() <= 9 and mask.all(1).sum() <= 9   # up to four on either side of the centre
    assert 0.5 < masked.any(2).any(1).float().mean() < 1
