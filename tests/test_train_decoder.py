"""Claims about the decoder's training: its loss is smallest for the true distribution; it resumes exactly."""
import numpy as np
import pytest
import torch

from lab import train_decoder as trained
from parts.codec import Codec
from parts.errors import UserError
from parts.patches import RandomPatches
from parts.soundworld import SoundWorld
from parts.spectra import stft


def noises(n: int, seed: int, gain: float = 0.1) -> torch.Tensor:
    return gain * torch.randn(n, 16_000, generator=torch.Generator().manual_seed(seed))


def energy(first, second, target) -> float:
    a, b, y = (trained.log_magnitude(stft(x)) for x in (first, second, target))
    distance = trained.spectral_distance
    return float(0.5 * (distance(a, y) + distance(b, y)) - 0.5 * distance(a, b))


def test_the_loss_is_smaller_for_the_true_noise_than_for_any_other():
    target = noises(8, 0)
    true = energy(noises(8, 1), noises(8, 2), target)
    for name, gain in (("quieter", 0.07), ("louder", 0.14)):
        assert energy(noises(8, 1, gain), noises(8, 2, gain), target) > true, name
    # The spectrum of an impulse is smooth: the blurred centre of noise, the same in every sample.
    impulses = torch.zeros(8, 16_000)
    impulses[:, ::64] = 0.1 * 8
    assert energy(impulses, impulses, target) > true + 0.05
    # One and the same noise, without variety, is as near to the clip as the true one: the second term counts.
    assert energy(noises(8, 1), noises(8, 1), target) > true + 0.05


class StopAfter:
    """In place of devices.StopSignal: asks to stop after so many looks."""
    looks = 0

    def __init__(self):
        self.left = StopAfter.looks

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    @property
    def now(self):
        self.left -= 1
        return self.left <= 0


def test_a_stopped_training_goes_on_as_if_it_had_never_stopped(tmp_path, waves, monkeypatch):
    codec = Codec().fit(waves)
    banks = [np.round(waves[:32] * 32_767).astype(np.int16)]
    through = trained.train_decoder(codec, banks, 4, batch=2)
    monkeypatch.setattr(trained, "StopSignal", StopAfter)
    StopAfter.looks = 2                                            # one look a step: in the second one
    with pytest.raises(trained.Stopped, match="stopped at step 2"):
        trained.train_decoder(codec, banks, 4, batch=2, checkpoint=tmp_path / "d.pt")
    StopAfter.looks = 100
    resumed = trained.train_decoder(codec, banks, 4, batch=2, checkpoint=tmp_path / "d.pt", resume=True)
    for a, b in zip(through.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="'seed': 0.*give the same, or begin anew"):
        trained.train_decoder(codec, banks, 4, batch=2, seed=1, checkpoint=tmp_path / "d.pt", resume=True)


def test_crops_are_of_all_banks_and_differ_by_step(waves):
    quiet, loud = (np.full((3, 41_000), level, np.int16) for level in (100, 3_000))
    made = trained.crops([quiet, loud], 6, np.random.default_rng(0))
    assert made.shape == (6, 20_480)
    assert (made[::2].amax(1) < made[1::2].amin(1)).all()


def test_training_waves_are_the_clips_and_the_patches_as_they_are_drawn():
    banks = trained.training_waves(2, 3, 1)
    drawn = (SoundWorld("train", 2).render, lambda i: RandomPatches(3, 1).pair(i)[0])
    for bank, n, wave in zip(banks, (2, 3), drawn, strict=True):
        assert bank.dtype == np.int16
        assert np.array_equal(bank, [np.round(wave(i) * 32_767) for i in range(n)])


def test_resuming_what_never_began_says_so(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        trained.train_decoder(None, [], 4, checkpoint=tmp_path / "d.pt", resume=True)
