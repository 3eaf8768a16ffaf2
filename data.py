"""Captioned audio: SoundWorld, folders of recordings, band-limiting, and the latent cache.

Idea.  A diffusion model needs pairs (sound, caption), and a study of training dynamics needs to know what is *truly* in each
sound. SoundWorld makes such pairs by synthesis, without a download: every clip is drawn as a symbolic `Scene` (which events,
when, how many, how high, how far) that is then rendered to audio and worded as a caption. The same interface reads folders
of real recordings, so the training loop never knows which one it is looking at.

    Scene  --render-->  waveform (N,)          16 kHz mono float32, |x| <= 0.95
           --word---->  caption                "two low bells, then rain in the distance"
           --factors->  presence, onset, pitch, count, distance of each of the 24 sound classes

    waveform --band_limit--> muffled waveform  the input of super-resolution
    dataset + codec --LatentCache--> z (T, C)  encoded once, memory-mapped, resumable

A data set is any object with: `key` (a string that changes when the data changes), `len(d)`, `wave(i) -> (N,) float32`,
`caption(i, k=0) -> str` (wording k of clip i), `lengths() -> list of N`, and `prepare()` (make its cache, with a progress bar).

Conventions: t in [0,1], t = 1 is noise, t = 0 is data. B batch, N samples, T tokens, C latent channels. Rates in Hz.

    python data.py            # demo: five scenes, worded and measured
"""
from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import multiprocessing as mp
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.signal
from tqdm import tqdm

RATE = 16_000  # Hz; every waveform inside the project has this rate
CLIP_S = 2.56  # s; 40,960 samples = 128 codec frames = 64 tokens


class UserError(Exception):
    """Something the user can fix. Entry points print it as one line and exit with status 2."""


def run_cli(main) -> None:
    """Run `main()` as a command: a UserError becomes one clear line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except (UserError, OSError) as e:  # OSError: a full disk, a folder where a file should be; its text names the path
        print(f"error: {printable(str(e))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def printable(text: str) -> str:
    """For the terminal: control characters become spaces. A caption or a file name from elsewhere could move the cursor or retitle the window."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, and its folder where there is none, so that a reader, or a crash, finds the old one or the new one and never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def cache_dir() -> Path:
    """Folder of everything that can be made again. Delete it whenever you like; STAGE_AUDIO_CACHE moves it elsewhere."""
    d = Path(os.environ.get("STAGE_AUDIO_CACHE") or Path.home() / ".cache" / "stage-audio")
    d.mkdir(parents=True, exist_ok=True)
    return d


def digest(*parts) -> str:
    """Short stable hash of any printable parts; the name of a cache entry."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------------
# SoundWorld, part 1: what each sound is made of. A synthesizer takes (n samples, factors, rng) and returns a waveform of any
# level; `p.pitch`, `p.bright`, `p.rate` lie in [-1, 1]. The ranges of two classes never overlap in more than one property, so
# that each class can be named by ear.

def _phase(f: np.ndarray | float, n: int) -> np.ndarray:
    """Phase in radians of a tone of frequency f (Hz, scalar or (n,)): the running sum of the frequency."""
    return 2 * np.pi * np.cumsum(np.broadcast_to(f, n)) / RATE


def _harmonics(f: np.ndarray | float, amps, n: int) -> np.ndarray:
    """sum_k amps[k] sin((k+1) phase): partials above 7.5 kHz are left out, or they would alias."""
    z1 = np.exp(1j * _phase(f, n))
    z, out = z1.copy(), np.zeros(n)
    for k, a in enumerate(amps):
        if (k + 1) * np.max(f) > 7_500:
            break
        out += a * z.imag
        z *= z1
    return out


def _noise(n: int, rng, shape) -> np.ndarray:
    """Gaussian noise with magnitude spectrum shape(frequency in Hz), unit RMS."""
    m = scipy.fft.next_fast_len(n, real=True)
    f = np.fft.rfftfreq(m, 1 / RATE)
    spec = (rng.standard_normal(len(f)) + 1j * rng.standard_normal(len(f))) * shape(f)
    x = scipy.fft.irfft(spec, m)[:n]
    return x / (np.sqrt(np.mean(x**2)) + 1e-12)


def _band(lo: float, hi: float, slope: float = 4.0):
    """Spectrum shape: flat between lo and hi, falling with `slope` as a power of frequency outside."""
    return lambda f: 1 / np.sqrt(1 + (lo / np.maximum(f, 1)) ** (2 * slope) + (f / hi) ** (2 * slope))


def _decay(n: int, tau: float, attack: float = 0.003) -> np.ndarray:
    """Envelope: linear attack (s), exponential decay with time constant tau (s)."""
    t = np.arange(n) / RATE
    return np.minimum(t / attack, 1) * np.exp(-t / tau)


def _hold_env(n: int, ramp: float = 0.03) -> np.ndarray:
    """Envelope: linear fade in and out over `ramp` seconds, 1 between."""
    t = np.arange(n) / RATE
    return np.clip(np.minimum(t, n / RATE - t) / ramp, 0, 1)


def _formants(f: np.ndarray, centres, widths, gains) -> np.ndarray:
    """Gains of a vowel's resonances at frequencies f (Hz)."""
    return sum(g / (1 + ((f - c) / w) ** 2) for c, w, g in zip(centres, widths, gains))


def _vowel(f0, n, rng, centres=(750, 1200, 2600), widths=(110, 130, 260), gains=(1, 0.6, 0.25)) -> np.ndarray:
    """A sung vowel: harmonics of f0 (Hz, scalar or (n,)) weighted by formants."""
    k = np.arange(1, 31)
    return _harmonics(f0, _formants(k * np.mean(f0), centres, widths, gains) / k**0.3, n)


def _grains(n: int, times, grain) -> np.ndarray:
    """Sum of grain(i) waveforms placed at times (s); what falls outside [0, n) is cut."""
    out = np.zeros(n)
    for i, t in enumerate(times):
        s = int(t * RATE)
        if 0 <= s < n:
            g = grain(i)[: n - s]
            out[s : s + len(g)] += g
    return out


def _rain(n, p, rng):
    drops = np.zeros(n)
    k = rng.poisson((260 + 120 * p.rate) * n / RATE)
    drops[rng.integers(0, n, k)] = rng.lognormal(0, 0.8, k) * rng.choice([-1, 1], k)
    splash = _noise(160, rng, _band(1_500, 6_500)) * _decay(160, 0.0025, 0.0005)
    hiss = _noise(n, rng, _band(900 + 500 * (p.bright + 1), 7_500, 2))
    return scipy.signal.fftconvolve(drops, splash)[:n] + 0.35 * hiss


def _thunder(n, p, rng):
    crack = _noise(n, rng, _band(60, 2_000 + 700 * p.bright, 1.2)) * _decay(n, 0.12, 0.004)
    t = np.arange(n) / RATE
    rolls = sum(a * np.exp(-(((t - c) / w) ** 2)) for a, c, w in
                zip(rng.uniform(0.5, 1, 4), np.linspace(0.05, 0.75, 4) * n / RATE, rng.uniform(0.08, 0.2, 4)))
    return 0.5 * crack + _noise(n, rng, _band(35, 120, 1.6)) * (rolls + 0.5 * np.exp(-t / 0.5))


def _wind(n, p, rng):
    t = np.arange(n) / RATE
    lfo = np.sin(2 * np.pi * rng.uniform(0.5, 0.9) * t + rng.uniform(0, 6.28))
    centre = 2 ** (0.6 * lfo + 0.3 * p.bright)  # gusts raise the howl's pitch and its level together
    layers = [(_noise(n, rng, _band(0.88 * c, 1.14 * c, 6)), c) for c in (300, 420, 590, 830)]
    howl = sum(x * np.exp(-8 * np.log2(c / (500 * centre)) ** 2) for x, c in layers)
    return (howl + 0.25 * _noise(n, rng, _band(80, 500, 1.2))) * (0.65 + 0.35 * lfo)


def _dog(n, p, rng):
    f0 = 430 * 2 ** (0.7 * p.pitch)
    arc = f0 * (0.75 + 0.5 * np.sin(np.pi * np.clip(np.linspace(0, 1.25, n), 0, 1)) ** 0.7)
    voice = _vowel(arc, n, rng, (650, 1_350, 2_500), (250, 300, 400), (1, 0.9, 0.4))
    rough = 0.3 * _noise(n, rng, _band(500, 3_000, 2))
    return (voice / (np.std(voice) + 1e-9) + rough) * _decay(n, 0.07, 0.012) * np.clip((n - np.arange(n)) / 400, 0, 1)


def _bird(n, p, rng):
    gap = 0.13 - 0.03 * p.rate
    def chirp(i):
        m = int(rng.uniform(0.06, 0.09) * RATE)
        u = np.linspace(0, 1, m)
        a, b = (3_000, 4_600) if i % 2 else (4_800, 3_200)  # alternating up and down sweeps: a warble
        return np.sin(_phase((a + (b - a) * u) * 2 ** (0.12 * p.bright), m)) * np.sin(np.pi * u)
    return _grains(n, np.arange(0.0, n / RATE - 0.06, gap) + rng.uniform(0, 0.012), chirp)


def _cricket(n, p, rng):
    f = 4_300 + 300 * p.bright
    pulse = np.sin(_phase(f, 240)) * np.sin(np.pi * np.linspace(0, 1, 240)) ** 2
    trains = np.arange(0.02, n / RATE, 0.24 - 0.05 * p.rate)
    return _grains(n, np.concatenate([t + 0.026 * np.arange(4) for t in trains]), lambda i: pulse)


def _engine(n, p, rng):
    t = np.arange(n) / RATE
    f0 = 62 * 2 ** (0.7 * p.pitch) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(1, 2) * t))
    tone = _harmonics(f0, 1 / np.arange(1, 25) ** (0.9 - 0.2 * p.bright) * rng.uniform(0.5, 1.4, 24), n)
    firing = 0.6 + 0.4 * np.sin(_phase(f0 / 2, n))  # each second cylinder is louder: the put-put roughness
    return firing * tone + 0.35 * firing * _noise(n, rng, _band(150, 900, 1.5))


def _helicopter(n, p, rng):
    t = np.arange(n) / RATE
    chop = np.clip(np.sin(2 * np.pi * (11 + 2.5 * p.rate) * t + rng.uniform(0, 6.28)), 0, 1) ** 3
    return chop * (1.3 * _noise(n, rng, _band(50, 160, 2)) + _noise(n, rng, _band(250, 1_600 + 500 * p.bright, 2))) \
        + 0.06 * _noise(n, rng, _band(200, 2_000, 1))


def _horn(n, p, rng):
    f = 390 * 2 ** (0.6 * p.pitch)
    amps = 1 / np.arange(1, 16) ** (0.55 - 0.2 * p.bright)
    return (_harmonics(f, amps, n) + _harmonics(f * 1.26, amps, n)) * _hold_env(n, 0.015)  # a major third apart


def _siren(n, p, rng):
    t = np.arange(n) / RATE
    sweep = scipy.signal.sawtooth(2 * np.pi * (1.6 + 0.4 * p.rate) * t, 0.5)
    f = 850 * 2 ** (0.45 * p.pitch + 0.5 * sweep)
    return _harmonics(f, (1, 0.35, 0.25, 0.1), n)


def _beep(n, p, rng):
    return _harmonics(2_000 * 2 ** (0.6 * p.pitch), (1, 0, 0.33), n) * _hold_env(n, 0.004)


def _phone(n, p, rng):
    strike = int(RATE / (22 + 3 * p.rate))  # a clapper between two gongs, about 22 strokes a second
    def gong(i):
        m = 3_000
        f = (1_150, 1_460)[i % 2] * 2 ** (0.08 * p.bright)
        return sum(a * np.sin(_phase(f * r, m)) for r, a in ((1, 1), (2.41, 0.5), (3.9, 0.25))) * _decay(m, 0.05, 0.001)
    x = _grains(n, np.arange(0, n, strike) / RATE, gong)
    t = np.arange(n) / RATE
    return x * np.where((t % 0.75) < 0.6, 1, 0.08)  # rings of 0.6 s


def _bell(n, p, rng):
    f = 520 * 2 ** (0.9 * p.pitch)
    # Ratio, level and decay of a church bell's hum, prime, tierce, quint, nominal and two upper partials.
    partials = ((0.5, 0.5, 1.3), (1, 1, 1), (1.19, 0.7, 0.8), (1.5, 0.35, 0.6), (2, 0.6, 0.5), (2.74, 0.45, 0.35), (3.76, 0.3, 0.25))
    return sum(a * (1 + 0.3 * p.bright) ** max(0, r - 1) * np.sin(_phase(f * r, n) + i) * _decay(n, 0.45 * d, 0.002)
               for i, (r, a, d) in enumerate(partials) if f * r < 7_500)


def _flute(n, p, rng):
    t = np.arange(n) / RATE
    f = 700 * 2 ** (0.7 * p.pitch) * (1 + 0.008 * np.sin(2 * np.pi * 5.2 * t))
    env = _hold_env(n, 0.06)
    tone = _harmonics(f, (1, 0.22 + 0.1 * p.bright, 0.1, 0.03), n)
    return env * (tone + 0.12 * _noise(n, rng, _band(600, 4_000, 1)))


def _guitar(n, p, rng):
    f = 165 * 2 ** (0.8 * p.pitch)
    k = np.arange(1, 21)
    pluck = np.abs(np.sin(np.pi * k * 0.18)) / k ** (1.1 - 0.3 * p.bright)  # plucked at 18 % of the string
    return sum(a * np.sin(_phase(f * j * np.sqrt(1 + 2e-4 * j * j), n)) * _decay(n, 0.5 / (1 + 0.25 * j), 0.002)
               for j, a in zip(k, pluck) if f * j < 6_000)


def _knock(n, p, rng):
    modes = ((230, 1), (410, 0.8), (690, 0.5), (1_130, 0.3))
    wood = sum(a * np.sin(_phase(f * 2 ** (0.2 * p.bright), n)) * _decay(n, 0.022, 0.0008) for f, a in modes)
    return wood + 0.5 * _noise(n, rng, _band(300, 2_500, 2)) * _decay(n, 0.006, 0.0005)


def _glass(n, p, rng):
    k = 34
    times = np.concatenate([[0], rng.exponential(0.13, k)])
    def shard(i):
        m = 2_400
        f = rng.uniform(2_600, 7_200)
        return rng.uniform(0.3, 1) * np.sin(_phase(f, m)) * _decay(m, rng.uniform(0.015, 0.05), 0.0006)
    crash = _noise(n, rng, _band(2_500, 7_800, 3)) * _decay(n, 0.04, 0.001)
    return 1.4 * crash + _grains(n, times, shard)  # the crash, then shards tinkling


def _drum(n, p, rng):
    t = np.arange(n) / RATE
    f = 85 * 2 ** (0.6 * p.pitch) * (1 + 1.2 * np.exp(-t / 0.03))
    skin = _noise(n, rng, _band(150, 1_500, 1.5)) * _decay(n, 0.012, 0.001)
    return np.sin(_phase(f, n)) * _decay(n, 0.13, 0.002) + 0.35 * skin


def _laser(n, p, rng):
    u = np.linspace(0, 1, n)
    f = 2_600 * 2 ** (0.5 * p.pitch) * np.exp(-2.6 * u) + 120
    return _harmonics(f, (1, 0.5, 0.33, 0.2), n) * _hold_env(n, 0.008) * np.exp(-1.2 * u)


def _buzz(n, p, rng):
    f = 118 * 2 ** (0.5 * p.pitch)
    amps = np.where(np.arange(1, 40) % 2 == 1, 1, 0.5) / np.arange(1, 40) ** (0.35 - 0.15 * p.bright)
    return _harmonics(f, amps, n) * (1 + 0.05 * rng.standard_normal(n).cumsum() / np.sqrt(n))


def _bleeps(n, p, rng):
    step = 0.085 - 0.015 * p.rate
    def blip(i):
        m = int(step * RATE * 0.9)
        return _harmonics(300 * 2 ** (rng.integers(0, 31) / 12), (1, 0, 0.33, 0, 0.2), m) * _hold_env(m, 0.004)
    return _grains(n, np.arange(0, n / RATE, step), blip)


def _singing(n, p, rng):
    t = np.arange(n) / RATE
    f0 = 230 * 2 ** (0.7 * p.pitch) * (1 + 0.018 * np.sin(2 * np.pi * 5.5 * t + rng.uniform(0, 6)))
    return _vowel(f0, n, rng) * _hold_env(n, 0.06)


def _laugh(n, p, rng):
    f0 = rng.uniform(170, 290)
    def ha(i):
        m = int(0.15 * RATE)
        voice = _vowel(f0 * 0.96**i * np.linspace(1.15, 0.9, m), m, rng)
        voice *= np.clip((np.arange(m) - 700) / 400, 0, 1) * _decay(m, 0.07)
        breath = _noise(m, rng, _band(800, 3_500, 1.5)) * _decay(m, 0.03, 0.012)
        return voice / (np.std(voice) + 1e-9) + 0.5 * breath
    return _grains(n, np.arange(0, n / RATE - 0.05, 0.19 - 0.03 * p.rate), ha)


def _baby(n, p, rng):
    t = np.arange(n) / RATE
    u = (t * (1.35 + 0.2 * p.rate)) % 1.0  # one wail in about 0.7 s, then a gasp
    f0 = 470 * 2 ** (0.1 * p.bright) * (0.82 + 0.32 * np.sin(np.pi * np.clip(u / 0.8, 0, 1)))
    voice = _vowel(f0 * (1 + 0.02 * np.sin(2 * np.pi * 14 * t)), n, rng, (1_050, 2_000, 3_500), (350, 400, 600), (1, 0.7, 0.6))
    return voice * np.sin(np.pi * np.clip(u / 0.8, 0, 1)) ** 0.5


@dataclass(frozen=True)
class Sound:
    """One class. kind: 'hit' is countable (unit_s long, at least gap_s apart), 'hold' fills its slot, 'once' rings out in it."""
    name: str
    family: str
    kind: str
    synth: callable
    one: tuple  # noun phrases, singular; "~" marks where adjectives go
    many: tuple = ()  # noun phrases after a number
    unit_s: float = 0.0
    gap_s: float = 0.0
    pitched: bool = False


SOUNDS = (
    Sound("rain", "weather", "hold", _rain, ("~ rain", "~ rainfall", "~ rain falling")),
    Sound("thunder", "weather", "once", _thunder, ("a ~ thunderclap", "~ thunder", "~ rumbling thunder")),
    Sound("wind", "weather", "hold", _wind, ("~ wind", "a ~ howling wind", "~ wind blowing")),
    Sound("dog", "animals", "hit", _dog, ("a ~ dog bark", "a ~ bark of a dog"), ("~ dog barks", "~ barks"), 0.24, 0.30, True),
    Sound("bird", "animals", "hold", _bird, ("a ~ bird chirping", "a ~ bird singing", "~ birdsong")),
    Sound("cricket", "animals", "hold", _cricket, ("~ crickets", "~ chirping crickets", "a ~ cricket")),
    Sound("engine", "vehicles", "hold", _engine, ("a ~ engine", "a ~ motor running", "a ~ car engine"), pitched=True),
    Sound("helicopter", "vehicles", "hold", _helicopter, ("a ~ helicopter", "a ~ helicopter flying", "a ~ chopper")),
    Sound("horn", "vehicles", "hit", _horn, ("a ~ car horn", "a ~ honk"), ("~ honks", "~ car horns"), 0.32, 0.36, True),
    Sound("siren", "alarms", "hold", _siren, ("a ~ siren", "a ~ wailing siren", "a ~ police siren"), pitched=True),
    Sound("beep", "alarms", "hit", _beep, ("a ~ beep", "a ~ alarm beep"), ("~ beeps", "~ alarm beeps"), 0.12, 0.20, True),
    Sound("phone", "alarms", "hold", _phone, ("a ~ telephone ringing", "a ~ phone ringing", "a ~ ringing telephone")),
    Sound("bell", "instruments", "hit", _bell, ("a ~ bell", "a ~ church bell", "a ~ bell ringing"), ("~ bells", "~ bell strokes"), 0.9, 0.34, True),
    Sound("flute", "instruments", "hit", _flute, ("a ~ flute", "a ~ flute note"), ("~ flute notes", "~ notes on a flute"), 0.36, 0.38, True),
    Sound("guitar", "instruments", "hit", _guitar, ("a ~ guitar", "a ~ guitar pluck", "a ~ plucked string"), ("~ guitar notes", "~ guitar plucks"), 0.7, 0.30, True),
    Sound("knock", "impacts", "hit", _knock, ("a ~ knock", "a ~ knock on wood"), ("~ knocks", "~ knocks on a door"), 0.12, 0.18),
    Sound("glass", "impacts", "once", _glass, ("~ breaking glass", "~ glass shattering", "a ~ window breaking")),
    Sound("drum", "impacts", "hit", _drum, ("a ~ drum", "a ~ drum hit"), ("~ drum hits", "~ drum beats"), 0.4, 0.24, True),
    Sound("laser", "electronics", "hit", _laser, ("a ~ laser", "a ~ laser zap", "a ~ ray gun"), ("~ laser shots", "~ laser zaps"), 0.24, 0.27, True),
    Sound("buzz", "electronics", "hold", _buzz, ("a ~ electric buzz", "a ~ buzzing sound", "a ~ electrical hum"), pitched=True),
    Sound("bleeps", "electronics", "hold", _bleeps, ("~ computer bleeps", "a ~ computer bleeping", "~ robot noises")),
    Sound("singing", "voices", "hold", _singing, ("a ~ voice singing", "a ~ singing voice", "~ singing"), pitched=True),
    Sound("laugh", "voices", "hold", _laugh, ("a ~ person laughing", "~ laughter", "a ~ laugh")),
    Sound("baby", "voices", "hold", _baby, ("a ~ baby crying", "a ~ crying baby", "a ~ baby")),
)
NAMES = tuple(s.name for s in SOUNDS)
FAMILIES = tuple(dict.fromkeys(s.family for s in SOUNDS))


# --------------------------------------------------------------------------------------------------------------------------
# SoundWorld, part 2: scenes, their captions and their audio.

@dataclass(frozen=True)
class Event:
    """One event of a scene. Times in s; pitch, bright, rate in [-1, 1]; distance in [0, 1] (0 near, 1 far)."""
    sound: int
    start: float
    dur: float
    count: int
    pitch: float
    bright: float
    rate: float
    distance: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """events in order of mention (for 'then': in order of time); the background of a 'while' comes last."""
    relation: str  # one | then | while | then-while
    events: tuple


# Pairs of classes that never occur together in train, val and test; the split `combos` is made of scenes that have one.
HELD_OUT_PAIRS = frozenset(
    (a, b) for a in range(len(SOUNDS)) for b in range(a + 1, len(SOUNDS))
    if SOUNDS[a].family != SOUNDS[b].family and (7 * a + 3 * b) % 8 == 0)
SPLITS = {"train": 1, "val": 2, "test": 3, "combos": 4, "judge": 5}  # each split is a random stream of its own


def _has_held_out(sounds) -> bool:
    s = sorted(sounds)
    return any((a, b) in HELD_OUT_PAIRS for i, a in enumerate(s) for b in s[i + 1:])


def _event(sound: int, start: float, dur: float, rng) -> Event:
    s = SOUNDS[sound]
    fits = max(1, int((dur - 0.05) / s.gap_s)) if s.kind == "hit" else 1
    count = int(rng.integers(1, min(4, fits) + 1)) if rng.random() < 0.7 else 1
    pitch = rng.choice([-1, 1]) * rng.uniform(0.5, 1) if rng.random() < 0.6 else rng.uniform(-0.3, 0.3)
    return Event(sound, start, dur, count, float(pitch), *map(float, rng.uniform(-1, 1, 2)), float(rng.uniform()), int(rng.integers(2**31)))


def draw_scene(rng, split: str = "train", seconds: float = CLIP_S) -> Scene:
    """Draw a scene: one event (40 %), two (40 %) or three (20 %), in sequence or over a held background."""
    holds = [i for i, s in enumerate(SOUNDS) if s.kind == "hold"]
    while True:
        n = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])) if split != "combos" else int(rng.choice([2, 3], p=[0.67, 0.33]))
        relation = "one" if n == 1 else rng.choice(["then", "while"]) if n == 2 else rng.choice(["then", "then-while"])
        back = [int(rng.choice(holds))] if "while" in relation else []
        sounds = [int(x) for x in rng.permutation([i for i in range(len(SOUNDS)) if i not in back])[: n - len(back)]] + back
        if split == "judge" or _has_held_out(sounds) == (split == "combos"):
            break
    edge, m = 0.06, n - len(back)
    slot = (seconds - 2 * edge) / m
    if relation == "one" or relation == "while":  # a lone foreground event starts soon; for the judges, who must not rely on it, anywhere
        dur = rng.uniform(0.55, 1.0) * slot
        events = [_event(sounds[0], edge + rng.uniform(0, slot - dur if split == "judge" else 0.15), dur, rng)]
    else:
        events = [_event(s, edge + k * slot + rng.uniform(0, 0.06), slot * rng.uniform(0.82, 0.92), rng) for k, s in enumerate(sounds[:m])]
    events += [_event(b, edge, seconds - 2 * edge, rng) for b in back]
    return Scene(str(relation), tuple(events))


_NUMBERS = {2: ("two", "a couple of"), 3: ("three",), 4: ("four",)}
_ADJ = {"low": ("low", "deep", "low-pitched"), "high": ("high", "high-pitched"), "near": ("near", "nearby", "close"), "far": ("far", "distant", "faraway")}
_TEMPLATES = {
    "one": ("{}", "{}", "the sound of {}", "{} can be heard", "we hear {}"),
    "then2": ("{}, then {}", "{} followed by {}", "{} and then {}", "first {}, then {}", "{1} after {0}"),
    "then3": ("{}, then {}, then {}", "{} followed by {} and then {}", "first {}, then {}, and finally {}"),
    "while": ("{} while we hear {}", "{} over {}", "{} with {} in the background", "{} and {} at the same time", "{}, with {}"),
    "then-while": ("{}, then {}, while we hear {}", "{} followed by {} over {}", "{} and then {}, with {} in the background"),
}


def factor_words(e: Event) -> dict:
    """What a caption may say about an event's factors: pitch low|high|None, distance near|far|None."""
    s = SOUNDS[e.sound]
    return {"pitch": None if not s.pitched or abs(e.pitch) < 0.5 else ("low", "high")[e.pitch > 0],
            "distance": "near" if e.distance < 0.2 else "far" if e.distance > 0.7 else None}


def with_article(text: str) -> str:
    """"a engine" -> "an engine"."""
    return "an" + text[1:] if text.startswith("a ") and text[2] in "aeiou" else text


def _noun_phrase(e: Event, rng) -> str:
    s, words = SOUNDS[e.sound], factor_words(e)
    adj = [rng.choice(_ADJ[w]) for w, prob in ((words["distance"], 0.7), (words["pitch"], 0.85)) if w and rng.random() < prob]
    if e.count > 1:
        text = rng.choice(_NUMBERS[e.count]) + " " + rng.choice(s.many).replace("~", " ".join(adj))
    else:
        text = rng.choice(s.one).replace("~", " ".join(adj))
    return with_article(" ".join(text.split()))


def word_scene(scene: Scene, rng) -> str:
    """One English wording of a scene; the rng picks template, synonyms and which factors are mentioned."""
    name = scene.relation + (str(len(scene.events)) if scene.relation == "then" else "")
    return str(rng.choice(_TEMPLATES[name])).format(*(_noun_phrase(e, rng) for e in scene.events))


def _loudness(x: np.ndarray) -> float:
    """RMS of the loudest 50 ms: what makes a knock and a drone comparable."""
    total = np.concatenate([[0], np.cumsum(np.pad(x, (0, max(0, 800 - len(x)))) ** 2)])
    return float(np.sqrt(max((total[800:] - total[:-800]).max() / 800, 1e-12)))


def _far(x: np.ndarray, distance: float, rng) -> np.ndarray:
    """Distance as air and room make it: duller and more reverberant (level is set by the caller)."""
    cutoff = 8_000 * 0.3**distance
    a = np.exp(-2 * np.pi * cutoff / RATE)
    x = scipy.signal.lfilter([1 - a], [1, -a], x)
    if distance > 0.35:
        tail = rng.standard_normal(3_200) * np.exp(-np.arange(3_200) / 700)
        x = x + 0.5 * (distance - 0.35) * scipy.signal.fftconvolve(x, tail / np.linalg.norm(tail))[: len(x)]
    return x


def render_scene(scene: Scene, rng, seconds: float = CLIP_S) -> np.ndarray:
    """Audio of a scene, (N,) float32 at 16 kHz, |x| <= 0.95. Far events are 9 dB softer than near ones; the faint room noise
    (-70 dB) keeps silence from being digital zero, an outlier that would dominate the log-mel statistics."""
    n = round(seconds * RATE)
    out = 3e-4 * rng.standard_normal(n)
    for e in scene.events:
        s, r = SOUNDS[e.sound], np.random.default_rng(e.seed)
        start, dur = round(e.start * RATE), round(e.dur * RATE)
        x = np.zeros(n - start)
        if s.kind == "hit":
            gap = min(e.dur / e.count, s.gap_s * (1.25 - 0.25 * e.rate) + 0.02)
            unit = s.synth(min(round(s.unit_s * RATE), len(x)), e, r)
            unit[-160:] *= np.linspace(1, 0, 160)  # a cut tail would click
            for k in range(e.count):
                at = round(k * gap * RATE)
                x[at : at + len(unit)] += r.uniform(0.8, 1) * unit[: len(x) - at]
        else:
            dur = min(dur, len(x))
            x[:dur] = s.synth(dur, e, r) * _hold_env(dur, 0.04 if s.kind == "hold" else 0.01)
        x = _far(x, e.distance, r)
        out[start:] += x * (0.17 * 10 ** (-9 * e.distance / 20) / _loudness(x))
    return (out * min(1, 0.95 / np.abs(out).max())).astype(np.float32)


def scene_factors(scene: Scene) -> dict:
    """True factors by class, arrays of 24: presence {0,1}, onset (s), count, pitch and distance; NaN where absent."""
    f = {k: np.full(len(SOUNDS), np.nan, np.float32) for k in ("onset", "count", "pitch", "distance")}
    f["presence"] = np.zeros(len(SOUNDS), np.float32)
    for e in scene.events:
        f["presence"][e.sound] = 1
        f["onset"][e.sound], f["count"][e.sound] = e.start, e.count if SOUNDS[e.sound].kind == "hit" else np.nan
        f["pitch"][e.sound], f["distance"][e.sound] = e.pitch if SOUNDS[e.sound].pitched else np.nan, e.distance
    return f


class SoundWorld:
    """The embedded data set: n clips of a split, drawn from (seed, split, index) alone, so clip i is always the same clip."""
    version = 2  # raise when a synthesizer, the scene law or a caption changes: the cache is keyed by it
    wordings = 4

    def __init__(self, split: str = "train", n: int = 6_000, seed: int = 0, seconds: float = CLIP_S):
        if split not in SPLITS:
            raise UserError(f"unknown SoundWorld split {split!r}: use one of {', '.join(SPLITS)}")
        self.split, self.n, self.seed, self.seconds = split, n, seed, seconds
        self.key = f"soundworld-{digest(self.version, split, n, seed, seconds)}"
        self._waves = None

    def __len__(self) -> int:
        return self.n

    def __getstate__(self):
        return {**self.__dict__, "_waves": None}  # workers map the cache themselves: pickling would copy all the audio

    def _rng(self, i: int, *more: int):
        return np.random.default_rng([self.seed, SPLITS[self.split], i, *more])

    def scene(self, i: int) -> Scene:
        return draw_scene(self._rng(i), self.split, self.seconds)

    def name(self, i: int) -> str:
        return f"SoundWorld {self.split} clip {i}"

    def caption(self, i: int, k: int = 0) -> str:
        return word_scene(self.scene(i), self._rng(i, 1, k % self.wordings))

    def factors(self, i: int) -> dict:
        return scene_factors(self.scene(i))

    def render(self, i: int) -> np.ndarray:
        return render_scene(self.scene(i), self._rng(i, 2), self.seconds)

    def lengths(self) -> list[int]:
        return [round(self.seconds * RATE)] * self.n

    def wave(self, i: int) -> np.ndarray:
        """Clip i, (N,) float32, through 16-bit storage; rendered on the spot when the cache was not prepared."""
        if self._waves is not None:
            return self._waves[i].astype(np.float32) / 32_767
        return np.round(self.render(i) * 32_767).astype(np.float32) / 32_767

    def prepare(self, workers: int | None = None) -> SoundWorld:
        """Render all clips into the cache (16-bit, 82 kB a clip) with worker processes; interrupted work continues."""
        shape = (self.n, round(self.seconds * RATE))
        self._waves = fill_array(cache_dir() / self.key, "waves", shape, np.int16, _render_chunk, self.n, workers=workers,
                                 args=(self.split, self.n, self.seed, self.seconds), desc=f"SoundWorld {self.split}")
        return self


def _render_chunk(indices, split, n, seed, seconds):
    world = SoundWorld(split, n, seed, seconds)
    return np.stack([np.round(world.render(i) * 32_767).astype(np.int16) for i in indices])


# --------------------------------------------------------------------------------------------------------------------------
# Cached arrays: one memory-mapped .npy filled chunk by chunk. A byte a chunk says "done", written after the chunk itself was
# flushed, so a kill at any moment loses at most the chunks in flight and a restart continues.

def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _worker_begins():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    def follow():  # a killed parent can't say goodbye; without this its workers would work on, and then wait for ever
        mp.connection.wait([mp.parent_process().sentinel])
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    threading.Thread(target=follow, daemon=True).start()


def parallel_map(fn, jobs, args=(), workers: int | None = None, ahead: int = 2):
    """Yield (job, fn(job, *args)) as they finish, in worker processes (workers=0: in this one). fn must be top-level. `ahead` jobs a
    worker are handed out at a time; with 1, none is begun after Ctrl-C."""
    if workers is None:
        workers = min(61, cores())  # Windows allows 61 handles
    if workers == 0 or len(jobs) <= 1:
        for j in jobs:
            yield j, fn(j, *args)
        return
    # 'spawn', not 'fork': forking a process whose torch threads have run can deadlock in the child.
    pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), initializer=_worker_begins)
    try:
        queue, todo = {}, list(jobs)[::-1]
        while todo or queue:
            while todo and len(queue) < ahead * workers:
                j = todo.pop()
                queue[pool.submit(fn, j, *args)] = j
            done = next(f for f in _wait_first(queue))
            yield queue.pop(done), done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _wait_first(futures):
    from concurrent.futures import FIRST_COMPLETED, wait
    return wait(list(futures), return_when=FIRST_COMPLETED).done


@contextlib.contextmanager
def alone(path: Path, refuse: str = ""):
    """One process at a time between here and the end of the block, by a lock on a folder or a file; the others wait, or get the UserError
    `refuse`. The lock is the system's and ends with its process: a killed one leaves none behind. (POSIX; elsewhere nothing is locked.)"""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (fcntl.LOCK_NB if refuse else 0))
        yield
    except BlockingIOError:
        raise UserError(refuse) from None
    finally:
        os.close(fd)


def fill_array(folder: Path, name: str, shape, dtype, fn, n: int, args=(), chunk: int = 64, workers=None, desc: str = "",
               where=None) -> np.ndarray:
    """Memory-map folder/name.npy, filling what is not yet done.

    fn(indices, *args) returns the rows of those items, concatenated along axis 0; item i owns row i, or the rows
    where[i]:where[i+1] when `where` (n+1 offsets) is given. Returns a read-only memory map of `shape`."""
    folder.mkdir(parents=True, exist_ok=True)
    where = np.arange(n + 1) if where is None else where
    path, flags_path = folder / f"{name}.npy", folder / f"{name}.done"
    n_chunks = -(-n // chunk)
    with alone(folder / f"{name}.lock"):  # two runs that start together must not fill one cache at once
        if not (path.exists() and flags_path.exists() and flags_path.stat().st_size == n_chunks):
            size, free = int(np.prod([int(k) for k in shape])) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
            if size > 0.95 * free:  # the file is sparse: a disk that fills up under it would end this process without a word
                raise UserError(f"{folder}: {desc} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room, or set STAGE_AUDIO_CACHE to another disk")
            if size > 2e8:
                print(f"{desc}: writing {size / 1e9:.1f} GB to {folder}")
            tmp = folder / f"{name}.tmp{os.getpid()}"
            np.lib.format.open_memmap(tmp, "w+", dtype, tuple(map(int, shape))).flush()  # numpy integers would spoil the header
            if hasattr(os, "posix_fallocate"):  # take the room now, where a lack of it is an error and not a killed process
                with open(tmp, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, tmp.stat().st_size)
            os.replace(tmp, path)
            flags_path.write_bytes(bytes(n_chunks))
        flags = np.memmap(flags_path, np.uint8, "r+")
        todo = [tuple(range(c * chunk, min(n, (c + 1) * chunk))) for c in np.flatnonzero(flags == 0)]
        if todo:
            rows = np.lib.format.open_memmap(path, "r+")
            bar = tqdm(total=n, initial=n - sum(map(len, todo)), desc=desc, unit="clip", dynamic_ncols=True)
            for job, out in parallel_map(fn, todo, args, workers if len(todo) > 2 else 0):
                rows[where[job[0]] : where[job[-1] + 1]] = out
                rows.flush()
                flags[job[0] // chunk] = 1
                flags.flush()
                bar.update(len(job))
            bar.close()
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------------------------------
# Random patches: sounds that nobody designed, to pretrain the SSL teacher on (guidance.py). A patch is a source, a gate and a
# filter of random settings; none of SoundWorld's recipes, names or factors is used, or the teacher would know what the judges test.

SOURCES = ("partials", "fm", "noise", "whistle", "dust", "modes", "pulses")
GATES = ("held", "single", "regular", "scattered", "grouped")


@dataclass(frozen=True)
class Patch:
    """One random sound: what vibrates, how it is gated, p (40,) settings in [0, 1], and its place in the clip (shares of it)."""
    source: str
    gate: str
    p: np.ndarray
    start: float
    dur: float

    def nudge(self, rng, delta: float) -> Patch:
        """A slightly different patch: every setting moved by delta N(0, 1).  # as in arXiv 2406.05923; delta ASSUMED"""
        return Patch(self.source, self.gate, np.clip(self.p + delta * rng.standard_normal(len(self.p)), 0, 1), self.start, self.dur)


def draw_patch(rng) -> Patch:
    dur = 1.0 if rng.random() < 0.5 else rng.uniform(0.25, 0.9)
    return Patch(str(rng.choice(SOURCES)), str(rng.choice(GATES)), rng.uniform(size=40), rng.uniform(0, 1 - dur), dur)


def _log(p: float, lo: float, hi: float) -> float:
    return lo * (hi / lo) ** p


def _gate(kind: str, p, n: int, rng) -> tuple[np.ndarray, np.ndarray, list]:
    """-> (envelope (n,), place within the event (n,) in [0, 1], onsets in samples)."""
    period, length = _log(p[0], 0.07, 1.2), n / RATE
    if kind == "held":
        events = [(0.0, length)]
    elif kind == "single":
        events = [(0.4 * p[0] * length, _log(p[1], 0.08, 1.0) * (length - 0.4 * p[0] * length))]
    elif kind == "regular":
        starts = np.arange(p[2] * period, length, period)
        events = [(s + 0.15 * p[3] ** 2 * period * rng.standard_normal(), (0.15 + 0.8 * p[1]) * period) for s in starts]
    elif kind == "scattered":
        events = [(s, _log(p[1], 0.04, 0.6) * rng.uniform(0.6, 1.4)) for s in rng.uniform(0, length, 1 + rng.poisson(_log(p[0], 1, 14) * length))]
    else:
        inner, size = _log(p[0], 0.05, 0.25), 2 + int(3.99 * p[2])
        starts = np.arange(0.3 * p[3], length, inner * size + _log(p[4], 0.15, 0.9))
        events = [(s + k * inner, inner * (0.3 + 0.6 * p[1])) for s in starts for k in range(size)]
    env, u, onsets = np.full(n, 0.25 * max(0.0, p[5] - 0.6)), np.zeros(n), []
    attack, decay = 0.6 * p[6] ** 3, 7 * max(0.0, p[7] - 0.25)
    for s, d in events:
        a, b = max(0, round(s * RATE)), min(n, round((s + d) * RATE))
        if b - a < 32:
            continue
        v = (np.arange(a, b) / RATE - s) / d
        shape = np.minimum(v / (attack + 0.003 / d), 1) * np.exp(-decay * v) * np.minimum((1 - v) * d / 0.006, 1)
        env[a:b] = np.maximum(env[a:b], shape.clip(0) * rng.uniform(0.6, 1))
        u[a:b] = v
        onsets.append(a)
    return env, u, onsets


def _source(kind: str, p, n: int, u: np.ndarray, onsets: list, rng) -> np.ndarray:
    t = np.arange(n) / RATE
    f0 = _log(p[0], 45, 2_800 if kind in ("partials", "fm") else 6_000 if kind == "whistle" else 400)
    bend = 2 * (p[1] - 0.5) * 2 * p[2] ** 2 * u + 2 * (p[3] - 0.5) * 2 * p[4] ** 2 * 4 * u * (1 - u)  # octaves: a glide, an arc
    f = np.minimum(f0 * 2 ** (bend + 0.5 * p[5] ** 4 * np.sin(2 * np.pi * (_log(p[6], 0.4, 16) * t + rng.random()))), 7_000)
    if kind == "partials":
        k = np.arange(1, 33)
        amps = k ** -(2.2 * p[7]) * np.where(k % 2, 1, 1 - p[8] ** 3) * np.exp(0.7 * rng.standard_normal(32))
        x = _harmonics(f, amps, n)
        return x + 0.6 * p[9] ** 3 * np.std(x) * rng.standard_normal(n)
    if kind == "fm":
        ratio = (round(1 + 5 * p[7]) if p[8] < 0.5 else 0.3 + 6 * p[7])
        phase = _phase(f, n)
        return np.sin(phase + 6 * p[9] ** 1.5 * np.exp(-3 * p[10] * u) * np.sin(ratio * phase))
    if kind == "noise":
        return rng.standard_normal(n)
    if kind == "whistle":  # a tone blurred by noise: from a pure tone to a howl
        blur = scipy.signal.lfilter([1], [1, -np.exp(-2 * np.pi * _log(p[7], 3, 600) / RATE)], rng.standard_normal(n) + 1j * rng.standard_normal(n))
        return (np.exp(1j * _phase(f, n)) * (blur / np.std(blur) + 2 * (1 - p[8]))).real
    hits = np.zeros(n)
    if kind == "dust":
        k = max(1, rng.poisson(_log(p[7], 8, 2_500) * n / RATE))
        hits[rng.integers(0, n, k)] = rng.lognormal(0, 1.2 * p[8], k) * rng.choice([-1, 1], k)
    elif kind == "modes":
        hits[onsets] = 1
        hits += 0.3 * p[8] ** 3 * rng.standard_normal(n) * (u > 0) * np.exp(-20 * u)
    else:
        wraps = np.flatnonzero(np.diff(np.floor(_phase(np.minimum(f, 400) * (1 + 0.2 * p[8] ** 2 * rng.standard_normal(n)), n) / (2 * np.pi))) > 0)
        hits[wraps] = rng.uniform(1 - 0.6 * p[9], 1, len(wraps))
    m = 6_400  # what is hit: resonances at random ratios, from a click to a ring
    count, tau, low = 1 + int(11 * p[10]), _log(p[11], 0.002, 0.4 if kind == "modes" else 0.03), _log(p[12], 90, 3_500)
    ratios = np.cumsum(np.concatenate([[1], np.random.default_rng(int(1e6 * p[39])).exponential(0.2 + 1.2 * p[13], count - 1)]))
    body = sum(r ** -(1.2 * p[14]) * np.sin(_phase(low * r, m) + i) * _decay(m, tau / r ** (0.8 * p[15]), 0.0005) for i, r in enumerate(ratios) if low * r < 7_500)
    return scipy.signal.fftconvolve(hits, body)[:n]


def render_patch(patch: Patch, n: int, rng) -> np.ndarray:
    """Patch -> (n,) of unit loudness. rng: what even identical settings leave to chance (noise, phases, jitter)."""
    a, p = round(patch.start * n), patch.p
    m = min(n - a, max(1_600, round(patch.dur * n)))
    env, u, onsets = _gate(patch.gate, p[:8], m, rng)
    x = _source(patch.source, p[8:24].tolist() + [0] * 23 + [p[39]], m, u, onsets, rng)
    if patch.source != "modes":
        x = x * env * (1 - 0.9 * max(0.0, p[24] - 0.6) / 0.4 * (0.5 + 0.5 * np.sin(2 * np.pi * (_log(p[25], 0.6, 60) * np.arange(m) / RATE + rng.random()))))
    size = scipy.fft.next_fast_len(m, real=True)
    f, spec = np.fft.rfftfreq(size, 1 / RATE).clip(20), scipy.fft.rfft(x, size)
    def filtered(shift):  # a broad band and up to three resonances, moved by `shift` octaves
        lo, hi = _log(p[26], 30, 2_500), _log(p[27], 600, 9_000)
        gain = 1 / np.sqrt(1 + (lo * 2**shift / f) ** (1 + 5 * p[28]) + (f / (max(hi, 2 * lo) * 2**shift)) ** (1 + 7 * p[29]))
        for k in range(int(3.99 * p[30])):
            gain = gain * (1 + 12 * p[31 + k] ** 2 / (1 + (np.log2(f / (_log(p[33 + k], 200, 6_000) * 2**shift)) / (0.08 + 0.3 * p[31 + k])) ** 2))
        return scipy.fft.irfft(spec * gain, size)[:m]
    x = filtered(0.0)
    if p[36] > 0.5:  # the filter opens: within each event, or slowly to and fro
        mix = u if p[37] > 0.5 else 0.5 + 0.5 * np.sin(2 * np.pi * (_log(2 * p[37], 0.4, 8) * np.arange(m) / RATE + rng.random()))
        x = x + mix * (filtered(3 * p[36] - 2) - x)
    out = np.zeros(n)
    out[a : a + m] = x * _hold_env(m, 0.01)
    if p[38] > 0.6:  # a room
        tail = rng.standard_normal(8_000) * np.exp(-np.arange(8_000) / _log((p[38] - 0.6) / 0.4, 300, 4_000))
        out += 0.7 * (p[38] - 0.6) / 0.4 * scipy.signal.fftconvolve(out, tail / np.linalg.norm(tail))[:n]
    return out / _loudness(out)


class RandomPatches:
    """n clips for self-supervised learning, each rendered twice from slightly different patches ("doppelgaengers") and recorded
    under different conditions (level, tilt, hiss). One to three patches a clip. No label exists."""
    version = 1

    def __init__(self, n: int, seed: int = 0, seconds: float = CLIP_S, delta: float = 0.08):
        self.n, self.seed, self.seconds, self.delta = n, seed, seconds, delta
        self.key = f"patches-{digest(self.version, n, seed, seconds, delta)}"

    def pair(self, i: int) -> np.ndarray:
        """(2, N) float32 with peaks of at most 0.95."""
        rng, size = np.random.default_rng([self.seed, 6, i]), round(self.seconds * RATE)
        patches = [draw_patch(rng) for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))]
        gains = 10 ** (-rng.uniform(0, 15, len(patches)) / 20)
        out = []
        for _ in range(2):
            x = sum(g * 10 ** (2 * rng.standard_normal() / 20) * render_patch(q.nudge(rng, self.delta), size, rng) for g, q in zip(gains, patches))
            tilt = rng.uniform(-0.25, 0.25)
            hiss = _noise(size, rng, lambda f: np.maximum(f, 50) ** -rng.uniform(0, 1)) * 10 ** (-rng.uniform(25, 65) / 20)
            x = scipy.signal.lfilter([1, tilt], [1], x / _loudness(x)) + hiss
            out.append(x * min(0.2 * 10 ** (rng.uniform(-15, 5) / 20), 0.95 / np.abs(x).max()))
        return np.stack(out).astype(np.float32)

    def features(self, frontend, workers: int | None = None) -> np.ndarray:
        """frontend (a top-level function, (B, N) tensor -> (B, F, M) tensor) of all pairs: memory map (n, 2, F, M) float16."""
        import torch
        shape = frontend(torch.zeros(1, round(self.seconds * RATE))).shape[1:]
        return fill_array(cache_dir() / self.key, "features", (self.n, 2, *shape), np.float16, _patch_chunk, self.n,
                          (self.n, self.seed, self.seconds, self.delta, frontend), workers=workers, desc="random patches")


def _patch_chunk(indices, n, seed, seconds, delta, frontend):
    import torch
    if mp.parent_process() is not None:
        torch.set_num_threads(1)  # one thread a worker: more would fight over the cores
    world = RandomPatches(n, seed, seconds, delta)
    return np.stack([frontend(torch.from_numpy(world.pair(i))).numpy() for i in indices]).astype(np.float16)


# --------------------------------------------------------------------------------------------------------------------------
# Folders of recordings.

AUDIO_TYPES = (".wav", ".flac", ".ogg", ".mp3")
RATES, LONGEST_S = (2_000, 768_000), 3_600  # what a header may say: a wrong one must not fill the memory
LONGEST_CAPTION = 500  # characters


@contextlib.contextmanager
def _sound(path: Path):
    """An open soundfile.SoundFile whose header is plausible; whatever goes wrong in the block is a UserError that names the file."""
    import soundfile  # lazily: the default path (SoundWorld) needs no audio library
    if not path.is_file():  # devices and pipes are no files either
        raise UserError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as f:
            if not RATES[0] <= f.samplerate <= RATES[1]:
                raise UserError(f"{path}: its header says {f.samplerate} Hz; from {RATES[0]} to {RATES[1]} can be read")
            if not 0 <= f.frames <= LONGEST_S * f.samplerate:
                raise UserError(f"{path}: its header says {f.frames / f.samplerate:.0f} s; cut it into pieces of at most an hour")
            yield f
    except (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError) as e:
        raise UserError(f"{path}: can't be read as audio ({printable(str(e)).strip()[:120]}); use wav, flac, ogg or mp3") from None


def read_audio(path: str | Path) -> np.ndarray:
    """Any wav/flac/ogg/mp3 of up to an hour -> mono float32 (N,) at 16 kHz. Raises UserError (names the file) if it can't be read."""
    path, parts = Path(path), []
    with _sound(path) as f:
        rate, frames, at_once = f.samplerate, f.frames, max(1, (1 << 20) // f.channels)
        while len(x := f.read(at_once, dtype="float32", always_2d=True)):  # in pieces: memory is taken by what is there, not by what the header says
            parts.append(x.mean(1))
    x = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if len(x) == 0:
        raise UserError(f"{path}: holds no samples")
    if len(x) < 0.9 * frames - 0.1 * rate:  # an mp3's header may be off by a frame
        raise UserError(f"{path}: ends after {len(x) / rate:.1f} of the {frames / rate:.1f} s that its header says")
    if not np.abs(x).max() < 1e6:  # NaN too
        raise UserError(f"{path}: holds NaN, infinite or absurdly large samples")
    return resample(x, rate, RATE)


def resample(x: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling (scipy), (N,) -> (ceil(N to / rate),) float32."""
    if rate == to:
        return x.astype(np.float32)
    g = np.gcd(int(rate), int(to))
    return scipy.signal.resample_poly(x, to // g, rate // g).astype(np.float32)


def write_wav(path: str | Path, x: np.ndarray) -> None:
    """Write (N,) float in [-1, 1] as 16-bit 16 kHz wav (scipy); louder sounds are scaled down, never clipped."""
    import scipy.io.wavfile
    x = np.asarray(x, np.float64)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.wavfile.write(path, RATE, np.round(x / max(1.0, np.abs(x).max(initial=0)) * 32_767).astype(np.int16))


SPLIT_WORDS = {"train": ("train", "training", "development"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "eval", "evaluation")}


def _split_of(meta: Path, folder: Path) -> str | None:
    """The split that a metadata file is for, by the words of its name or of its own folder."""
    words = re.split(r"[^a-z]+", str(meta.relative_to(folder).with_suffix("")).lower())
    return next((split for split, known in SPLIT_WORDS.items() if set(known) & set(words)), None)


def _metadata(folder: Path, split: str) -> tuple[Path | None, bool]:
    """(the metadata file for a split or None, is it that split's own?). One file for all, or one a split: train.csv, val.csv, test.csv;
    clotho_captions_development.csv ...; train/metadata.csv ... . Without a val file the test file is used, and the other way round."""
    kinds = lambda *places: sorted({p for place in places for kind in ("csv", "jsonl") for p in folder.glob(f"{place}.{kind}")})
    found = kinds("metadata") or kinds("*", "meta/*") or kinds("*/metadata")
    if len(found) <= 1:
        return (found[0] if found else None), False
    by_split = {}
    for p in found:
        by_split.setdefault(_split_of(p, folder), []).append(p)
    for name in {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]:
        if len(by_split.get(name, ())) == 1 and "train" in by_split:
            return by_split[name][0], bool({"val", "test"} & set(by_split))  # a csv of something else beside train.csv holds nothing out
    if split != "train" and len(by_split.get("train", ())) == 1 and not {"val", "test"} & set(by_split):
        return by_split["train"][0], False
    raise UserError(f"{folder}: several metadata files ({', '.join(str(p.relative_to(folder)) for p in found)}); keep one, or one a split named train, val and test")


def _rows(meta: Path) -> list[dict]:
    """The rows of a metadata file, each with its row number in '#'."""
    rows = []
    try:
        text = meta.read_text(encoding="utf-8-sig")
        if "\0" in text:  # UTF-16 without its mark
            raise UnicodeDecodeError("utf-8", b"", 0, 0, "")
    except UnicodeDecodeError:
        raise UserError(f"{meta}: not UTF-8; save it as UTF-8") from None
    if meta.suffix == ".jsonl":
        for k, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{meta}, row {k}: not valid JSON ({getattr(e, 'msg', 'numbers too long or nesting too deep')})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{meta}, row {k}: not a JSON object")
                rows.append({**row, "#": k})
    else:
        table, k = csv.DictReader(io.StringIO(text, newline="")), 1
        try:
            names = table.fieldnames or []
            double = next((n for n in names if names.count(n) > 1), None)
            if double is not None:
                raise UserError(f"{meta}: two columns are named {double!r}; rename one")
            for k, row in enumerate(table, 2):
                if None in row or None in row.values():
                    raise UserError(f"{meta}, row {k}: {'more' if None in row else 'fewer'} fields than the header; quote captions that hold commas")
                rows.append({**row, "#": k})
        except csv.Error as e:
            raise UserError(f"{meta}, after row {k}: not valid csv ({e}); is a quote left open?") from None
    if not rows:
        raise UserError(f"{meta}: no rows")
    return rows


def _column(meta: Path, row: dict, names) -> str:
    hit = next((n for n in names if n in row), None)
    if hit is None:
        raise UserError(f"{meta}: no column {' or '.join(names)}; found {', '.join(k for k in row if k != '#')}")
    return hit


def _clean(caption: str) -> str:
    """Fit for a line of the terminal; class names have underscores."""
    return " ".join(printable(caption.replace("_", " ")).split())


@dataclass
class _Entry:
    """One row of a data set: its file, how the row is called, its captions, whether it is held out (None: by hash), and why it can't be used."""
    path: Path | None
    name: str
    captions: list[str]
    held: bool | None = None
    bad: str = ""


def _vctk(folder: Path) -> list[_Entry]:
    """VCTK: wav48_silence_trimmed/p225/p225_001_mic1.flac (or wav48/p225/p225_001.wav) and txt/p225/p225_001.txt. Held out: the last 8 of
    108 speakers, without p280 and p315 (NU-Wave2's split); of fewer speakers, the same share."""
    root = next(d for d in (folder / "wav48_silence_trimmed", folder / "wav48") if d.is_dir())
    speakers = sorted(d for d in root.iterdir() if d.is_dir() and d.name not in ("p280", "p315"))
    if len(speakers) < 2:
        raise UserError(f"{root}: fewer than two speakers; one must be held out")
    held = set(speakers[-max(1, round(8 / 108 * len(speakers))):])
    out = []
    for speaker in speakers:
        for p in sorted(p for p in speaker.iterdir() if p.suffix.lower() in AUDIO_TYPES and not p.stem.endswith("_mic2")):
            text = folder / "txt" / speaker.name / f"{p.stem.removesuffix('_mic1')}.txt"
            said = _clean(text.read_text(encoding="utf-8", errors="replace")) if text.is_file() else ""
            out.append(_Entry(p, p.name, [said or "speech"], speaker in held))
    return out


def _class_folders(folder: Path) -> list[_Entry]:
    """FOLDER/CLASS/FILE without metadata: the class is the caption. (train/CLASS/FILE, test/CLASS/FILE: with these splits.)"""
    out = []
    for p in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_TYPES and p.is_file()):
        parts = p.relative_to(folder).parts[:-1]
        if parts:
            split = next((s for s, known in SPLIT_WORDS.items() if parts[0].lower() in known), None)
            out.append(_Entry(p, str(p.relative_to(folder)), [_clean(parts[-1]) or "sound"], None if split is None or len(parts) == 1 else split != "train"))
    return out


class AudioFolder:
    """A folder of captioned recordings. Layouts, told apart by what is there:

    audiofolder   metadata.csv | metadata.jsonl with file_name and caption | text, for all or one a split; or FOLDER/CLASS/FILE without
    AudioCaps     csv with youtube_id, start_time, caption; clips named ID, YID, ID_START ..., any extension; train.csv, val.csv, test.csv
    Clotho        csv with file_name, caption_1 ... caption_5, one a split
    ESC-50        csv with filename, category, fold; files in audio/
    VCTK          wav48_silence_trimmed/ or wav48/, txt/

    Several rows of one file, and columns caption_1 ..., are several wordings. val_fold: rows with that `fold` are the validation split; where
    nothing says which clips are held out, a tenth of the *files* is, by a hash of the name (where several files are cuts of one
    recording, as in ESC-50, use the fold: the hash would put siblings on both sides).

    Rows whose file is missing or whose caption is empty, and files that can't be decoded (known once `prepare` has tried), are left out and
    listed in `bad`, up to the share max_bad_share of the rows, or of the split's files; more are a UserError. `notes` says what else was
    mended. A path that leads out of the folder is always an error."""
    version = 2  # raise when decoding changes: the cache is keyed by it

    def __init__(self, folder: str | Path, split: str = "train", val_fold: int | None = None, max_bad_share: float = 0.0):
        self.folder, self.split, self.max_bad_share, self.notes = Path(folder), split, max_bad_share, []
        if not self.folder.is_dir():
            raise UserError(f"--data {folder}: no such folder")
        if any((self.folder / d).is_dir() for d in ("wav48_silence_trimmed", "wav48")):
            meta, entries = self.folder, _vctk(self.folder)
        else:
            meta, own = _metadata(self.folder, split)
            entries = self._read(meta, own and split != "train" if own else None, val_fold) if meta else _class_folders(self.folder)
        if not entries:
            raise UserError(f"{self.folder}: no metadata found; expected metadata.csv or metadata.jsonl with columns file_name and caption")
        root = self.folder.resolve()
        for e in entries:
            if e.path is not None and not e.path.resolve().is_relative_to(root):
                raise UserError(f"{e.name}: leads to {e.path.resolve()}, outside of {self.folder}; copy the file into the folder")
        self.bad = self._bearable([f"{e.name}: {e.bad}" for e in entries if e.bad], len(entries))
        entries = [e for e in entries if not e.bad]
        by_hash = sorted({e.path for e in entries}, key=lambda p: zlib.crc32(p.name.encode(errors="replace")))
        tenth = set(by_hash[: max(1, len(by_hash) // 10)])  # at least one file is held out
        clips: dict[Path, dict] = {}
        double = long = 0
        for e in entries:
            if (e.path in tenth if e.held is None else e.held) == (split != "train"):
                known = clips.setdefault(e.path, {})
                for whole in e.captions:
                    c = whole[:LONGEST_CAPTION]
                    double, long = double + (c in known), long + (c != whole)
                    known[c] = True
        if not clips:
            raise UserError(f"{meta or self.folder}: no clips in the {split} split" + (f" (no row has fold {val_fold})" if val_fold is not None else ""))
        if double:
            self.notes.append(f"{split}: {double} captions stand twice beside the same file and count once")
        if long:
            self.notes.append(f"{split}: {long} captions are longer than {LONGEST_CAPTION} characters and are cut there")
        self.paths, self.captions = list(clips), [list(c) for c in clips.values()]
        self.wordings = max(map(len, self.captions))
        self.key = "folder-" + digest(self.version, root, split, *((p, p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths))
        self._waves = self._spans = None

    def _bearable(self, bad: list[str], of: int) -> list[str]:
        """`bad` again, or a UserError where it is more than is allowed."""
        if len(bad) > self.max_bad_share * of:
            raise UserError(bad[0] + (f"; {len(bad)} of {of} can't be used, the share {self.max_bad_share:g} may be left out (--max-bad-share)" if self.max_bad_share or len(bad) > 1 else ""))
        return bad

    def _read(self, meta: Path, held: bool | None, val_fold: int | None) -> list[_Entry]:
        """Rows of a metadata file -> entries. held: the whole file is (not) held out; None: it says so by fold, or not at all."""
        rows = _rows(meta)
        several = [c for c in rows[0] if re.fullmatch(r"caption_\d+", c)]
        text = several or [_column(meta, rows[0], ("caption", "text", "category"))]
        file = _column(meta, rows[0], ("file_name", "filename", "youtube_id", "audiocap_id"))
        if val_fold is not None and "fold" not in rows[0]:
            raise UserError(f"{meta}: --val-fold needs a column 'fold'")
        out = []
        for row in rows:
            if val_fold is not None and not str(row.get("fold") or "").strip():
                raise UserError(f"{meta}, row {row['#']}: empty fold; fill it in or remove the row")
            name, captions = str(row.get(file) or "").strip(), [c for c in (_clean(row[c]) for c in text if isinstance(row.get(c), str)) if c]
            e = _Entry(None, f"{meta}, row {row['#']}", captions, str(row["fold"]) == str(val_fold) if val_fold is not None else held)
            e.path = self._find(name, row, meta) if name else None
            e.bad = (f"empty {file}" if not name else f"empty {text[0]}" if not captions
                     else f"no audio file for {name!r} (looked in {self.folder} and its subfolders)" if e.path is None else "")
            out.append(e)
        return out

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        """Every audio file by its name, with and without the extension: walked only where a row does not say where its file is."""
        return {name: p for p in self.folder.rglob("*") if p.suffix.lower() in AUDIO_TYPES and p.is_file() for name in (p.stem, p.name)}

    def _find(self, name: str, row: dict, meta: Path) -> Path | None:
        """The file of a row: as written, beside the metadata or in audio/, or anywhere by its name. AudioCaps names no extension, and
        downloaders write ID, YID, ID_30, ID_30.000, ID_30000, ID_30_40 ... ."""
        for p in (meta.parent / name, self.folder / name, self.folder / "audio" / name):
            try:
                if p.is_file() and p.suffix.lower() in AUDIO_TYPES:
                    return p
            except (ValueError, OSError):  # a name with a zero byte, or of a thousand letters
                continue
        stems = [name]
        if "youtube_id" in row:
            try:
                start = float(row.get("start_time") or 0)
            except ValueError:
                raise UserError(f"{meta}, row {row['#']}: start_time {row['start_time']!r} is no number") from None
            times = [f"{start:g}", f"{start:.1f}", f"{start:.3f}", f"{1e3 * start:.0f}", f"{start:g}_{start + 10:g}", f"{start:.3f}_{start + 10:.3f}", f"{1e3 * start:.0f}_{1e3 * (start + 10):.0f}"]
            stems = [f"{y}{name}{sep}{t}" for y in ("", "Y") for sep, t in [("_", t) for t in times] + [("", "")]] + [str(row.get("audiocap_id") or name)]
        return next((self._files[s] for s in stems if s in self._files), self._files.get(Path(name).name))

    def __len__(self) -> int:
        """Clips that can be used: before `prepare`, as far as the metadata tell."""
        return len(self.paths)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_files"} | {"_waves": None}

    def name(self, i: int) -> str:
        return printable(str(self.paths[i]))

    def caption(self, i: int, k: int = 0) -> str:
        return self.captions[i][k % len(self.captions[i])]

    def lengths(self) -> list[int]:
        self.prepare()
        return [b - a for a, b in self._spans]

    def wave(self, i: int) -> np.ndarray:
        self.prepare()
        a, b = self._spans[i]
        return self._waves[a:b].astype(np.float32) / 32_767

    def prepare(self, workers: int | None = None) -> AudioFolder:
        """Decode every file once to 16 kHz mono 16-bit in the cache (32 kB a second of audio); leave out those that can't be."""
        if self._waves is not None:  # wave() calls this too
            return self
        folder, n = cache_dir() / self.key, len(self.paths)
        if self._spans is None:  # set where a worker process got this object
            lengths = fill_array(folder, "lengths", (n,), np.int64, _measure_chunk, n, (self.paths,), workers=workers, desc="reading lengths")
            where = np.concatenate([[0], np.cumsum(lengths)])
            waves = fill_array(folder, "waves", (where[-1],), np.int16, _decode_chunk, n, (self.paths, lengths.tolist()),
                               workers=workers, desc=f"decoding {self.split}", where=where)
            good = [i for i in range(n) if waves[where[i]] != UNREADABLE]
            self.bad += self._bearable([_why_unreadable(self.paths[i]) for i in sorted({*range(n)} - {*good})], n)
            if not good:
                raise UserError(f"{self.folder}: none of the {n} files of the {self.split} split can be read")
            self.paths, self.captions = [self.paths[i] for i in good], [self.captions[i] for i in good]
            self._spans = [(int(where[i]), int(where[i + 1])) for i in good]
        self._waves = np.load(folder / "waves.npy", mmap_mode="r")
        return self


UNREADABLE = -32_768  # in place of a clip's samples, which are from -32,767 to 32,767


def _measure_chunk(indices, paths):
    """Lengths of files at 16 kHz by their headers; an unreadable one gets the one sample that says so."""
    out = []
    for i in indices:
        try:
            with _sound(paths[i]) as f:
                out.append(max(1, -(-f.frames * RATE // f.samplerate)))
        except UserError:
            out.append(1)
    return np.asarray(out)


def _decode_chunk(indices, paths, lengths):
    out = []
    for i in indices:
        try:
            x = read_audio(paths[i])
        except UserError:
            out.append(np.full(lengths[i], UNREADABLE, np.int16))
            continue
        x = np.pad(x, (0, max(0, lengths[i] - len(x))))[: lengths[i]]  # mp3 headers may be off by a frame
        out.append(np.round(x / max(1, np.abs(x).max()) * 32_767).astype(np.int16))
    return np.concatenate(out)


def _why_unreadable(path: Path) -> str:
    try:
        read_audio(path)
    except UserError as e:
        return str(e)
    return f"{path}: could not be read when it was decoded"  # and can now: changed meanwhile without a new time of change


class Mixed:
    """Several data sets as one: part k gives the share weights[k] of the clips that training draws, whatever its size. Clips of the parts
    take turns, so that the first n of a validation set are of all kinds."""

    def __init__(self, parts: list, weights: list[float]):
        self.parts, self.weights = parts, weights
        self.key = "mixed-" + digest(*(d.key for d in parts))
        self._arrange()

    def _arrange(self) -> None:
        turns = [(i / len(d), k, i) for k, d in enumerate(self.parts) for i in range(len(d))]
        self.index = [(k, i) for _, k, i in sorted(turns)]
        share = np.array(self.weights, float) / sum(self.weights)
        p = np.array([share[k] / len(self.parts[k]) for k, _ in self.index])
        self.p = p / p.sum()                                       # draw_batch's probability of each clip
        self.wordings = max(d.wordings for d in self.parts)
        self.bad, self.notes = ([x for d in self.parts for x in getattr(d, what, [])] for what in ("bad", "notes"))

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        k, j = self.index[i]
        return self.parts[k].name(j)

    def wave(self, i: int) -> np.ndarray:
        k, j = self.index[i]
        return self.parts[k].wave(j)

    def caption(self, i: int, wording: int = 0) -> str:
        k, j = self.index[i]
        return self.parts[k].caption(j, wording)

    def lengths(self) -> list[int]:
        each = [d.lengths() for d in self.parts]
        return [each[k][j] for k, j in self.index]

    def prepare(self, workers: int | None = None) -> Mixed:
        for d in self.parts:
            d.prepare(workers)
        self._arrange()  # without what can't be read
        return self


def open_data(data: str, split: str, n: int = 0, val_fold: int | None = None, seconds: float = CLIP_S, max_bad_share: float = 0.0):
    """`soundworld`, the path of a folder, or several of them as NAME=WEIGHT,NAME=WEIGHT -> a data set (see the module docstring)."""
    if data == "soundworld":
        return SoundWorld(split, n, seconds=seconds)
    if "=" in data and not Path(data).is_dir():
        names, weights = zip(*(part.strip().rpartition("=")[::2] for part in data.split(",")))
        try:
            weights = [float(w) for w in weights]
            if not all(names) or min(weights) <= 0:
                raise ValueError
        except ValueError:
            raise UserError(f"--data {data}: a mixture reads NAME=WEIGHT,NAME=WEIGHT with positive weights") from None
        return Mixed([open_data(name, split, n, val_fold if name != "soundworld" else None, seconds, max_bad_share) for name in names], weights)
    return AudioFolder(data, split, val_fold or None, max_bad_share)  # 0, the flag's default, names no fold


# --------------------------------------------------------------------------------------------------------------------------
# Super-resolution input.

BAND_LIMIT_VERSION = 1  # raise when the law below changes: cached conditions are keyed by it
FILTERS = ("cheby1", "butter", "bessel", "ellip")  # the four families of NVSR and AudioLBM (FACTS d)


def band_limit(x: np.ndarray, cutoff: int, family: str = "cheby1", order: int = 8) -> np.ndarray:
    """Low-pass (zero phase, scipy) at `cutoff` Hz, then resample to 2 cutoff and back: what a low-rate recording keeps.

    x (N,) -> (N,) float32. cutoff must divide evenly enough: use multiples of 250 Hz below 8 kHz. Source: NU-Wave2 (cheby1,
    ripple .05 dB), NVSR's other families (ellip: .1 dB ripple, 60 dB stop band)."""
    if not 0 < cutoff < RATE / 2:
        raise ValueError(f"cutoff {cutoff} Hz must lie between 0 and {RATE / 2:.0f} Hz")
    w = cutoff / (RATE / 2)
    sos = {"cheby1": lambda: scipy.signal.cheby1(order, 0.05, w, output="sos"),
           "butter": lambda: scipy.signal.butter(order, w, output="sos"),
           "bessel": lambda: scipy.signal.bessel(order, w, norm="mag", output="sos"),
           "ellip": lambda: scipy.signal.ellip(order, 0.1, 60, w, output="sos")}[family]()
    y = scipy.signal.sosfiltfilt(sos, np.asarray(x, np.float64), padlen=min(len(x) - 1, 3 * (2 * len(sos) + 1)))
    g = np.gcd(2 * int(cutoff), RATE)
    up, down = 2 * int(cutoff) // g, RATE // g
    y = scipy.signal.resample_poly(scipy.signal.resample_poly(y, up, down), down, up)
    return np.pad(y, (0, max(0, len(x) - len(y))))[: len(x)].astype(np.float32)


def random_band_limit(x: np.ndarray, rng) -> tuple[np.ndarray, int]:
    """band_limit with random family, order 2..10 and log-uniform cutoff 1..6 kHz (250 Hz grid) -> (muffled, cutoff)."""
    cutoff = int(round(np.exp(rng.uniform(np.log(1_000), np.log(6_000))) / 250) * 250)
    return band_limit(x, cutoff, str(rng.choice(FILTERS)), int(rng.integers(2, 11))), cutoff


# --------------------------------------------------------------------------------------------------------------------------
# Latents: encode once, train from the memory map.

class LatentCache:
    """Latents of every clip of a data set, concatenated along time in one float16 memory map, keyed by data + codec. A codec is
    anything with key, channels, tokens(n) and encode(wav), so the teacher's features are cached by the same code.

    variants = 0: the clips themselves. variants = R > 0: R randomly band-limited versions of each clip (super-resolution
    input; version r of clip i depends on (i, r) alone), channels side by side: (sum T, R C)."""

    def __init__(self, data, codec, variants: int = 0, workers: int | None = None):
        self.variants, self.c, self.p = variants, codec.channels, getattr(data, "p", None)
        tokens = [codec.tokens(n) for n in data.lengths()]
        self.where = np.concatenate([[0], np.cumsum(tokens)])
        folder = cache_dir() / f"latents-{digest(data.key, codec.key, variants, BAND_LIMIT_VERSION)}"
        shape = (self.where[-1], self.c * max(1, variants))
        # Band-limiting is scipy work and spreads over processes; plain encoding is one batched STFT and stays here.
        self.z = fill_array(folder, "z", shape, np.float16, _encode_chunk, len(data), (data, codec, variants), where=self.where,
                            workers=workers if variants and getattr(codec, "spreads", False) else 0, desc="encoding" + (" muffled" if variants else ""))

    def __len__(self) -> int:
        return len(self.where) - 1

    def crop(self, i: int, start: int, length: int, variant: int = 0) -> np.ndarray:
        """Tokens [start, start + length) of clip i (fewer at its end), (<= length, C) float32."""
        a, b = self.where[i] + start, min(self.where[i] + start + length, self.where[i + 1])
        return np.asarray(self.z[a:b, variant * self.c : (variant + 1) * self.c], np.float32)


def _encode_chunk(indices, data, codec, variants):
    import torch
    if mp.parent_process() is not None:
        torch.set_num_threads(1)  # one thread a worker: more would fight over the cores
        data.prepare(0)  # maps the cache, which exists by now
    waves = [data.wave(i) for i in indices]
    if not variants and len({len(x) for x in waves}) == 1:  # equal lengths: one batch
        return codec.encode(torch.from_numpy(np.stack(waves))).flatten(0, 1).numpy().astype(np.float16)
    out = []
    for i, x in zip(indices, waves):
        xs = [x] if not variants else [random_band_limit(x, np.random.default_rng([77, i, r]))[0] for r in range(variants)]
        z = codec.encode(torch.from_numpy(np.stack(xs)))  # (R, T, C)
        out.append(z.permute(1, 0, 2).reshape(z.shape[1], -1).numpy())  # (T, R C)
    return np.concatenate(out).astype(np.float16)


def draw_batch(latents: LatentCache, muffled: LatentCache | None, batch: int, length: int, rng, phi: LatentCache | None = None, rows: slice = slice(None)) -> dict:
    """Random clips, random crops, padding with a mask. rng is a numpy Generator (one a step: resuming needs no state). All of the batch
    is drawn, its `rows` are read and returned: on several devices each reads its own.

    Returns arrays: i (B,) clip indices, wording (B,), x0 (B, T, C), mask (B, T) True where there is sound; for super-resolution
    cond (B, T, C), the same crop of a muffled version; with `phi` (cached teacher features) phi (B, T, F), the same crop of them."""
    clips = rng.integers(0, len(latents), batch) if latents.p is None else rng.choice(len(latents), batch, p=latents.p)
    wording, drawn = rng.integers(0, 1 << 16, batch), []
    for i in clips:
        start = int(rng.integers(0, max(0, int(latents.where[i + 1] - latents.where[i]) - length) + 1))
        drawn.append((i, start, int(rng.integers(max(1, muffled.variants))) if muffled is not None else 0))
    drawn = drawn[rows]
    b = {"i": clips[rows], "wording": wording[rows], "x0": np.zeros((len(drawn), length, latents.c), np.float32), "mask": np.zeros((len(drawn), length), bool)}
    if muffled is not None:
        b["cond"] = np.zeros_like(b["x0"])
    if phi is not None:
        b["phi"] = np.zeros((len(drawn), length, phi.c), np.float32)
    for j, (i, start, variant) in enumerate(drawn):
        x = latents.crop(i, start, length)
        b["x0"][j, : len(x)], b["mask"][j, : len(x)] = x, True
        if muffled is not None:
            b["cond"][j, : len(x)] = muffled.crop(i, start, length, variant)
        if phi is not None:  # draws nothing: the batch is the same with and without it
            b["phi"][j, : len(x)] = phi.crop(i, start, length)
    return b


def demo() -> None:
    """Five scenes: caption, true factors, and what a level meter says."""
    world = SoundWorld("val", 5)
    for i in range(5):
        x, f = world.wave(i), world.factors(i)
        assert np.array_equal(x, SoundWorld("val", 5).wave(i)) and np.abs(x).max() <= 0.951
        events = ", ".join(f"{NAMES[k]} at {f['onset'][k]:.2f} s" for k in np.flatnonzero(f["presence"]))
        print(f"{world.caption(i):58s} | {events:52s} | peak {np.abs(x).max():.2f}  rms {np.sqrt(np.mean(x**2)):.3f}")


if __name__ == "__main__":
    demo()
