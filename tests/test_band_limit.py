"""Claims about band-limiting, and about measuring the band limit of a recording."""
import numpy as np
import pytest
import scipy.signal

from parts.audio import RATE
from parts.band_limit import FILTERS, band_limit, find_cutoff, random_band_limit
from parts.soundworld import SoundWorld


@pytest.mark.parametrize("family", FILTERS)
@pytest.mark.parametrize("cutoff", [1_000, 2_000, 4_250])
def test_band_limit_keeps_below_and_removes_above(family, cutoff):
    x = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    y = band_limit(x, cutoff, family, 8)
    assert len(y) == len(x) and y.dtype == np.float32
    f, power_before = scipy.signal.welch(x, RATE, nperseg=2_048)
    _, power_after = scipy.signal.welch(y, RATE, nperseg=2_048)
    gain = 10 * np.log10(power_after / power_before)
    assert np.abs(gain[(f > 100) & (f < 0.5 * cutoff)]).max() < 3.5
    assert gain[f > 1.25 * cutoff].max() < -40


def test_band_limit_gain_is_the_filters_squared():
    """sosfiltfilt passes twice: |H|^2, checked against scipy's own frequency response at half the cutoff."""
    x = np.sin(2 * np.pi * 900 * np.arange(RATE) / RATE)
    sections = scipy.signal.bessel(4, 2_000 / 8_000, norm="mag", output="sos")
    _, H = scipy.signal.sosfreqz(sections, [900], fs=RATE)
    y = band_limit(x, 2_000, "bessel", 4)
    assert abs(y[4_000:12_000].std() / x[4_000:12_000].std() - abs(H[0]) ** 2) < 0.01


def test_random_band_limit_covers_families_orders_and_cutoffs():
    rng, x = np.random.default_rng(0), np.zeros(4_000, np.float32)
    cutoffs = [random_band_limit(x, rng)[1] for _ in range(200)]
    assert min(cutoffs) == 1_000 and max(cutoffs) == 6_000 and all(c % 250 == 0 for c in cutoffs)


def test_a_cutoff_or_a_filter_that_cannot_be_is_refused():
    for cutoff in (0, RATE // 2):
        with pytest.raises(ValueError, match="must lie between"):
            band_limit(np.zeros(1_000, np.float32), cutoff)
    with pytest.raises(ValueError, match="cheby2"):
        band_limit(np.zeros(1_000, np.float32), 2_000, "cheby2")


# --- measuring it

@pytest.mark.parametrize("cutoff", [1_500, 2_000, 4_000, 6_000])
def test_the_band_limit_of_a_recording_is_found(cutoff):
    noise = np.random.default_rng(1).standard_normal(RATE * 2).astype(np.float32) * 0.1
    assert abs(find_cutoff(band_limit(noise, cutoff)) - cutoff) <= 500
    assert find_cutoff(noise) is None, "full-band sound has no edge"


def stored(x):
    """As a 16-bit file holds it."""
    return (np.round(x * 32_767) / 32_767).astype(np.float32)


def test_sounds_without_treble_are_rarely_taken_for_muffled_ones():
    """40 scenes, stored in 16 bits: muffled ones are mostly measured right, full-band ones (bells, drums ...)
    mostly refused."""
    world = SoundWorld("test", 40)
    scenes = [world.wave(i) for i in range(40)]
    muffled = [random_band_limit(x, np.random.default_rng(i)) for i, x in enumerate(scenes)]
    assert sum(find_cutoff(x) is not None for x in scenes) <= 6
    assert sum(abs((find_cutoff(stored(y)) or 0) - cutoff) <= 500 for y, cutoff in muffled) >= 32
