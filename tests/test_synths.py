"""Claims about the synthesizers, checked through the scenes that they render."""
import numpy as np
import pytest
import scipy.signal

from parts import synths
from parts.audio import RATE
from parts.soundworld import NAMES, SOUNDS, Event, Scene, render_scene


def render(name, dur=1.5, start=0.1, count=1, pitch=0.0, bright=0.0, rate=0.0, distance=0.0):
    """One event alone, (N,)."""
    event = Event(NAMES.index(name), start, dur, count, pitch, bright, rate, distance, seed=3)
    return render_scene(Scene("one", (event,)), np.random.default_rng(0))


@pytest.mark.parametrize("sound", SOUNDS, ids=NAMES)
def test_every_sound_is_audible_finite_and_unclipped(sound):
    for pitch, distance in ((-1.0, 0.0), (1.0, 1.0)):
        x = render(sound.name, 1.2, count=2 if sound.kind == "hit" else 1, pitch=pitch, bright=0.5, rate=-0.5,
                   distance=distance)
        assert np.isfinite(x).all() and np.abs(x).max() <= 0.951
        level = 20 * np.log10(synths.loudness(x))
        if np.abs(x).max() < 0.949:  # else the peak limiter turned a near sound down
            expected = 20 * np.log10(0.17) - 9 * distance
            assert abs(level - expected) < 1.5, "near events are 9 dB louder than far ones"


@pytest.mark.parametrize("sound", SOUNDS, ids=NAMES)
def test_a_synthesizer_returns_the_length_asked_for_and_repeats_itself(sound):
    event = Event(0, 0.0, 0.5, 1, 0.3, -0.2, 0.1, 0.0, seed=3)
    x, again = (sound.synth(8_001, event, np.random.default_rng(5)) for _ in range(2))
    assert x.shape == (8_001,) and np.array_equal(x, again)


@pytest.mark.parametrize("name, hz, octaves", [("beep", 2_000, 0.6), ("flute", 700, 0.7), ("drum", 85, 0.6)])
def test_pitch_is_where_the_factor_says(name, hz, octaves):
    for pitch in (-0.8, 0.0, 0.8):
        f, power = scipy.signal.welch(render(name, pitch=pitch), RATE, nperseg=8_192)
        assert abs(np.log2(f[power.argmax()] / (hz * 2 ** (octaves * pitch)))) < 0.12


def test_counts_are_audible():
    """k knocks make k onsets in the envelope."""
    for count in (1, 2, 3, 4):
        x = render("knock", 2.0, start=0.2, count=count)
        env = np.sqrt(scipy.signal.oaconvolve(x**2, np.ones(480) / 480, "same"))
        assert len(scipy.signal.find_peaks(env, 0.3 * env.max(), distance=1_600)[0]) == count


def test_far_is_duller_than_near():
    centroid = {}
    for distance in (0.0, 1.0):
        f, power = scipy.signal.welch(render("rain", 2.3, distance=distance), RATE)
        centroid[distance] = (f * power).sum() / power.sum()
    assert centroid[1.0] < 0.9 * centroid[0.0]


def test_harmonics_are_a_sum_of_sines_without_aliases():
    """The running product is the slow sum; partials above 7.5 kHz are left out."""
    f = np.linspace(1_000, 1_600, 4_000)
    phase = synths.phase_of(f, 4_000)
    slow = sum(a * np.sin((k + 1) * phase) for k, a in enumerate((1, 0.5, 0.3, 0.2)))  # the fifth: 8 kHz
    assert np.allclose(synths.harmonics(f, (1, 0.5, 0.3, 0.2, 9.0), 4_000), slow, atol=1e-9)
