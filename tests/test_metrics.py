"""Claims about the metrics: closed forms, independent implementations, and what each prefers."""
import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torchaudio.functional as TAF
from fabricated import gaussian

from parts import metrics
from parts.audio import RATE
from parts.spectra import log_mel


def test_wilson_interval_is_the_closed_form():
    z, p, n = scipy.stats.norm.ppf(0.975), 0.6, 500
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert np.allclose(metrics.wilson(300, 500), [centre - half, centre + half])


def test_event_match_needs_the_whole_set():
    presence = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]])
    logits = np.array([[2.0, 1, -1], [2.0, 1, -1], [-1.0, -1, -1]])
    assert metrics.event_match(presence, logits).tolist() == [True, False, False]


def test_bernoulli_kl_is_scipys_and_zero_for_equals():
    p, q = np.random.default_rng(0).uniform(0.01, 0.99, (2, 50, 24))
    exact = scipy.stats.entropy(np.stack([p, 1 - p]), np.stack([q, 1 - q]), axis=0).mean()
    assert abs(metrics.bernoulli_kl(p, q) - exact) < 1e-9
    assert metrics.bernoulli_kl(p, p) == 0
    assert np.isfinite(metrics.bernoulli_kl(np.ones((1, 2)), np.zeros((1, 2))))


def test_kid_is_unbiased_and_sees_a_shift():
    """Mean over 60 pairs of equal distributions is 0 within its standard error; a shift is far outside."""
    rng = np.random.default_rng(0)
    same = [metrics.kid(rng.standard_normal((40, 8)), rng.standard_normal((40, 8))) for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    shifted = metrics.kid(rng.standard_normal((200, 8)), 0.7 + rng.standard_normal((200, 8)))
    assert shifted > 5 * np.std(same)


def test_kid_is_the_double_sum():
    x, y = np.random.default_rng(0).standard_normal((2, 5, 3))
    y /= np.sqrt(np.mean(y**2))  # features of order one, as the function makes them

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    def mean_of_distinct_pairs(rows):
        return np.mean([kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    across = np.mean([kernel(a, b) for a in x for b in y])
    slow = mean_of_distinct_pairs(x) + mean_of_distinct_pairs(y) - 2 * across
    assert abs(metrics.kid(x, y) - slow) < 1e-9


def test_kid_does_not_depend_on_the_scale_of_the_features():
    x, y = np.random.default_rng(0).standard_normal((2, 20, 3))
    assert metrics.kid(30 * x, 30 * y) == pytest.approx(metrics.kid(x, y))
    assert metrics.kid(30 * x, y) != pytest.approx(metrics.kid(x, y)), "negative control: of one of them"


def test_frechet_distance_is_torchaudios_scipys_and_the_closed_form():
    """Diagonal Gaussians: sum (mu_i - nu_i)^2 + (s_i - t_i)^2. Negative control: without the cross term it
    is far off."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4_000, 6)) * [1, 2, 1, 1, 3, 1]
    y = rng.standard_normal((3_000, 6)) + 0.5
    d = metrics.frechet(x, y)
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    mx, my = x.mean(0), y.mean(0)
    scipys = ((mx - my) ** 2).sum() + np.trace(cx + cy - 2 * scipy.linalg.sqrtm(cx @ cy).real)
    torchs = float(TAF.frechet_distance(*(torch.from_numpy(a) for a in (mx, cx, my, cy))))
    assert abs(d - scipys) < 1e-6 and abs(d - torchs) < 1e-6
    assert abs(d - (6 * 0.25 + 1 + 4)) < 0.4
    assert abs(metrics.frechet(x, x)) < 1e-6 and np.trace(cx + cy) > 2 * d
    with pytest.raises(ValueError, match="use kid"):
        metrics.frechet(x[:5], y)


def test_lsd_floors_are_those_of_exponential_power():
    """Two noises of one spectrum: std(log10 Exp) sqrt 2 = 0.79; the exact mean log spectrum: 0.56."""
    a = metrics.log_power(gaussian(RATE * 8, 0))
    b = metrics.log_power(gaussian(RATE * 8, 1))
    std = np.pi / np.sqrt(6) / np.log(10)
    assert abs(metrics.lsd(a, b)["lsd"] - std * np.sqrt(2)) < 0.02
    assert abs(metrics.lsd(a, np.broadcast_to(b.mean(0), a.shape))["lsd"] - std) < 0.02


def test_lsd_bands_split_at_the_input_rate():
    ref = np.zeros((10, 1_025))
    est = ref.copy()
    est[:, 256:] = 2  # from int(1025 * 4000 / 16000) = 256 up
    d = metrics.lsd(ref, est, 2_000)
    assert d["lsd_lf"] == 0
    assert abs(d["lsd_hf"] - 2) < 1e-12
    assert abs(d["lsd"] - 2 * np.sqrt(769 / 1_025)) < 1e-12


def test_si_sdr_ignores_scale_and_offset_and_counts_noise():
    x = gaussian(seed=0).astype(np.float64)
    noise = gaussian(seed=1).astype(np.float64)
    centred = x - x.mean()
    noise -= noise.mean() + (noise @ centred) / (centred @ centred) * centred
    y = 3 * (x + 0.1 * noise * np.linalg.norm(x) / np.linalg.norm(noise)) + 0.5
    assert abs(metrics.si_sdr(x, y) - 20) < 0.05
    assert metrics.si_sdr(x, np.zeros_like(x)) == -80
    assert np.isfinite(metrics.si_sdr(np.zeros_like(x), x))
    assert metrics.si_sdr(x, x) == 120, "its upper bound"
    other = gaussian(seed=2).astype(np.float64)
    other -= other.mean() + (other @ centred) / (centred @ centred) * centred
    assert metrics.si_sdr(x, other + 1e-5 * centred) == -80, "its lower one"


def test_a_single_clip_has_no_distance_and_no_interval():
    x = np.random.default_rng(0).standard_normal((5, 3))
    for a, b in ((x[:1], x), (x, x[:1])):
        assert np.isnan(metrics.kid(a, b))
    assert np.isfinite(metrics.kid(x[:2], x))
    assert np.isnan(metrics.mean_interval(np.array([0.5]))).all()


def test_treble_is_counted_relative_to_what_lies_below():
    low, high = (np.sin(2 * np.pi * hz * np.arange(RATE) / RATE).astype(np.float32) for hz in (440, 5_000))
    for gain in (1.0, 0.01):
        assert abs(metrics.level_above(gain * (low + 0.1 * high), 2_000) + 20) < 0.1
    assert metrics.level_above(0 * low, 2_000) >= -120
    edge = np.sin(2 * np.pi * 2_250 * np.arange(RATE) / RATE).astype(np.float32)
    assert metrics.level_above(low + edge, 2_000) < -30, "what is within 500 Hz of it is not counted"


def test_fine_texture_tells_tones_from_noise_and_leaves_silence_out():
    """Crest of a tone over a hiss is far above the hiss's, in its own band; half a clip of silence changes
    nothing."""
    rng = np.random.default_rng(0)
    hiss = 0.05 * rng.standard_normal(2 * RATE).astype(np.float32)
    tone = hiss + 0.5 * np.sin(2 * np.pi * 3_100 * np.arange(2 * RATE) / RATE).astype(np.float32)
    of_hiss, of_tone = metrics.fine_texture(hiss), metrics.fine_texture(tone)
    band = int(3_100 / 250)                                # 32 bands of 250 Hz
    assert of_tone[0, band] > of_hiss[0, band] + 2
    assert np.abs(of_tone[0, 20:] - of_hiss[0, 20:]).max() < 0.2, "nowhere else"
    assert of_tone[1, band] < of_hiss[1, band], "a tone stands still"
    half = np.where(np.arange(2 * RATE) < RATE, hiss, 0).astype(np.float32)
    assert np.abs(metrics.fine_texture(half) - of_hiss).max() < 0.4


def test_the_high_band_does_not_depend_on_what_is_below_the_cutoff():
    hiss = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    low, high = (np.sin(2 * np.pi * hz * np.arange(RATE) / RATE).astype(np.float32) for hz in (300, 5_000))
    of_hiss, with_low, with_high = (metrics.high_band_mel(x, 2_000) for x in (hiss, hiss + low, hiss + high))
    assert of_hiss.shape[1] == 28, "of 64 bands"
    assert np.abs(with_low - of_hiss).max() < 0.3 and np.abs(with_high - of_hiss).max() > 2


def test_texture_depends_on_level_and_roughness_and_not_on_order():
    """Ten times as loud: every band's mean is ln 10 higher and nothing else moves. Backwards: the same.
    Clicks are rougher in time than a hiss of the same spectrum, a tone rougher in frequency."""
    rng = np.random.default_rng(0)
    hiss = 0.05 * rng.standard_normal(RATE).astype(np.float32)
    clicks = np.where(np.arange(RATE) % 1_600 == 800, 1, 0).astype(np.float32) * 0.9
    tone = 0.1 * np.sin(2 * np.pi * 1_000 * np.arange(RATE) / RATE).astype(np.float32)
    once, louder, backwards = (metrics.texture(x)[0] for x in (hiss, 10 * hiss, hiss[::-1]))
    # Each column by hand: mean, deviation and roughness of the codec's log-mel bands.
    mel = log_mel(torch.as_tensor(clicks)[None])[0].numpy()
    by_hand = [[f(mel[:, band]) for band in range(64)] for f in (np.mean, np.std)]
    by_hand.append([np.mean([abs(b - a) for a, b in itertools.pairwise(mel[:, band])]) for band in range(64)])
    by_hand.append([np.mean(abs(mel[:, band + 1] - mel[:, band])) for band in range(63)])
    assert np.allclose(metrics.texture(clicks)[0], np.concatenate(by_hand), atol=1e-4)
    assert np.std(clicks) > 0 and min(by_hand[1]) > 0.1
    assert once.shape == (255,) and np.allclose((louder - once)[:64], np.log(10), atol=1e-3)
    assert np.allclose(louder[64:], once[64:], atol=1e-3) and np.abs(backwards - once).mean() < 0.03
    assert metrics.texture(clicks)[0, 128:192].mean() > 2 * once[128:192].mean()
    assert metrics.texture(tone)[0, 192:].mean() > 1.3 * once[192:].mean()


def test_energy_score_prefers_the_true_distribution_to_its_mean_and_to_wrong_widths():
    """Proper scoring: averaged over truths, sampling the true law beats half and double its spread, and
    beats the blurred mean."""
    rng = np.random.default_rng(0)

    def draw(width=1.0):
        return width * rng.standard_normal((50, 6))

    def mean_score(width):
        return np.mean([metrics.energy_score(draw(), [draw(width) for _ in range(2)]) for _ in range(200)])

    true = mean_score(1.0)
    mean = np.mean([metrics.energy_score(draw(), [np.zeros((50, 6))]) for _ in range(200)])
    assert true < mean_score(0.5) - 0.01
    assert true < mean_score(2.0) - 0.01
    assert true < mean - 0.1


def test_a_sound_is_described_as_a_level_meter_and_an_analyser_do():
    """Sines of amplitude 0.4 at 500 Hz and 0.2 at 2 kHz: four fifths of the power are at 500 Hz."""
    t = np.arange(RATE) / RATE
    x = 0.4 * np.sin(2 * np.pi * 500 * t) + 0.2 * np.sin(2 * np.pi * 2_000 * t)
    found = metrics.describe(x)
    assert found["centroid_hz"] == pytest.approx((4 * 500 + 2_000) / 5, abs=1)
    assert found["rms"] == pytest.approx(0.1**0.5, abs=1e-4) and found["peak"] == np.abs(x).max()
