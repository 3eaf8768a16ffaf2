"""Claims about cached latents."""
import numpy as np
import pytest
import torch

from parts.band_limit import random_band_limit
from parts.codec import Codec
from parts.latents import LatentCache
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
    """Version r of clip i is the clip after random_band_limit seeded by (i, r), crop by crop."""
    muffled = LatentCache(world, codec, 2, workers=0)
    y, _ = random_band_limit(world.wave(40), np.random.default_rng([77, 40, 1]))
    expected = codec.encode(torch.from_numpy(y)[None])[0, 10:30].numpy()
    assert np.allclose(muffled.crop(40, 10, 20, variant=1), expected, atol=0.01)
