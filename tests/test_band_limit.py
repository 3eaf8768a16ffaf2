"""Claims about band-limiting, and about measuring the band limit of a recording."""
import numpy as np
import pytest
import scipy.signal

from parts.audio import RATE, resample
from parts.band_limit import FILTERS, band_limit, choose_cutoff, find_cutoff, random_band_limit
from parts.errors import UserError
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

def stored(x):
    """As a 16-bit file holds it."""
    return (np.round(x * 32_767) / 32_767).astype(np.float32)


def hiss(seconds=2.0, level=0.1, seed=1):
    noise = np.random.default_rng(seed).standard_normal(round(RATE * seconds))
    return (level * noise).astype(np.float32)


def knocks(noise):
    """Four short bursts, damped oscillations at 180 and 420 Hz, over a faint noise up to 8 kHz; 2 s."""
    t = np.arange(RATE // 2) / RATE
    knock = np.exp(-t * 45) * (np.sin(2 * np.pi * 180 * t) + 0.5 * np.sin(2 * np.pi * 420 * t))
    return 0.4 * np.tile(knock, 4).astype(np.float32) + hiss(2, noise)


@pytest.mark.parametrize("cutoff", [1_000, 2_000, 3_000, 4_000, 6_000])
@pytest.mark.parametrize("family, order", [("cheby1", 8), ("butter", 2), ("bessel", 5), ("ellip", 10)])
def test_the_band_limit_of_muffled_noise_is_found_within_a_quarter_octave(cutoff, family, order):
    found = find_cutoff(stored(band_limit(hiss(), cutoff, family, order)))
    assert abs(np.log2(found / cutoff)) <= 0.25


def test_full_band_noise_has_no_limit():
    assert find_cutoff(hiss()) is None
    assert find_cutoff(stored(hiss(level=0.01))) is None


@pytest.mark.parametrize("noise", [3e-3, 3e-4, 1e-4])
def test_a_knock_whose_recording_hisses_to_the_top_is_not_muffled(noise):
    """Its own energy ends below 1 kHz; the noise floor says that the recording does not."""
    x = stored(knocks(noise))
    assert find_cutoff(x) is None
    found = find_cutoff(stored(band_limit(knocks(3e-3), 2_000)))
    assert abs(np.log2(found / 2_000)) <= 0.5, "and a muffled one is"


@pytest.mark.parametrize("frequency", [60, 300, 1_000, 3_000])
def test_a_tone_is_not_taken_for_the_edge_of_a_low_pass(frequency):
    tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(2 * RATE) / RATE)
    assert find_cutoff(tone) is None and find_cutoff(stored(tone)) is None


def test_what_is_found_depends_on_no_level():
    muffled, full = stored(band_limit(hiss(), 3_000)), stored(knocks(3e-4))
    for decibel in (-60, -20, 20):
        gain = np.float32(10 ** (decibel / 20))
        assert find_cutoff(gain * muffled) == find_cutoff(muffled) is not None
        assert find_cutoff(gain * full) is None


def test_silence_constants_and_moments_have_no_limit():
    moment = band_limit(hiss(0.1), 2_000)
    for x in (np.zeros(0), np.zeros(RATE), np.full(RATE, 0.3), moment, moment[:20]):
        assert find_cutoff(x) is None and find_cutoff(x, 44_100) is None
    assert find_cutoff(np.zeros(RATE), 8_000) is None


def test_silence_before_and_after_changes_nothing():
    y = stored(band_limit(hiss(), 2_000))
    found = find_cutoff(np.pad(y, RATE))
    assert abs(np.log2(found / find_cutoff(y))) <= 0.1


def test_clipping_a_muffled_recording_makes_treble_that_is_kept():
    y = band_limit(hiss(), 2_000)
    assert find_cutoff(y.clip(-0.05, 0.05)) is None
    assert find_cutoff(hiss().clip(-0.1, 0.1)) is None


@pytest.mark.parametrize("rate", [8_000, 11_025])
def test_a_rate_below_16_khz_limits_what_its_file_can_hold(rate):
    """A knock has no edge to be found: the rate says it. A lower limit is found all the same."""
    for x in (hiss(), knocks(3e-4)):
        low = stored(resample(x, RATE, rate))
        assert find_cutoff(resample(low, rate, RATE), rate) == rate / 2
    low = stored(resample(band_limit(hiss(), 2_000), RATE, rate))
    assert abs(np.log2(find_cutoff(resample(low, rate, RATE), rate) / 2_000)) <= 0.5


def test_a_file_of_16_khz_or_more_is_not_limited_by_its_rate():
    for rate in (RATE, 22_050, 44_100):
        x = resample(hiss(), RATE, rate)
        assert find_cutoff(resample(x, rate, RATE), rate) is None


def test_a_limit_is_never_named_where_treble_lies_above_it():
    """A low-passed sound with one loud burst of full-band noise, 1 % of the time."""
    x = band_limit(hiss(4), 2_000)
    x[RATE : RATE + 640] += hiss(0.04)
    assert find_cutoff(x) is None


def test_a_recording_of_ten_minutes_is_measured_like_one_of_two_seconds():
    y = stored(band_limit(hiss(), 2_000))
    assert abs(np.log2(find_cutoff(np.tile(y, 300)) / find_cutoff(y))) <= 0.1


def test_scenes_are_not_called_muffled_and_muffled_ones_are_measured():
    """40 synthetic scenes, stored in 16 bits: bells, drums, bird song ..."""
    world = SoundWorld("val", 40)
    scenes = [world.wave(i) for i in range(40)]
    muffled = [random_band_limit(x, np.random.default_rng(i)) for i, x in enumerate(scenes)]
    assert sum(find_cutoff(x) is not None for x in scenes) <= 1
    errors = [np.log2(found / cutoff) for y, cutoff in muffled if (found := find_cutoff(stored(y)))]
    assert len(errors) >= 32
    assert sum(abs(error) <= 0.5 for error in errors) >= 0.95 * len(errors)


def test_a_cutoff_above_what_a_recording_holds_is_used_and_told():
    x = stored(band_limit(hiss(), 2_000))
    found, where = choose_cutoff("x.wav", x, RATE, None)
    assert where == "found" and abs(found - 2_000) < 200
    assert choose_cutoff("x.wav", x, RATE, 2_000) == (2_000, "given")
    cutoff, where = choose_cutoff("x.wav", x, RATE, 6_000)
    assert cutoff == 6_000 and f"the input holds nothing above {found:.0f} Hz" in where
    low_rate = stored(resample(resample(hiss(), RATE, 8_000), 8_000, RATE))
    assert "holds nothing above 4000 Hz" in choose_cutoff("x.wav", low_rate, 8_000, 6_000)[1]
    assert choose_cutoff("x.wav", hiss(), RATE, 6_000) == (6_000, "given"), "negative control: full band"
    with pytest.raises(UserError, match="x.wav: no band limit found"):
        choose_cutoff("x.wav", hiss(), RATE, None)
