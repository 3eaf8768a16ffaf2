"""Claims about the shipped judges."""
import json

import numpy as np
import pytest

from parts import judges
from parts.audio import CLIP_S
from parts.errors import UserError
from parts.judges import ASSETS, judge_clips, judged_events, load_judge
from parts.metrics import event_match
from parts.soundworld import NAMES, SoundWorld, factor_table


@pytest.mark.parametrize("kind", ["dev", "final"])
def test_judges_name_the_events_of_unseen_clips(kind):
    """At least .9 exact on 120 clips here; results/judges.json has the figure on 1,000, which must be at
    least .95."""
    world = SoundWorld("test", 120)
    predicted = judge_clips(load_judge(kind), (world.wave(i) for i in range(120)))
    truth = factor_table(world)["presence"]
    assert event_match(truth, predicted["presence"]).mean() >= 0.9
    others = event_match(truth[::-1], predicted["presence"])
    assert others.mean() < 0.1, "negative control: another clip's factors"
    report = json.loads((ASSETS.parent / "results" / "judges.json").read_text())
    assert report[kind]["test"]["exact"] >= 0.95 and report[kind]["test"]["n"] >= 1_000


def test_judges_differ_and_are_small():
    dev, final = load_judge("dev"), load_judge("final")
    assert type(dev.trunk) is not type(final.trunk) and dev.trunk.front != final.trunk.front
    for kind in ("dev", "final"):
        assert (ASSETS / f"judge-{kind}.safetensors").stat().st_size <= 2e6


def test_events_of_a_long_recording_are_those_of_its_windows():
    """Two clips one after the other: what is detected is the union, at the onset in the first clip that
    has it."""
    world, judge = SoundWorld("test", 8), load_judge("dev")
    first, second = world.wave(0), world.wave(1)
    apart = {name: CLIP_S + onset for name, onset in judged_events(judge, second)}
    apart |= dict(judged_events(judge, first))
    together = judged_events(judge, np.concatenate([first, second]))
    assert dict(together) == pytest.approx(apart, abs=1e-4) and len(apart) >= 2


def test_the_end_of_a_clip_is_judged_whatever_its_length():
    world, judge = SoundWorld("test", 8), load_judge("dev")
    last = dict(judged_events(judge, world.wave(0)))
    for silence_s in (0.3, 1.2, 2.0):
        x = np.concatenate([np.zeros(round(silence_s * 16_000), np.float32), world.wave(0)])
        assert set(last) <= {name for name, _ in judged_events(judge, x)} and last


def test_events_are_named_in_order_of_onset():
    """Scenes of two sounds in turn: their order in at least nine of ten; negative control: in order of
    the judge's confidence it is right in fewer."""
    world, judge = SoundWorld("test", 200), load_judge("dev")
    right, by_confidence = [], []
    for i in range(200):
        scene = world.scene(i)
        truth = [NAMES[event.sound] for event in scene.events]
        found = judged_events(judge, world.wave(i))
        names = [name for name, _ in found]
        assert [onset for _, onset in found] == sorted(onset for _, onset in found)
        if scene.relation != "then" or set(names) != set(truth) or len(truth) != 2:
            continue
        right.append(names == truth)
        logits = judge_clips(judge, [world.wave(i)])["presence"][0]
        by_confidence.append(logits[NAMES.index(truth[0])] > logits[NAMES.index(truth[1])])
    assert len(right) >= 20 and np.mean(right) >= 0.9
    assert np.mean(by_confidence) <= np.mean(right) - 0.2


def test_a_missing_judge_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="python -m lab.train_judges final"):
        load_judge("final")
