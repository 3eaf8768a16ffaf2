"""Twenty-four small synthesizers, and the primitives they are made of.

A synthesizer is additive or subtractive: sums of sines with moving frequencies (`harmonics`), noise with a
chosen spectrum (`shaped_noise`), both under an envelope (`decay`, `fade_in_out`), or many short grains of
these (`_grains`). All recipes are ASSUMED.

Every synthesizer has the same three arguments and returns one waveform:

    n    length in samples at 16 kHz
    p    settings of the event, each in [-1, 1]: p.pitch, p.bright (brightness), p.rate (how fast it repeats).
         A parts.soundworld.Event has them; a synthesizer reads those that mean something to its sound.
    rng  numpy Generator: what differs between two events with the same settings
    ->   (n,) float64 at any level; parts/soundworld.py sets the loudness

Frequencies are in Hz, times in s, except lengths called n or m (samples). Names in every recipe: t (n,) is
time in s, u is the place in the sound from 0 to 1, f a frequency.

The order of random draws is part of a sound: moving one changes every clip that is cached or that a shipped
model was trained on (then raise SoundWorld.version, and RandomPatches.version for a primitive).

Public: the primitives phase_of, harmonics, shaped_noise, decay, fade_in_out, loudness; the
synthesizers rain, thunder, wind, dog, bird, cricket, engine, helicopter, horn, siren, beep, phone, bell,
flute, guitar, knock, glass, drum, laser, buzz, bleeps, singing, laugh, baby.
"""
from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.signal

from parts.audio import RATE

# --- primitives

def phase_of(f: np.ndarray | float, n: int) -> np.ndarray:
    """Phase in radians of a tone of frequency f (Hz, scalar or (n,)): the running sum of the frequency."""
    return 2 * np.pi * np.cumsum(np.broadcast_to(f, n)) / RATE


def harmonics(f: np.ndarray | float, amps, n: int) -> np.ndarray:
    """sum_k amps[k] sin((k+1) phase), (n,): partials above 7.5 kHz are left out, or they would alias."""
    # sin(k phase) is the imaginary part of z^k, z = exp(i phase): a multiplication a partial, not a sine.
    z1 = np.exp(1j * phase_of(f, n))
    z = z1.copy()
    out = np.zeros(n)
    for k, amp in enumerate(amps):
        if (k + 1) * np.max(f) > 7_500:
            break
        out += amp * z.imag
        z *= z1
    return out


def shaped_noise(n: int, rng, shape) -> np.ndarray:
    """Gaussian noise (n,) with magnitude spectrum shape(frequency in Hz), unit RMS. `shape` is called after
    the noise was drawn."""
    size = scipy.fft.next_fast_len(n, real=True)
    f = np.fft.rfftfreq(size, 1 / RATE)
    spec = (rng.standard_normal(len(f)) + 1j * rng.standard_normal(len(f))) * shape(f)
    x = scipy.fft.irfft(spec, size)[:n]
    return x / (np.sqrt(np.mean(x**2)) + 1e-12)


def band_noise(n: int, rng, lo: float, hi: float, slope: float = 4.0) -> np.ndarray:
    """Noise (n,), unit RMS, flat from lo to hi (Hz), outside falling with `slope` as a power of frequency."""
    def shape(f):
        return 1 / np.sqrt(1 + (lo / np.maximum(f, 1)) ** (2 * slope) + (f / hi) ** (2 * slope))
    return shaped_noise(n, rng, shape)


def decay(n: int, tau: float, attack: float = 0.003) -> np.ndarray:
    """Envelope (n,): linear attack (s), exponential decay with time constant tau (s)."""
    t = np.arange(n) / RATE
    return np.minimum(t / attack, 1) * np.exp(-t / tau)


def fade_in_out(n: int, ramp: float = 0.03) -> np.ndarray:
    """Envelope (n,): linear fade in and out over `ramp` seconds, 1 between."""
    t = np.arange(n) / RATE
    return np.clip(np.minimum(t, n / RATE - t) / ramp, 0, 1)


def loudness(x: np.ndarray) -> float:
    """RMS of the loudest 50 ms (800 samples): what makes a knock and a drone comparable."""
    padded = np.pad(x, (0, max(0, 800 - len(x))))
    total = np.concatenate([[0], np.cumsum(padded**2)])  # energy up to each sample
    return float(np.sqrt(max((total[800:] - total[:-800]).max() / 800, 1e-12)))


def _vowel(f0, n, centres=(750, 1200, 2600), widths=(110, 130, 260), gains=(1, 0.6, 0.25)) -> np.ndarray:
    """A sung vowel (n,): harmonics of f0 (Hz, scalar or (n,)) weighted by formants, the resonances of a
    throat, given by their centres, widths (Hz) and gains."""
    k = np.arange(1, 31)
    f = k * np.mean(f0)
    formants = np.zeros(30)
    for centre, width, gain in zip(centres, widths, gains):
        formants += gain / (1 + ((f - centre) / width) ** 2)
    return harmonics(f0, formants / k**0.3, n)


def _grains(n: int, times, grain) -> np.ndarray:
    """Sum (n,) of the waveforms grain(i) placed at times[i] (s); what falls outside [0, n) is cut."""
    out = np.zeros(n)
    for i, time in enumerate(times):
        start = int(time * RATE)
        if 0 <= start < n:
            piece = grain(i)[: n - start]
            out[start : start + len(piece)] += piece
    return out


# --- weather

def rain(n, p, rng):
    """Splashes at random moments (a Poisson process) over a steady hiss."""
    drops = np.zeros(n)
    k = rng.poisson((260 + 120 * p.rate) * n / RATE)
    drops[rng.integers(0, n, k)] = rng.lognormal(0, 0.8, k) * rng.choice([-1, 1], k)
    splash = band_noise(160, rng, 1_500, 6_500) * decay(160, 0.0025, 0.0005)
    hiss = band_noise(n, rng, 900 + 500 * (p.bright + 1), 7_500, 2)
    return scipy.signal.fftconvolve(drops, splash)[:n] + 0.35 * hiss


def thunder(n, p, rng):
    """A crack, then low noise that swells four times."""
    crack = band_noise(n, rng, 60, 2_000 + 700 * p.bright, 1.2) * decay(n, 0.12, 0.004)
    t = np.arange(n) / RATE
    levels = rng.uniform(0.5, 1, 4)
    centres = np.linspace(0.05, 0.75, 4) * n / RATE
    widths = rng.uniform(0.08, 0.2, 4)
    rolls = sum(a * np.exp(-(((t - c) / w) ** 2)) for a, c, w in zip(levels, centres, widths))
    return 0.5 * crack + band_noise(n, rng, 35, 120, 1.6) * (rolls + 0.5 * np.exp(-t / 0.5))


def wind(n, p, rng):
    """Four layers of narrow noise; a slow wave moves the weight between them."""
    t = np.arange(n) / RATE
    gust = np.sin(2 * np.pi * rng.uniform(0.5, 0.9) * t + rng.uniform(0, 6.28))
    centre = 2 ** (0.6 * gust + 0.3 * p.bright)  # gusts raise the howl's pitch and its level together
    howl = np.zeros(n)
    for c in (300, 420, 590, 830):
        layer = band_noise(n, rng, 0.88 * c, 1.14 * c, 6)
        howl += layer * np.exp(-8 * np.log2(c / (500 * centre)) ** 2)
    return (howl + 0.25 * band_noise(n, rng, 80, 500, 1.2)) * (0.65 + 0.35 * gust)


# --- animals

def dog(n, p, rng):
    """A bark: a short vowel whose pitch rises and falls, roughened by noise."""
    f0 = 430 * 2 ** (0.7 * p.pitch)
    arc = f0 * (0.75 + 0.5 * np.sin(np.pi * np.clip(np.linspace(0, 1.25, n), 0, 1)) ** 0.7)
    voice = _vowel(arc, n, (650, 1_350, 2_500), (250, 300, 400), (1, 0.9, 0.4))
    rough = 0.3 * band_noise(n, rng, 500, 3_000, 2)
    end = np.clip((n - np.arange(n)) / 400, 0, 1)
    return (voice / (np.std(voice) + 1e-9) + rough) * decay(n, 0.07, 0.012) * end


def bird(n, p, rng):
    """Chirps of 60 to 90 ms, alternately sweeping up and down: a warble."""
    def chirp(i):
        m = int(rng.uniform(0.06, 0.09) * RATE)
        u = np.linspace(0, 1, m)
        begin, end = (3_000, 4_600) if i % 2 else (4_800, 3_200)
        f = (begin + (end - begin) * u) * 2 ** (0.12 * p.bright)
        return np.sin(phase_of(f, m)) * np.sin(np.pi * u)
    gap = 0.13 - 0.03 * p.rate
    return _grains(n, np.arange(0.0, n / RATE - 0.06, gap) + rng.uniform(0, 0.012), chirp)


def cricket(n, p, rng):
    """Trains of four 15 ms pulses of one high tone."""
    f = 4_300 + 300 * p.bright
    wave = np.sin(phase_of(f, 240)) * np.sin(np.pi * np.linspace(0, 1, 240)) ** 2

    def pulse(i):
        return wave
    trains = np.arange(0.02, n / RATE, 0.24 - 0.05 * p.rate)
    return _grains(n, np.concatenate([t + 0.026 * np.arange(4) for t in trains]), pulse)


# --- vehicles

def engine(n, p, rng):
    """A low wavering tone of 24 uneven harmonics and band noise, both beating with the firing of the
    cylinders."""
    t = np.arange(n) / RATE
    f0 = 62 * 2 ** (0.7 * p.pitch) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(1, 2) * t))
    tone = harmonics(f0, 1 / np.arange(1, 25) ** (0.9 - 0.2 * p.bright) * rng.uniform(0.5, 1.4, 24), n)
    firing = 0.6 + 0.4 * np.sin(phase_of(f0 / 2, n))  # each second cylinder is louder: the put-put roughness
    return firing * tone + 0.35 * firing * band_noise(n, rng, 150, 900, 1.5)


def helicopter(n, p, rng):
    """Low and middle noise, chopped by the rotor about eleven times a second."""
    t = np.arange(n) / RATE
    chop = np.clip(np.sin(2 * np.pi * (11 + 2.5 * p.rate) * t + rng.uniform(0, 6.28)), 0, 1) ** 3
    thump = 1.3 * band_noise(n, rng, 50, 160, 2)
    blades = band_noise(n, rng, 250, 1_600 + 500 * p.bright, 2)
    return chop * (thump + blades) + 0.06 * band_noise(n, rng, 200, 2_000, 1)


def horn(n, p, rng):
    """Two harmonic tones, a major third apart."""
    f = 390 * 2 ** (0.6 * p.pitch)
    amps = 1 / np.arange(1, 16) ** (0.55 - 0.2 * p.bright)
    return (harmonics(f, amps, n) + harmonics(f * 1.26, amps, n)) * fade_in_out(n, 0.015)


# --- alarms

def siren(n, p, rng):
    """A tone that sweeps an octave up and down."""
    t = np.arange(n) / RATE
    sweep = scipy.signal.sawtooth(2 * np.pi * (1.6 + 0.4 * p.rate) * t, 0.5)
    f = 850 * 2 ** (0.45 * p.pitch + 0.5 * sweep)
    return harmonics(f, (1, 0.35, 0.25, 0.1), n)


def beep(n, p, rng):
    """A steady tone with its third harmonic."""
    return harmonics(2_000 * 2 ** (0.6 * p.pitch), (1, 0, 0.33), n) * fade_in_out(n, 0.004)


def phone(n, p, rng):
    """A clapper between two gongs, about 22 strokes a second, in rings of 0.6 s."""
    def gong(i):
        m = 3_000
        f = (1_150, 1_460)[i % 2] * 2 ** (0.08 * p.bright)
        partials = ((1, 1), (2.41, 0.5), (3.9, 0.25))  # ratio to f, level
        return sum(a * np.sin(phase_of(f * ratio, m)) for ratio, a in partials) * decay(m, 0.05, 0.001)
    strike = int(RATE / (22 + 3 * p.rate))  # samples between two strokes
    x = _grains(n, np.arange(0, n, strike) / RATE, gong)
    t = np.arange(n) / RATE
    return x * np.where((t % 0.75) < 0.6, 1, 0.08)


# --- instruments

# Ratio, level and decay of a church bell's hum, prime, tierce, quint, nominal and two upper partials.
BELL_PARTIALS = ((0.5, 0.5, 1.3), (1, 1, 1), (1.19, 0.7, 0.8), (1.5, 0.35, 0.6), (2, 0.6, 0.5),
                 (2.74, 0.45, 0.35), (3.76, 0.3, 0.25))


def bell(n, p, rng):
    """Seven inharmonic partials, each with a decay of its own."""
    f = 520 * 2 ** (0.9 * p.pitch)
    out = np.zeros(n)
    for i, (ratio, level, length) in enumerate(BELL_PARTIALS):
        if f * ratio < 7_500:
            amp = level * (1 + 0.3 * p.bright) ** max(0, ratio - 1)
            out += amp * np.sin(phase_of(f * ratio, n) + i) * decay(n, 0.45 * length, 0.002)
    return out


def flute(n, p, rng):
    """Four harmonics with vibrato, and breath noise."""
    t = np.arange(n) / RATE
    f = 700 * 2 ** (0.7 * p.pitch) * (1 + 0.008 * np.sin(2 * np.pi * 5.2 * t))
    tone = harmonics(f, (1, 0.22 + 0.1 * p.bright, 0.1, 0.03), n)
    return fade_in_out(n, 0.06) * (tone + 0.12 * band_noise(n, rng, 600, 4_000, 1))


def guitar(n, p, rng):
    """A string plucked at 18 % of its length: partial j is stretched by its stiffness and decays faster than
    the one below."""
    f = 165 * 2 ** (0.8 * p.pitch)
    k = np.arange(1, 21)
    pluck = np.abs(np.sin(np.pi * k * 0.18)) / k ** (1.1 - 0.3 * p.bright)
    out = np.zeros(n)
    for j, amp in zip(k, pluck):
        if f * j < 6_000:
            stretched = f * j * np.sqrt(1 + 2e-4 * j * j)
            out += amp * np.sin(phase_of(stretched, n)) * decay(n, 0.5 / (1 + 0.25 * j), 0.002)
    return out


# --- impacts

def knock(n, p, rng):
    """Four short modes of a wooden board and the noise of the blow."""
    modes = ((230, 1), (410, 0.8), (690, 0.5), (1_130, 0.3))  # Hz, level
    wood = sum(a * np.sin(phase_of(f * 2 ** (0.2 * p.bright), n)) * decay(n, 0.022, 0.0008) for f, a in modes)
    return wood + 0.5 * band_noise(n, rng, 300, 2_500, 2) * decay(n, 0.006, 0.0005)


def glass(n, p, rng):
    """A crash, then up to 35 shards tinkling, ever fewer."""
    def shard(i):
        m = 2_400
        f = rng.uniform(2_600, 7_200)
        return rng.uniform(0.3, 1) * np.sin(phase_of(f, m)) * decay(m, rng.uniform(0.015, 0.05), 0.0006)
    times = np.concatenate([[0], rng.exponential(0.13, 34)])
    crash = band_noise(n, rng, 2_500, 7_800, 3) * decay(n, 0.04, 0.001)
    return 1.4 * crash + _grains(n, times, shard)


def drum(n, p, rng):
    """A decaying low tone whose pitch falls in the first 30 ms, and the noise of the stick on the skin."""
    t = np.arange(n) / RATE
    f = 85 * 2 ** (0.6 * p.pitch) * (1 + 1.2 * np.exp(-t / 0.03))
    skin = band_noise(n, rng, 150, 1_500, 1.5) * decay(n, 0.012, 0.001)
    return np.sin(phase_of(f, n)) * decay(n, 0.13, 0.002) + 0.35 * skin


# --- electronics

def laser(n, p, rng):
    """A tone that falls by about three octaves."""
    u = np.linspace(0, 1, n)
    f = 2_600 * 2 ** (0.5 * p.pitch) * np.exp(-2.6 * u) + 120
    return harmonics(f, (1, 0.5, 0.33, 0.2), n) * fade_in_out(n, 0.008) * np.exp(-1.2 * u)


def buzz(n, p, rng):
    """Thirty-nine harmonics of mains hum, the odd ones twice as strong, wavering slowly (a random walk)."""
    f = 118 * 2 ** (0.5 * p.pitch)
    k = np.arange(1, 40)
    amps = np.where(k % 2 == 1, 1, 0.5) / k ** (0.35 - 0.15 * p.bright)
    return harmonics(f, amps, n) * (1 + 0.05 * rng.standard_normal(n).cumsum() / np.sqrt(n))


def bleeps(n, p, rng):
    """Short square-like tones, each at a random semitone of two and a half octaves."""
    step = 0.085 - 0.015 * p.rate

    def blip(i):
        m = int(step * RATE * 0.9)
        f = 300 * 2 ** (rng.integers(0, 31) / 12)
        return harmonics(f, (1, 0, 0.33, 0, 0.2), m) * fade_in_out(m, 0.004)
    return _grains(n, np.arange(0, n / RATE, step), blip)


# --- voices

def singing(n, p, rng):
    """One long vowel with vibrato."""
    t = np.arange(n) / RATE
    f0 = 230 * 2 ** (0.7 * p.pitch) * (1 + 0.018 * np.sin(2 * np.pi * 5.5 * t + rng.uniform(0, 6)))
    return _vowel(f0, n) * fade_in_out(n, 0.06)


def laugh(n, p, rng):
    """"ha ha ha": breath, then a short vowel, each lower than the one before."""
    f0 = rng.uniform(170, 290)

    def ha(i):
        m = int(0.15 * RATE)
        voice = _vowel(f0 * 0.96**i * np.linspace(1.15, 0.9, m), m)
        voice *= np.clip((np.arange(m) - 700) / 400, 0, 1) * decay(m, 0.07)
        breath = band_noise(m, rng, 800, 3_500, 1.5) * decay(m, 0.03, 0.012)
        return voice / (np.std(voice) + 1e-9) + 0.5 * breath
    return _grains(n, np.arange(0, n / RATE - 0.05, 0.19 - 0.03 * p.rate), ha)


def baby(n, p, rng):
    """Crying: one wail in about 0.7 s, then a gasp."""
    t = np.arange(n) / RATE
    u = (t * (1.35 + 0.2 * p.rate)) % 1.0
    wail = np.sin(np.pi * np.clip(u / 0.8, 0, 1))
    f0 = 470 * 2 ** (0.1 * p.bright) * (0.82 + 0.32 * wail)
    tremble = 1 + 0.02 * np.sin(2 * np.pi * 14 * t)
    return _vowel(f0 * tremble, n, (1_050, 2_000, 3_500), (350, 400, 600), (1, 0.7, 0.6)) * wail**0.5
