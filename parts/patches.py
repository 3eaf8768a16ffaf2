"""Random patches: sounds that nobody designed, to pretrain the self-supervised teacher on.

As on a modular synthesizer, a patch is a source, a gate and a filter with random settings. None of
SoundWorld's recipes, names or factors is used, or the teacher would know in advance what the judges test.

    Patch   source (what vibrates), gate (when), 40 settings in [0, 1], place in the clip
      --render_patch-->  waveform (n,)
    RandomPatches.pair(i) --> (2, N)  the same patches twice, with slightly different settings and another
                              recording condition: the teacher learns that the two belong together

The idea of learning from pairs of random synthesizer settings ("doppelgaengers") is arXiv 2406.05923;
sources, gates, filters, all ranges and delta are ASSUMED. The order of random draws is part of the data: if
it changes, raise `RandomPatches.version`.

Which settings p[...] do what:

    0-7     gate: density, length, phase, irregularity, pause, background level, attack, fall
    8-23    source: pitch and its movement (8-14), then what each source says
    24-25   tremolo: depth, speed
    26-35   filter: band edges and slopes (26-29), number of resonances (30), their gains and places (31-35)
    36-37   movement of the filter: amount, kind and speed
    38      room
    39      ratios of a struck body (a seed)

Public: SOURCES, GATES, Patch, draw_patch, render_patch, RandomPatches.
"""
from __future__ import annotations

import multiprocessing as mp
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.signal
import torch

from parts.audio import CLIP_S, RATE
from parts.cache import cache_dir, digest, fill_array
from parts.synths import decay, fade_in_out, harmonics, loudness, phase_of, shaped_noise

DELTA = 0.08  # how much the two renderings of a patch differ
SOURCES = ("partials", "fm", "noise", "whistle", "dust", "modes", "pulses")
GATES = ("held", "single", "regular", "scattered", "grouped")


@dataclass(frozen=True)
class Patch:
    """One random sound: what vibrates, how it is gated, settings (40,) in [0, 1] (the table above), and its
    place in the clip (start and duration as shares of it)."""
    source: str
    gate: str
    settings: np.ndarray
    start: float
    dur: float

    def nudge(self, rng, delta: float) -> Patch:
        """A slightly different patch: every setting moved by delta N(0, 1), as in arXiv 2406.05923."""
        moved = np.clip(self.settings + delta * rng.standard_normal(len(self.settings)), 0, 1)
        return Patch(self.source, self.gate, moved, self.start, self.dur)


def draw_patch(rng) -> Patch:
    """A random patch; half of them last for the whole clip."""
    dur = 1.0 if rng.random() < 0.5 else rng.uniform(0.25, 0.9)
    source = str(rng.choice(SOURCES))
    gate = str(rng.choice(GATES))
    settings = rng.uniform(size=40)
    return Patch(source, gate, settings, rng.uniform(0, 1 - dur), dur)


def _log(p: float, lo: float, hi: float) -> float:
    """A setting in [0, 1] -> a value from lo to hi, evenly on a logarithmic scale."""
    return lo * (hi / lo) ** p


def _slow_wave(n: int, hz: float, rng) -> np.ndarray:
    """A sine (n,) from 0 to 1 with a random phase, to move something with."""
    return 0.5 + 0.5 * np.sin(2 * np.pi * (hz * np.arange(n) / RATE + rng.random()))


# --- gate: when the source sounds. p: settings 0-7

def _gate_events(kind: str, p, length: float, rng) -> list[tuple[float, float]]:
    """(start, duration) in s of each event in `length` seconds."""
    if kind == "held":
        return [(0.0, length)]
    if kind == "single":
        start = 0.4 * p[0] * length
        return [(start, _log(p[1], 0.08, 1.0) * (length - start))]

    events = []
    if kind == "regular":
        period = _log(p[0], 0.07, 1.2)
        for start in np.arange(p[2] * period, length, period):
            jitter = 0.15 * p[3] ** 2 * period * rng.standard_normal()
            events.append((start + jitter, (0.15 + 0.8 * p[1]) * period))
    elif kind == "scattered":
        count = 1 + rng.poisson(_log(p[0], 1, 14) * length)
        for start in rng.uniform(0, length, count):
            events.append((start, _log(p[1], 0.04, 0.6) * rng.uniform(0.6, 1.4)))
    else:  # grouped: 2 to 5 events, a pause, and again
        inner = _log(p[0], 0.05, 0.25)
        size = 2 + int(3.99 * p[2])
        for start in np.arange(0.3 * p[3], length, inner * size + _log(p[4], 0.15, 0.9)):
            for k in range(size):
                events.append((start + k * inner, inner * (0.3 + 0.6 * p[1])))
    return events


def _gate(kind: str, p, n: int, rng) -> tuple[np.ndarray, np.ndarray, list]:
    """-> (envelope (n,), place within the event (n,) in [0, 1], onsets in samples)."""
    events = _gate_events(kind, p, n / RATE, rng)
    env = np.full(n, 0.25 * max(0.0, p[5] - 0.6))  # in four of ten patches something sounds between events
    u = np.zeros(n)
    onsets = []
    attack = 0.6 * p[6] ** 3  # share of the event
    fall = 7 * max(0.0, p[7] - 0.25)
    for start, dur in events:
        first = max(0, round(start * RATE))
        end = min(n, round((start + dur) * RATE))
        if end - first < 32:
            continue
        # An event attacks, decays exponentially and ends with a 6 ms ramp; the louder of two counts.
        v = (np.arange(first, end) / RATE - start) / dur
        rise = np.minimum(v / (attack + 0.003 / dur), 1)
        shape = rise * np.exp(-fall * v) * np.minimum((1 - v) * dur / 0.006, 1)
        env[first:end] = np.maximum(env[first:end], shape.clip(0) * rng.uniform(0.6, 1))
        u[first:end] = v
        onsets.append(first)
    return env, u, onsets


# --- source: what vibrates. p: settings 8-23 as plain floats; u (n,): place within the event

def _pitch_curve(kind: str, p, u: np.ndarray, rng) -> np.ndarray:
    """Frequency (n,) in Hz: a base pitch, bent within each event by a glide and an arc of up to two octaves
    each, with vibrato. Its phase is drawn for every source, also for noise that has no pitch."""
    t = np.arange(len(u)) / RATE
    highest = 400
    if kind in ("partials", "fm"):
        highest = 2_800
    elif kind == "whistle":
        highest = 6_000
    f0 = _log(p[0], 45, highest)
    glide = 2 * (p[1] - 0.5) * 2 * p[2] ** 2
    arc = 2 * (p[3] - 0.5) * 2 * p[4] ** 2 * 4
    bend = glide * u + arc * u * (1 - u)
    vibrato = 0.5 * p[5] ** 4 * np.sin(2 * np.pi * (_log(p[6], 0.4, 16) * t + rng.random()))
    return np.minimum(f0 * 2 ** (bend + vibrato), 7_000)


def _partials(f: np.ndarray, p, rng) -> np.ndarray:
    """Thirty-two harmonics: their slope, the weakness of the even ones, a random colour, and some breath."""
    k = np.arange(1, 33)
    amps = k ** -(2.2 * p[7]) * np.where(k % 2, 1, 1 - p[8] ** 3) * np.exp(0.7 * rng.standard_normal(32))
    x = harmonics(f, amps, len(f))
    return x + 0.6 * p[9] ** 3 * np.std(x) * rng.standard_normal(len(f))


def _frequency_modulation(f: np.ndarray, p, u: np.ndarray) -> np.ndarray:
    """sin(phase + index sin(ratio phase)): harmonic for whole ratios (half of the patches), else metallic."""
    ratio = round(1 + 5 * p[7]) if p[8] < 0.5 else 0.3 + 6 * p[7]
    phase = phase_of(f, len(f))
    return np.sin(phase + 6 * p[9] ** 1.5 * np.exp(-3 * p[10] * u) * np.sin(ratio * phase))


def _whistle(f: np.ndarray, p, rng) -> np.ndarray:
    """A tone blurred by noise: from a pure tone to a howl."""
    n = len(f)
    pole = np.exp(-2 * np.pi * _log(p[7], 3, 600) / RATE)
    blur = scipy.signal.lfilter([1], [1, -pole], rng.standard_normal(n) + 1j * rng.standard_normal(n))
    return (np.exp(1j * phase_of(f, n)) * (blur / np.std(blur) + 2 * (1 - p[8]))).real


def _hits(kind: str, f: np.ndarray, p, u: np.ndarray, onsets: list, rng) -> np.ndarray:
    """Impulses (n,) that strike a body: random ones (dust), one an event and a little noise (modes), or one a
    period of a jittery tone (pulses)."""
    n = len(f)
    hits = np.zeros(n)
    if kind == "dust":
        k = max(1, rng.poisson(_log(p[7], 8, 2_500) * n / RATE))
        hits[rng.integers(0, n, k)] = rng.lognormal(0, 1.2 * p[8], k) * rng.choice([-1, 1], k)
    elif kind == "modes":
        hits[onsets] = 1
        hits += 0.3 * p[8] ** 3 * rng.standard_normal(n) * (u > 0) * np.exp(-20 * u)
    else:
        jitter = 1 + 0.2 * p[8] ** 2 * rng.standard_normal(n)
        turns = np.floor(phase_of(np.minimum(f, 400) * jitter, n) / (2 * np.pi))
        wraps = np.flatnonzero(np.diff(turns) > 0)
        hits[wraps] = rng.uniform(1 - 0.6 * p[9], 1, len(wraps))
    return hits


def _struck_body(kind: str, p, body_seed: float) -> np.ndarray:
    """What is hit, (6400,): resonances at random ratios, from a click to a ring. Setting 39 is the seed of
    the ratios; `nudge` moves it too, so a pair has two sets of ratios, about as many and as far apart."""
    m = 6_400
    count = 1 + int(11 * p[10])
    tau = _log(p[11], 0.002, 0.4 if kind == "modes" else 0.03)
    low = _log(p[12], 90, 3_500)
    steps = np.random.default_rng(int(1e6 * body_seed)).exponential(0.2 + 1.2 * p[13], count - 1)
    ratios = np.cumsum(np.concatenate([[1], steps]))
    body = np.zeros(m)
    for i, ratio in enumerate(ratios):
        if low * ratio < 7_500:
            tone = ratio ** -(1.2 * p[14]) * np.sin(phase_of(low * ratio, m) + i)
            body += tone * decay(m, tau / ratio ** (0.8 * p[15]), 0.0005)
    return body


def _source(kind: str, p, body_seed: float, u: np.ndarray, onsets: list, rng) -> np.ndarray:
    """The waveform (n,) before gate and filter."""
    f = _pitch_curve(kind, p, u, rng)
    if kind == "partials":
        return _partials(f, p, rng)
    if kind == "fm":
        return _frequency_modulation(f, p, u)
    if kind == "noise":
        return rng.standard_normal(len(u))
    if kind == "whistle":
        return _whistle(f, p, rng)
    hits = _hits(kind, f, p, u, onsets, rng)
    return scipy.signal.fftconvolve(hits, _struck_body(kind, p, body_seed))[: len(u)]


# --- filter and room. p: all 40 settings

def _filter_gain(f: np.ndarray, p, shift: float) -> np.ndarray:
    """Gain at frequencies f (Hz): a broad band and up to three resonances, moved by `shift` octaves."""
    lo = _log(p[26], 30, 2_500)
    hi = max(_log(p[27], 600, 9_000), 2 * lo)
    gain = 1 / np.sqrt(1 + (lo * 2**shift / f) ** (1 + 5 * p[28]) + (f / (hi * 2**shift)) ** (1 + 7 * p[29]))
    # Setting 33 serves twice: it is the place of the first resonance and the gain of the third.
    for k in range(int(3.99 * p[30])):
        centre = _log(p[33 + k], 200, 6_000) * 2**shift
        octaves = np.log2(f / centre)
        gain = gain * (1 + 12 * p[31 + k] ** 2 / (1 + (octaves / (0.08 + 0.3 * p[31 + k])) ** 2))
    return gain


def _filtered(x: np.ndarray, p, u: np.ndarray, rng) -> np.ndarray:
    """x (m,) through the filter; in half of the patches the filter opens or closes meanwhile."""
    m = len(x)
    size = scipy.fft.next_fast_len(m, real=True)
    f = np.fft.rfftfreq(size, 1 / RATE).clip(20)
    spec = scipy.fft.rfft(x, size)
    y = scipy.fft.irfft(spec * _filter_gain(f, p, 0.0), size)[:m]
    if p[36] > 0.5:
        # It moves within each event, or slowly to and fro: a mixture of the filter and its shifted copy.
        if p[37] > 0.5:
            mix = u
        else:
            mix = _slow_wave(m, _log(2 * p[37], 0.4, 8), rng)
        shifted = scipy.fft.irfft(spec * _filter_gain(f, p, 3 * p[36] - 2), size)[:m]
        y = y + mix * (shifted - y)
    return y


def render_patch(patch: Patch, n: int, rng) -> np.ndarray:
    """Patch -> (n,) of unit loudness, or silence where the gate has no event in its time. rng: what even
    identical settings leave to chance (noise, phases, jitter)."""
    p = patch.settings
    start = round(patch.start * n)
    m = min(n - start, max(1_600, round(patch.dur * n)))

    # Gate and source. The source "modes" is struck by its gate and rings on; the others are multiplied by it.
    env, u, onsets = _gate(patch.gate, p[:8], m, rng)
    x = _source(patch.source, p[8:24].tolist(), p[39], u, onsets, rng)
    if patch.source != "modes":
        depth = 0.9 * max(0.0, p[24] - 0.6) / 0.4
        x = x * env * (1 - depth * _slow_wave(m, _log(p[25], 0.6, 60), rng))

    # Filter, place in the clip, and in four of ten patches a room: a tail of decaying noise.
    out = np.zeros(n)
    out[start : start + m] = _filtered(x, p, u, rng) * fade_in_out(m, 0.01)
    if p[38] > 0.6:
        room = p[38] - 0.6
        tail = rng.standard_normal(8_000) * np.exp(-np.arange(8_000) / _log(room / 0.4, 300, 4_000))
        out += 0.7 * room / 0.4 * scipy.signal.fftconvolve(out, tail / np.linalg.norm(tail))[:n]
    return out / loudness(out)


class RandomPatches:
    """n clips for self-supervised learning, each rendered twice from slightly different patches
    ("doppelgaengers") and recorded under different conditions (level, tilt, hiss). One to three patches a
    clip. No label exists."""
    version = 1  # raise when a patch changes: the cache is keyed by it

    def __init__(self, n: int, seed: int = 0):
        self.n = n
        self.seed = seed
        self.key = f"patches-{digest(self.version, n, seed, CLIP_S, DELTA)}"

    def pair(self, i: int) -> np.ndarray:
        """(2, N) float32 with peaks of at most 0.95."""
        rng = np.random.default_rng([self.seed, 6, i])
        size = round(CLIP_S * RATE)
        patches = [draw_patch(rng) for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))]
        gains = 10 ** (-rng.uniform(0, 15, len(patches)) / 20)

        def hiss_spectrum(f):  # from white to 1/f in amplitude; a new slope each time it is called
            return np.maximum(f, 50) ** -rng.uniform(0, 1)

        pair = []
        for _ in range(2):
            # The same patches, each a little different in level (2 dB) and settings.
            x = np.zeros(size)
            for gain, patch in zip(gains, patches):
                level = gain * 10 ** (2 * rng.standard_normal() / 20)
                x += level * render_patch(patch.nudge(rng, DELTA), size, rng)

            # The recording: spectral tilt (a first-order filter), hiss 25 to 65 dB below, level over 20 dB.
            tilt = rng.uniform(-0.25, 0.25)
            hiss = shaped_noise(size, rng, hiss_spectrum) * 10 ** (-rng.uniform(25, 65) / 20)
            x = scipy.signal.lfilter([1, tilt], [1], x / loudness(x)) + hiss
            pair.append(x * min(0.2 * 10 ** (rng.uniform(-15, 5) / 20), 0.95 / np.abs(x).max()))
        return np.stack(pair).astype(np.float32)

    def features(self, frontend) -> np.ndarray:
        """frontend (a top-level function, (B, N) tensor -> (B, F, M) tensor) of all pairs, cached: memory map
        (n, 2, F, M) float16. The cache's key does not know the frontend."""
        shape = frontend(torch.zeros(1, round(CLIP_S * RATE))).shape[1:]
        args = (self.n, self.seed, frontend)
        return fill_array(cache_dir() / self.key, "features", (self.n, 2, *shape), np.float16, _patch_chunk,
                          self.n, args, desc="random patches")


def _patch_chunk(indices, n, seed, frontend) -> np.ndarray:
    """Features of the clips `indices`, (len(indices), 2, F, M) float16: what one worker makes."""
    if mp.parent_process() is not None:
        torch.set_num_threads(1)  # one thread a worker: more would fight over the cores
    world = RandomPatches(n, seed)
    return np.stack([frontend(torch.from_numpy(world.pair(i))).numpy() for i in indices]).astype(np.float16)
