"""SoundWorld: captioned sounds made by synthesis, without a download, with all true factors known.

A diffusion model needs pairs (sound, caption); a study of its training needs to know what is *truly* in each
sound. So every clip is drawn as a symbolic `Scene` (which events, when, how many, how high, how far) and only
then rendered to audio and worded as a caption.

    Scene  --render_scene-->   waveform (N,)   16 kHz mono float32, |x| <= 0.95
           --word_scene---->   caption         "two low bells, then rain in the distance"
           --scene_factors->   presence, onset, count, pitch, distance of each of the 24 classes

Clip i of a split is drawn from (seed, split, i) alone: it is the same clip in every process and for every
size of the set. Scenes with certain pairs of classes (HELD_OUT_PAIRS) occur in the split `combos` only, to
test new combinations. The law of scenes and all recipes are ASSUMED. The order of random draws is part of the
data: if it changes, or a synthesizer, or a caption, raise `SoundWorld.version`.

Units: times in s; pitch, bright(ness) and rate in [-1, 1]; distance in [0, 1], 0 is near and 1 far.

Public: Sound, SOUNDS, NAMES, FAMILIES, Event, Scene, HELD_OUT_PAIRS, SPLITS, draw_scene, factor_words,
word_scene, render_scene, scene_factors, noun_phrases, list_sounds, SoundWorld,
factor_table.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.signal

from parts import synths
from parts.audio import CLIP_S, RATE
from parts.cache import cache_dir, digest, fill_array
from parts.errors import UserError
from parts.synths import fade_in_out, loudness

# --- the 24 classes

@dataclass(frozen=True)
class Sound:
    """One class. kind: 'hit' is countable (unit_s long, at least gap_s apart), 'hold' fills its slot, 'once'
    rings out in it. In the noun phrases "~" marks where adjectives go."""
    name: str
    family: str
    kind: str
    synth: Callable  # (samples, event, rng) -> waveform, see parts/synths.py
    one: tuple  # noun phrases, singular
    many: tuple = ()  # noun phrases after a number
    unit_s: float = 0.0
    gap_s: float = 0.0
    pitched: bool = False


SOUNDS = (
    Sound("rain", "weather", "hold", synths.rain, ("~ rain", "~ rainfall", "~ rain falling")),
    Sound("thunder", "weather", "once", synths.thunder,
          ("a ~ thunderclap", "~ thunder", "~ rumbling thunder")),
    Sound("wind", "weather", "hold", synths.wind, ("~ wind", "a ~ howling wind", "~ wind blowing")),
    Sound("dog", "animals", "hit", synths.dog, ("a ~ dog bark", "a ~ bark of a dog"),
          ("~ dog barks", "~ barks"), unit_s=0.24, gap_s=0.30, pitched=True),
    Sound("bird", "animals", "hold", synths.bird, ("a ~ bird chirping", "a ~ bird singing", "~ birdsong")),
    Sound("cricket", "animals", "hold", synths.cricket, ("~ crickets", "~ chirping crickets", "a ~ cricket")),
    Sound("engine", "vehicles", "hold", synths.engine, ("a ~ engine", "a ~ motor running", "a ~ car engine"),
          pitched=True),
    Sound("helicopter", "vehicles", "hold", synths.helicopter,
          ("a ~ helicopter", "a ~ helicopter flying", "a ~ chopper")),
    Sound("horn", "vehicles", "hit", synths.horn, ("a ~ car horn", "a ~ honk"),
          ("~ honks", "~ car horns"), unit_s=0.32, gap_s=0.36, pitched=True),
    Sound("siren", "alarms", "hold", synths.siren, ("a ~ siren", "a ~ wailing siren", "a ~ police siren"),
          pitched=True),
    Sound("beep", "alarms", "hit", synths.beep, ("a ~ beep", "a ~ alarm beep"),
          ("~ beeps", "~ alarm beeps"), unit_s=0.12, gap_s=0.20, pitched=True),
    Sound("phone", "alarms", "hold", synths.phone,
          ("a ~ telephone ringing", "a ~ phone ringing", "a ~ ringing telephone")),
    Sound("bell", "instruments", "hit", synths.bell, ("a ~ bell", "a ~ church bell", "a ~ bell ringing"),
          ("~ bells", "~ bell strokes"), unit_s=0.9, gap_s=0.34, pitched=True),
    Sound("flute", "instruments", "hit", synths.flute, ("a ~ flute", "a ~ flute note"),
          ("~ flute notes", "~ notes on a flute"), unit_s=0.36, gap_s=0.38, pitched=True),
    Sound("guitar", "instruments", "hit", synths.guitar,
          ("a ~ guitar", "a ~ guitar pluck", "a ~ plucked string"),
          ("~ guitar notes", "~ guitar plucks"), unit_s=0.7, gap_s=0.30, pitched=True),
    Sound("knock", "impacts", "hit", synths.knock, ("a ~ knock", "a ~ knock on wood"),
          ("~ knocks", "~ knocks on a door"), unit_s=0.12, gap_s=0.18),
    Sound("glass", "impacts", "once", synths.glass,
          ("~ breaking glass", "~ glass shattering", "a ~ window breaking")),
    Sound("drum", "impacts", "hit", synths.drum, ("a ~ drum", "a ~ drum hit"),
          ("~ drum hits", "~ drum beats"), unit_s=0.4, gap_s=0.24, pitched=True),
    Sound("laser", "electronics", "hit", synths.laser, ("a ~ laser", "a ~ laser zap", "a ~ ray gun"),
          ("~ laser shots", "~ laser zaps"), unit_s=0.24, gap_s=0.27, pitched=True),
    Sound("buzz", "electronics", "hold", synths.buzz,
          ("a ~ electric buzz", "a ~ buzzing sound", "a ~ electrical hum"), pitched=True),
    Sound("bleeps", "electronics", "hold", synths.bleeps,
          ("~ computer bleeps", "a ~ computer bleeping", "~ robot noises")),
    Sound("singing", "voices", "hold", synths.singing,
          ("a ~ voice singing", "a ~ singing voice", "~ singing"), pitched=True),
    Sound("laugh", "voices", "hold", synths.laugh, ("a ~ person laughing", "~ laughter", "a ~ laugh")),
    Sound("baby", "voices", "hold", synths.baby, ("a ~ baby crying", "a ~ crying baby", "a ~ baby")),
)
NAMES = tuple(sound.name for sound in SOUNDS)
FAMILIES = tuple(dict.fromkeys(sound.family for sound in SOUNDS))


# --- scenes

@dataclass(frozen=True)
class Event:
    """One event of a scene. Times in s; pitch, bright, rate in [-1, 1]; distance in [0, 1] (0 near, 1
    far)."""
    sound: int  # index into SOUNDS
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


# Pairs of classes that never occur together in train, val and test; every scene of the split `combos` has
# one.
HELD_OUT_PAIRS = frozenset(
    (a, b) for a in range(len(SOUNDS)) for b in range(a + 1, len(SOUNDS))
    if SOUNDS[a].family != SOUNDS[b].family and (7 * a + 3 * b) % 8 == 0)
# Each split is a random stream of its own.
SPLITS = {"train": 1, "val": 2, "test": 3, "combos": 4, "judge": 5}


def _has_held_out(sounds) -> bool:
    s = sorted(sounds)
    return any((a, b) in HELD_OUT_PAIRS for i, a in enumerate(s) for b in s[i + 1:])


def _draw_event(sound: int, start: float, dur: float, rng) -> Event:
    # Countable sounds: up to four of them, as many as fit into the slot.
    fits = max(1, int((dur - 0.05) / SOUNDS[sound].gap_s)) if SOUNDS[sound].kind == "hit" else 1
    count = 1
    if rng.random() < 0.7:
        count = int(rng.integers(1, min(4, fits) + 1))

    # Six events in ten are clearly low or clearly high, so that a caption can say so; the others lie between.
    if rng.random() < 0.6:
        pitch = rng.choice([-1, 1]) * rng.uniform(0.5, 1)
    else:
        pitch = rng.uniform(-0.3, 0.3)
    bright, rate = rng.uniform(-1, 1, 2)
    distance = rng.uniform()
    return Event(sound, start, dur, count, float(pitch), float(bright), float(rate), float(distance),
                 seed=int(rng.integers(2**31)))


def _draw_cast(rng, split: str) -> tuple[str, list[int], list[int]]:
    """One try at who sounds: relation, foreground sounds, background sounds (none or one). It may break the
    rule of held-out pairs."""
    if split == "combos":
        n = int(rng.choice([2, 3], p=[0.67, 0.33]))
    else:
        n = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))

    if n == 1:
        relation = "one"
    elif n == 2:
        relation = str(rng.choice(["then", "while"]))
    else:
        relation = str(rng.choice(["then", "then-while"]))

    background = []
    if "while" in relation:
        background = [int(rng.choice([i for i, sound in enumerate(SOUNDS) if sound.kind == "hold"]))]
    others = rng.permutation([i for i in range(len(SOUNDS)) if i not in background])
    foreground = [int(i) for i in others[: n - len(background)]]
    return relation, foreground, background


def draw_scene(rng, split: str = "train", seconds: float = CLIP_S) -> Scene:
    """Draw a scene: one event (40 %), two (40 %) or three (20 %), in sequence or over a held background. In
    `combos` there are two (67 %) or three. ASSUMED"""
    # Draw again until the rule of held-out pairs is met; the judges' training data know no such rule.
    while True:
        relation, foreground, background = _draw_cast(rng, split)
        if split == "judge" or _has_held_out(foreground + background) == (split == "combos"):
            break

    # Place them. A sequence shares the clip in equal slots, each filled to 82 to 92 %.
    edge = 0.06
    slot = (seconds - 2 * edge) / len(foreground)
    events = []
    if relation == "one" or relation == "while":
        # A lone foreground event starts soon; for the judges, who must not rely on it, anywhere.
        dur = rng.uniform(0.55, 1.0) * slot
        latest = slot - dur if split == "judge" else 0.15
        events.append(_draw_event(foreground[0], edge + rng.uniform(0, latest), dur, rng))
    else:
        for k, sound in enumerate(foreground):
            start = edge + k * slot + rng.uniform(0, 0.06)
            dur = slot * rng.uniform(0.82, 0.92)
            events.append(_draw_event(sound, start, dur, rng))
    for sound in background:
        events.append(_draw_event(sound, edge, seconds - 2 * edge, rng))
    return Scene(relation, tuple(events))


# --- captions

WORDINGS = 4  # captions of a clip
NUMBERS = {2: ("two", "a couple of"), 3: ("three",), 4: ("four",)}
ADJECTIVES = {"low": ("low", "deep", "low-pitched"), "high": ("high", "high-pitched"),
              "near": ("near", "nearby", "close"), "far": ("far", "distant", "faraway")}
TEMPLATES = {
    "one": ("{}", "{}", "the sound of {}", "{} can be heard", "we hear {}"),
    "then2": ("{}, then {}", "{} followed by {}", "{} and then {}", "first {}, then {}", "{1} after {0}"),
    "then3": ("{}, then {}, then {}", "{} followed by {} and then {}", "first {}, then {}, and finally {}"),
    "while": ("{} while we hear {}", "{} over {}", "{} with {} in the background",
              "{} and {} at the same time", "{}, with {}"),
    "then-while": ("{}, then {}, while we hear {}", "{} followed by {} over {}",
                   "{} and then {}, with {} in the background"),
}


def factor_words(event: Event) -> dict:
    """What a caption may say about an event's factors: pitch low|high|None, distance near|far|None."""
    pitch = None
    if SOUNDS[event.sound].pitched and abs(event.pitch) >= 0.5:
        pitch = "high" if event.pitch > 0 else "low"

    distance = None
    if event.distance < 0.2:
        distance = "near"
    elif event.distance > 0.7:
        distance = "far"
    return {"pitch": pitch, "distance": distance}


def with_article(text: str) -> str:
    """"a engine" -> "an engine"."""
    return "an" + text[1:] if text.startswith("a ") and text[2] in "aeiou" else text


def _noun_phrase(event: Event, rng) -> str:
    sound = SOUNDS[event.sound]
    words = factor_words(event)

    # A factor that may be mentioned is mentioned most of the time, not always.
    adjectives = []
    for word, probability in ((words["distance"], 0.7), (words["pitch"], 0.85)):
        if word and rng.random() < probability:
            adjectives.append(str(rng.choice(ADJECTIVES[word])))

    if event.count > 1:
        text = f"{rng.choice(NUMBERS[event.count])} {rng.choice(sound.many)}"
    else:
        text = str(rng.choice(sound.one))
    text = text.replace("~", " ".join(adjectives))
    return with_article(" ".join(text.split()))


def word_scene(scene: Scene, rng) -> str:
    """One English wording of a scene; the rng picks template, synonyms and which factors are mentioned."""
    name = scene.relation
    if name == "then":
        name += str(len(scene.events))
    template = str(rng.choice(TEMPLATES[name]))
    return template.format(*(_noun_phrase(event, rng) for event in scene.events))


# --- audio

def _add_distance(x: np.ndarray, distance: float, rng) -> np.ndarray:
    """Distance as air and room make it: duller and more reverberant; the caller sets the level. ASSUMED"""
    # Air: y[k] = (1 - a) x[k] + a y[k-1], a one-pole low-pass at 8 kHz (near) to 2.4 kHz (far).
    cutoff = 8_000 * 0.3**distance
    a = np.exp(-2 * np.pi * cutoff / RATE)
    x = scipy.signal.lfilter([1 - a], [1, -a], x)

    # Room: a tail of decaying noise, 0.2 s long.
    if distance > 0.35:
        tail = rng.standard_normal(3_200) * np.exp(-np.arange(3_200) / 700)
        x = x + 0.5 * (distance - 0.35) * scipy.signal.fftconvolve(x, tail / np.linalg.norm(tail))[: len(x)]
    return x


def _render_event(event: Event, n: int) -> np.ndarray:
    """One event, (n,) from its start on; far events are 9 dB softer than near ones. Its own seed makes it, so
    that it does not depend on the other events."""
    sound = SOUNDS[event.sound]
    rng = np.random.default_rng(event.seed)
    x = np.zeros(n)
    if sound.kind == "hit":
        # One unit, repeated at slightly different levels.
        gap = min(event.dur / event.count, sound.gap_s * (1.25 - 0.25 * event.rate) + 0.02)
        unit = sound.synth(min(round(sound.unit_s * RATE), n), event, rng)
        unit[-160:] *= np.linspace(1, 0, 160)  # a cut tail would click
        for k in range(event.count):
            at = round(k * gap * RATE)
            x[at : at + len(unit)] += rng.uniform(0.8, 1) * unit[: n - at]
    else:
        dur = min(round(event.dur * RATE), n)
        x[:dur] = sound.synth(dur, event, rng) * fade_in_out(dur, 0.04 if sound.kind == "hold" else 0.01)
    x = _add_distance(x, event.distance, rng)
    return x * (0.17 * 10 ** (-9 * event.distance / 20) / loudness(x))


def render_scene(scene: Scene, rng, seconds: float = CLIP_S) -> np.ndarray:
    """Audio of a scene, (N,) float32 at 16 kHz, |x| <= 0.95. The faint room noise (-70 dB) keeps silence from
    being digital zero, an outlier that would dominate the log-mel statistics."""
    n = round(seconds * RATE)
    out = 3e-4 * rng.standard_normal(n)
    for event in scene.events:
        start = round(event.start * RATE)
        out[start:] += _render_event(event, n - start)
    return (out * min(1, 0.95 / np.abs(out).max())).astype(np.float32)


# --- true factors

def scene_factors(scene: Scene) -> dict:
    """True factors by class, arrays of 24: presence {0,1}, onset (s), count, pitch and distance; NaN where
    the class is absent, or has no such factor (count: hits only; pitch: pitched sounds only)."""
    factors = {k: np.full(len(SOUNDS), np.nan, np.float32) for k in ("onset", "count", "pitch", "distance")}
    factors["presence"] = np.zeros(len(SOUNDS), np.float32)
    for event in scene.events:
        sound = SOUNDS[event.sound]
        factors["presence"][event.sound] = 1
        factors["onset"][event.sound] = event.start
        factors["distance"][event.sound] = event.distance
        if sound.kind == "hit":
            factors["count"][event.sound] = event.count
        if sound.pitched:
            factors["pitch"][event.sound] = event.pitch
    return factors


# --- the data set

def noun_phrases(sound: Sound) -> list[str]:
    """How one of a class may be called, without adjectives: ["rain", "rainfall", "rain falling"]."""
    return [with_article(noun.replace("~ ", "")) for noun in sound.one]


def list_sounds() -> list[str]:
    """What a caption may ask for, a line a family, then how it may be said."""
    lines = []
    for family in FAMILIES:
        sounds = [sound for sound in SOUNDS if sound.family == family]
        phrases = [" | ".join(noun_phrases(sound)) for sound in sounds]
        lines.append(f"{family:12s} " + "; ".join(phrases))
    return [*lines, "how          low high (pitched sounds), near far distant, two three four; "
                    "then, followed by, after, while, over, in the background"]


def _stream(seed: int, split: str, i: int, *more: int):
    """The random stream of clip i: (i) draws its scene, (i, 1, k) its wording k, (i, 2) its room noise."""
    return np.random.default_rng([seed, SPLITS[split], i, *more])


@functools.lru_cache(maxsize=10_000)  # drawn once for its four captions, its factors and its sound
def _scene_of(seed: int, split: str, i: int, seconds: float) -> Scene:
    return draw_scene(_stream(seed, split, i), split, seconds)


class SoundWorld:
    """The embedded data set: n clips of a split, drawn from (seed, split, index) alone, so clip i is always
    the same clip. The interface is that of parts/preparation.py. UserError for an unknown split."""
    version = 2  # raise when a synthesizer, the scene law or a caption changes: the cache is keyed by it

    def __init__(self, split: str = "train", n: int = 6_000, seed: int = 0, seconds: float = CLIP_S):
        if split not in SPLITS:
            raise UserError(f"unknown SoundWorld split {split!r}: use one of {', '.join(SPLITS)}")
        self.split = split
        self.n = n
        self.seed = seed
        self.seconds = seconds
        self.key = f"soundworld-{digest(self.version, split, n, seed, seconds)}"
        self.contents, self.files = self.key, set()
        self._waves = None  # (n, N) int16 memory map, once prepared

    def __len__(self) -> int:
        return self.n

    def __getstate__(self):
        # Workers map the cache themselves: pickling would copy all the audio.
        return {**self.__dict__, "_waves": None}

    def scene(self, i: int) -> Scene:
        return _scene_of(self.seed, self.split, i, self.seconds)

    def p_by_events(self) -> np.ndarray:
        """(n,) probabilities of the clips in proportion to their number of events. A clip's loss is a mean,
        of which one of three events has about a third: drawn so, each event weighs as much as one alone."""
        events = np.array([len(self.scene(i).events) for i in range(self.n)])
        return events / events.sum()

    def name(self, i: int) -> str:
        return f"SoundWorld {self.split} clip {i}"

    def caption(self, i: int, k: int = 0) -> str:
        """Wording k (modulo 4) of clip i."""
        return word_scene(self.scene(i), _stream(self.seed, self.split, i, 1, k % WORDINGS))

    def wordings(self, i: int) -> int:
        """How many captions clip i has."""
        return WORDINGS

    def factors(self, i: int) -> dict:
        """True factors of clip i, see scene_factors."""
        return scene_factors(self.scene(i))

    def render(self, i: int) -> np.ndarray:
        """Clip i, (N,) float32, before 16-bit storage."""
        return render_scene(self.scene(i), _stream(self.seed, self.split, i, 2), self.seconds)

    def lengths(self) -> list[int]:
        return [round(self.seconds * RATE)] * self.n

    def wave(self, i: int) -> np.ndarray:
        """Clip i, (N,) float32, through 16-bit storage; rendered on the spot when the cache was not
        prepared."""
        if self._waves is not None:
            return self._waves[i].astype(np.float32) / 32_767
        return np.round(self.render(i) * 32_767).astype(np.float32) / 32_767

    def prepare(self, workers: int | None = None) -> SoundWorld:
        """Render all clips into the cache (16-bit, 82 kB a clip) with worker processes; interrupted work
        continues."""
        shape = (self.n, round(self.seconds * RATE))
        args = (self.split, self.n, self.seed, self.seconds)
        self._waves = fill_array(cache_dir() / self.key, "waves", shape, np.int16, _render_chunk, self.n,
                                 args=args, workers=workers, desc=f"SoundWorld {self.split}")
        return self


def _render_chunk(indices, split, n, seed, seconds) -> np.ndarray:
    """Clips `indices`, (len(indices), N) int16: what one worker makes."""
    world = SoundWorld(split, n, seed, seconds)
    return np.stack([np.round(world.render(i) * 32_767).astype(np.int16) for i in indices])


def factor_table(world: SoundWorld, n: int | None = None) -> dict:
    """True factors of the first n clips, stacked: presence, onset (s), pitch, count, distance, each (n,
    24)."""
    rows = [world.factors(i) for i in range(n or len(world))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
