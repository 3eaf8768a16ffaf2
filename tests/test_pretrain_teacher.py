"""Claims about how the SSL teacher is made."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import in_process

from lab import pretrain_teacher
from lab.pretrain_teacher import augment, info_nce, pretrain
from parts.patches import RandomPatches
from parts.spectra import log_mel
from parts.teacher import Teacher, load_teacher, pool


def slow_info_nce(a, b, own, tau):
    """-log of the partner's share among all, both ways."""
    def cos(i, j):
        return float(F.cosine_similarity(a[i], b[j], dim=0)) / tau

    total = 0.0
    for i in range(len(a)):
        rivals = [j for j in range(len(a)) if j == i or own is None or own[i] != own[j]]
        a_to_b = np.log(sum(np.exp(cos(i, j)) for j in rivals))
        b_to_a = np.log(sum(np.exp(cos(j, i)) for j in rivals))
        total += 0.5 * (a_to_b + b_to_a) - cos(i, i)
    return total / len(a)


def test_info_nce_is_the_slow_loop():
    """Rows of the same clip are left out of the denominator."""
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    own = torch.tensor([0, 0, 1, 1, 2, 2])
    assert abs(float(info_nce(a, b, 0.3)) - slow_info_nce(a, b, None, 0.3)) < 1e-4
    assert abs(float(info_nce(a, b, 0.3, own)) - slow_info_nce(a, b, own, 0.3)) < 1e-4


def test_pretraining_is_deterministic_and_the_shipped_teacher_tells_partners_from_strangers():
    teachers = {}
    for objective in ("contrastive", "masked"):
        teacher = pretrain(clips=64, steps=3, batch=16, objective=objective)
        again = pretrain(clips=64, steps=3, batch=16, objective=objective)
        both = zip(teacher.state_dict().values(), again.state_dict().values())
        assert all(torch.equal(a, b) for a, b in both)
        teachers[objective] = teacher
    assert not torch.equal(teachers["contrastive"].join.weight, teachers["masked"].join.weight)

    bank = torch.from_numpy(RandomPatches(64).features(log_mel).copy()).float()  # (64, 2, F, M)
    shipped = load_teacher()
    mean = pool(shipped(bank.flatten(0, 1))).mean(0)
    a, b = (F.normalize(pool(shipped(bank[:, k])) - mean, dim=1) for k in (0, 1))
    assert ((a @ b.T).argmax(1) == torch.arange(64)).float().mean() > 0.5


def test_augmentation_changes_level_and_masks_a_band_and_a_moment():
    mel = torch.full((300, 128, 64), -9.0)  # all clips alike: what is mixed in is as even as they are
    out = augment(mel, torch.Generator().manual_seed(0))
    assert (out >= -9.21).all() and not torch.equal(out, mel)
    for clip in out:
        mask = clip == -6.0
        assert len(clip[~mask].unique()) == 1
        assert mask.all(0).sum() <= 10 and mask.all(1).sum() <= 16
    assert torch.equal(out, augment(mel, torch.Generator().manual_seed(0)))


def test_the_shipped_teacher_is_made_by_a_command_that_runs(tmp_path):
    """In small, into another file than assets/teacher.safetensors."""
    done = in_process(pretrain_teacher, "--clips", 64, "--steps", 2, "--out", "teacher.safetensors",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    assert "how good it is: python -m lab.probe_teacher" in done.stdout
    path = tmp_path / "teacher.safetensors"
    assert path.stat().st_size < 4e6
    assert set(load_teacher(path).state_dict()) == set(Teacher().state_dict())


@pytest.mark.parametrize("argv", [["--objective", "third"], ["--steps", "0"], ["--clips", "-1"]])
def test_bad_flags_are_refused_before_anything_is_made(argv, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain_teacher, "pretrain", lambda *args, **more: pytest.fail("began"))
    assert in_process(pretrain_teacher, *argv, cwd=tmp_path).returncode == 2
