"""Claims about cached latents."""
import numpy as np
import pytest
import torch

from parts import latents
from parts.audio import ACTIVE_RMS, active_rms
from parts.band_limit import random_band_limit
from parts.codec import Codec
from parts.latents import LOUDEST, LatentCache, training_pairs
from parts.soundworld import SoundWorld


@pytest.fixture(scope="module")
def world():
    return SoundWorld("val", 90)


@pytest.fixture(scope="module")
def codec(world):
    return Codec(16).fit(world.wave(i) for i in range(20))


def test_cached_latents_are_the_codecs(world, codec):
    z = LatentCache(world, codec, workers=0)
    for i in (0, 40, 89):
        expected = codec.encode(torch.from_numpy(world.wave(i))[None])[0].numpy()
        assert np.allclose(z.crop(i, 0, 64), expected, atol=0.01)


def test_muffled_latents_belong_to_the_same_moment(world, codec):
    """Version r of clip i is the clip after random_band_limit seeded by (i, r), at the level ACTIVE_RMS,
    beside the clip with the same gain, crop by crop."""
    x = world.wave(41)
    y, _ = random_band_limit(x, np.random.default_rng([77, 41, 1]))
    gain = ACTIVE_RMS / active_rms(y)
    assert 0.1 < abs(gain - 1) < 4, "or this shows nothing"
    pair = LatentCache(world, codec, 2, workers=0).pair(41, 10, 20, variant=1)
    for found, wave in zip(pair, (y, x)):
        expected = codec.encode(torch.from_numpy((gain * wave).astype(np.float32))[None])[0, 10:30].numpy()
        assert np.allclose(found, expected, atol=0.02)


def test_versions_of_a_long_recording_are_encoded_one_by_one_and_are_the_same(world, codec, monkeypatch):
    at_once = []
    encode = codec.encode

    def noted(waves):
        at_once.append(len(waves))
        return encode(waves)

    monkeypatch.setattr(codec, "encode", noted)
    x = world.wave(5)
    together = latents._encode_pairs(x, 5, codec, 3)
    monkeypatch.setattr(latents, "RATE", len(x) / 61)              # as if the clip had 61 s
    alone = latents._encode_pairs(x, 5, codec, 3)
    assert at_once == [6, 2, 2, 2] and together.shape == alone.shape == (6, codec.tokens(len(x)), 16)
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_pair_does_not_depend_on_the_level_of_the_recording(world):
    x = world.wave(3)
    y = random_band_limit(x, np.random.default_rng(0))[0][None]
    pairs = training_pairs(y, x)
    for gain in (0.001, 0.1, 10):
        assert np.allclose(training_pairs(gain * y, gain * x), pairs, atol=1e-6)
    faint = training_pairs(1e-6 * y, x)
    assert abs(active_rms(faint[1]) / LOUDEST - 1) < 1e-3, "next to nothing left: the clip is not made louder"
    assert np.isfinite(training_pairs(0 * y, 0 * x)).all()
