"""Claims about SoundWorld: classes, scenes, captions, factors, splits, and the cache of clips."""
import itertools

import numpy as np
import pytest

from parts import soundworld
from parts.cache import fill_array
from parts.errors import UserError
from parts.soundworld import FAMILIES, HELD_OUT_PAIRS, NAMES, SOUNDS, SoundWorld


def test_there_are_24_sounds_in_eight_families():
    assert len(SOUNDS) == 24 and len(FAMILIES) == 8 and len(set(NAMES)) == len(SOUNDS)


# --- clips and their cache

def test_a_clip_depends_on_its_index_alone():
    """Not on the number of clips, the order of asking, or the object asked."""
    small, large = SoundWorld("train", 10), SoundWorld("train", 5_000)
    clip_7 = small.wave(7)
    clip_3 = small.wave(3)
    assert np.array_equal(clip_3, large.wave(3)) and np.array_equal(clip_7, large.wave(7))
    assert small.caption(3) == large.caption(3) and small.scene(3) == large.scene(3)
    assert not np.array_equal(clip_3, SoundWorld("val", 10).wave(3)), "splits are streams of their own"
    assert not np.array_equal(clip_3, SoundWorld("train", 10, seed=1).wave(3))


def test_the_clips_are_those_that_the_shipped_models_know():
    """If this fails, a random draw has moved: raise SoundWorld.version and make the shipped models again."""
    world = SoundWorld("train", 3)
    captions = ["two bells followed by three laser shots over a near ringing telephone",
                "a distant high-pitched electric buzz",
                "a distant chopper while we hear a phone ringing"]
    assert (world.version, world.key) == (2, "soundworld-eda2a7b1a1271990")
    assert [world.caption(i) for i in range(3)] == captions
    assert np.allclose([np.std(world.wave(i)) for i in range(3)], [0.151230, 0.059605, 0.086694], rtol=1e-4)


def test_prepared_by_two_workers_or_by_none_it_is_the_same_clip():
    world = SoundWorld("test", 200)
    before = [world.wave(i) for i in (0, 70, 199)]
    world.prepare(workers=2)
    assert world._waves is not None
    assert all(np.array_equal(world.wave(i), x) for i, x in zip((0, 70, 199), before))


def test_interrupted_generation_continues_where_it_stopped(tmp_path):
    """Only chunks not marked done are made again; a finished cache is not touched."""
    calls = []

    def chunk(indices):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.asarray(indices, np.int64)
    with pytest.raises(KeyboardInterrupt):
        fill_array(tmp_path, "x", (256,), np.int64, chunk, 256, workers=0)
    out = fill_array(tmp_path, "x", (256,), np.int64, chunk, 256, workers=0)
    assert np.array_equal(out, np.arange(256)) and len(calls) == 5
    fill_array(tmp_path, "x", (256,), np.int64, chunk, 256, workers=0)
    assert len(calls) == 5


# --- captions

def test_captions_say_only_what_is_true():
    """low/high, near/far and numbers appear only where the factors say so; every event is named."""
    world = SoundWorld("train", 400)
    for i in range(400):
        scene, text = world.scene(i), world.caption(i, i)
        words = set(text.replace(",", "").split())
        facts = [soundworld.factor_words(event) for event in scene.events]
        for factor, values in (("pitch", ("low", "high")), ("distance", ("near", "far"))):
            for value in values:
                said = words & set(soundworld.ADJECTIVES[value])
                assert not said or any(fact[factor] == value for fact in facts), text
        for number, names in soundworld.NUMBERS.items():
            assert not words & set(names) or any(event.count == number for event in scene.events), text
        for event in scene.events:
            sound = SOUNDS[event.sound]
            phrases = [p.replace("a ~", "").replace("~", "").strip() for p in sound.one + sound.many]
            assert any(phrase in text for phrase in phrases), (sound.name, text)
        assert "~" not in text and "  " not in text and " a a" not in text


def test_a_clip_has_several_wordings():
    world = SoundWorld("train", 50)
    assert sum(world.caption(i, 0) != world.caption(i, 1) for i in range(50)) > 25


# --- scenes and factors

def pairs_of(scene):
    sounds = [event.sound for event in scene.events]
    return {(a, b) for a in sounds for b in sounds if a < b}


def test_held_out_pairs_never_sound_together_in_training_and_always_in_combos():
    for split in ("train", "val", "test"):
        world = SoundWorld(split, 600)
        assert not any(pairs_of(world.scene(i)) & HELD_OUT_PAIRS for i in range(600))
    world = SoundWorld("combos", 100)
    assert all(pairs_of(world.scene(i)) & HELD_OUT_PAIRS for i in range(100))
    world = SoundWorld("train", 600)
    trained_on = {event.sound for i in range(600) for event in world.scene(i).events}
    assert trained_on == set(range(len(SOUNDS))), "each single sound is trained on"


def test_factors_agree_with_the_scene():
    world = SoundWorld("val", 50)
    for i in range(50):
        factors, scene = world.factors(i), world.scene(i)
        assert factors["presence"].sum() == len(scene.events)
        for event in scene.events:
            assert factors["onset"][event.sound] == np.float32(event.start)
            assert factors["presence"][event.sound] == 1
        assert np.isnan(factors["onset"][factors["presence"] == 0]).all()


def test_the_factor_table_stacks_the_clips():
    world = SoundWorld("val", 5)
    table = soundworld.factor_table(world, 3)
    assert all(table[name].shape == (3, len(SOUNDS)) for name in table)
    assert all(np.array_equal(table[name][2], world.factors(2)[name], equal_nan=True) for name in table)
    assert len(soundworld.factor_table(world)["presence"]) == 5


def test_drawn_by_events_every_event_is_drawn_equally_often():
    """Negative control: drawn evenly, an event among three is drawn as often as one alone, so clips of one
    have their share of the data."""
    world = SoundWorld("train", 300)
    events = np.array([len(world.scene(i).events) for i in range(300)])
    p = world.p_by_events()
    assert p.sum() == pytest.approx(1) and np.ptp(p / events) < 1e-12
    for k in (1, 2, 3):
        assert p[events == k].sum() == pytest.approx(events[events == k].sum() / events.sum())
    assert p[events == 1].sum() < 0.8 * (events == 1).mean()


def test_sequences_do_not_start_together():
    world = SoundWorld("train", 300)
    for i in range(300):
        scene = world.scene(i)
        if scene.relation == "then":
            starts = [event.start for event in scene.events]
            assert all(b - a > 0.5 for a, b in itertools.pairwise(starts))


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="train, val, test, combos"):
        SoundWorld("tset")
