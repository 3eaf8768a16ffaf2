"""Claims about the tables: their rows, their references, and what is computed once."""
import json

import numpy as np
import pytest

from parts import metrics, scoring
from parts.codec import Codec
from parts.soundworld import SoundWorld, factor_table


@pytest.fixture
def codec(waves):
    return Codec(16).fit(waves)


SETTINGS = {"data": "soundworld", "val_fold": 0, "clips": 20, "seconds": 2.56}


def test_scores_come_with_their_ceiling_controls_and_protocol(t2a_run, sr_run):
    captions = ["real", "codec ceiling", "model"]
    restored = ["input", "mean spectrum", "ridge", "model", "codec ceiling"]
    restored += ["model - mean spectrum", "model - ridge"]
    for path, rows, keys in (
        (t2a_run, captions, {"judge", "w", "n", "sample_steps", "candidates"}),
        (sr_run, restored, {"cutoff_hz", "filter", "stft", "n"}),
    ):
        (result,) = json.loads((path / "scores.json").read_text()).values()
        assert [row["row"] for row in result["rows"]] == rows
        assert keys <= set(result["protocol"])
    by_name = {row["row"]: row for row in result["rows"]}
    difference = by_name["model"]["lsd_hf"]["mean"] - by_name["ridge"]["lsd_hf"]["mean"]
    assert abs(by_name["model - ridge"]["lsd_hf"]["mean"] - difference) < 1e-9
    better_to_worse = ["codec ceiling", "ridge", "mean spectrum", "input"]
    means = [by_name[name]["lsd_hf"]["mean"] for name in better_to_worse]
    assert means == sorted(means) and len(set(means)) == 4


def test_differences_of_rows_are_paired_and_their_interval_is_students():
    """Clips that differ by far more than two models do: the interval is that of the differences."""
    rng = np.random.default_rng(0)
    clip, gain = 10 * rng.standard_normal(9), 0.1 * rng.standard_normal(9) + 1
    ours, theirs = ([{"lsd": float(x)} for x in values] for values in (clip + gain, clip))
    found = scoring.summary(ours, theirs)["lsd"]
    reach = 2.306 * gain.std(ddof=1) / 3                   # t of 8 degrees of freedom, sqrt(9)
    assert found["mean"] == pytest.approx(gain.mean())
    assert found["interval"] == pytest.approx([gain.mean() - reach, gain.mean() + reach], rel=1e-3)
    alone = scoring.summary(ours)["lsd"]["interval"]
    assert alone[1] - alone[0] > 20 * 2 * reach, "negative control: of one model alone"


def test_a_caption_is_new_where_training_never_had_it_and_kid_is_to_other_clips(codec):
    judge, settings = scoring.load_judge("dev"), {**SETTINGS, "clips": 6_000}
    unseen = scoring.unseen_clips(codec, settings, 60, judge, "test")
    train_set, val_set = SoundWorld("train", 6_000), SoundWorld("val", 60)
    known = {train_set.caption(i, k) for i in range(6_000) for k in range(train_set.wordings(i))}
    new = [caption not in known for caption in unseen.captions]
    assert unseen.new.tolist() == new and 5 < sum(new) < 60
    others = scoring.judge_clips(judge, [val_set.wave(i) for i in range(60)])["embedding"]
    assert np.allclose(unseen.reference, others, atol=1e-5)


def test_what_runs_are_scored_against_is_made_once_for_a_key_and_anew_for_another():
    made = []

    def make():
        made.append(1)
        return len(made)

    assert [scoring.cached_reference((key,), make) for key in "aaba"] == [1, 1, 2, 3]


def test_data_sets_are_opened_only_where_the_references_of_restored_clips_are_not_cached(codec, monkeypatch):
    """And two models are then compared with the same rows. Both samples of a clip have seeds of their own, or
    the spread of an energy score would be 0."""
    opened = []

    def open_sets():
        opened.append(1)
        return SoundWorld("test", 4), SoundWorld("train", 20)

    asked, rendered, render = [], [], scoring.SpectrumBaseline.render

    def make(muffled, seeds):
        assert muffled.shape == (4, 40_960)
        asked.append(seeds)
        return muffled

    def noted(self, x, kind, seed):
        rendered.append((kind, seed))
        return render(self, x, kind, seed)

    monkeypatch.setattr(scoring.SpectrumBaseline, "render", noted)
    first = scoring.score_superresolution(codec, SETTINGS, make, open_sets, 4, 2_000, "test")
    second = scoring.score_superresolution(codec, SETTINGS, make, open_sets, 4, 2_000, "test")
    assert len(opened) == 1 and first == second
    two_samples = [0, 2, 4, 6, 1, 3, 5, 7]
    assert asked[0] + asked[1] == two_samples
    assert rendered == [(kind, seed) for kind in ("mean", "ridge") for seed in two_samples]
    by_name = {row["row"]: row for row in first}
    assert by_name["model"]["lsd"] == by_name["input"]["lsd"], "a model that returns its input"
    scoring.score_superresolution(codec, SETTINGS, make, open_sets, 4, 4_000, "test")
    assert len(opened) == 2


def test_a_model_that_returns_the_true_clips_is_scored_as_they_are(codec):
    """Negative control: the clips of other captions."""
    world = SoundWorld("test", 12)
    reals = np.stack([world.wave(i) for i in range(12)])

    def score(make):
        rows = scoring.score_captions(codec, SETTINGS, make, 12, "dev", "test")
        return {row["row"]: row for row in rows}

    right = score(lambda captions, seeds: reals[seeds])
    assert right["model"] == right["real"] | {"row": "model"} and right["model"]["exact"] >= 0.9
    assert right["model"]["event_kl"] == 0
    wrong = score(lambda captions, seeds: reals[seeds[::-1]])
    assert wrong["model"]["exact"] < 0.2 and wrong["model"]["event_kl"] > 0.1


def test_captioned_recordings_are_scored_on_the_sets_that_were_handed_in(codec):
    test_set, train_set = SoundWorld("val", 6), SoundWorld("train", 20)
    asked = []

    def make(captions, seeds):
        asked.extend(captions)
        return np.stack([test_set.wave(seed) for seed in seeds])

    rows = scoring.score_recordings(codec, SETTINGS, make, test_set, train_set, 50, "dev")
    assert asked == [test_set.caption(i) for i in range(6)]
    assert [row["row"] for row in rows] == ["real", "codec ceiling", "model"]
    assert all(row["n"] == 6 for row in rows) and rows[0]["kid"] == rows[2]["kid"] != rows[1]["kid"]
    judge = scoring.load_judge("dev")
    made, trained = (scoring.judge_clips(judge, [world.wave(i) for i in range(len(world))])["embedding"]
                     for world in (test_set, train_set))
    assert rows[2]["kid"] == pytest.approx(metrics.kid(made, trained)), "the reference is of the training set"


def test_quick_metrics_are_perfect_for_true_clips_and_worse_for_others(waves):
    world = SoundWorld("val", 64)
    right = scoring.quick_caption_metrics(world, waves[:24], 24, waves[:4])
    wrong = scoring.quick_caption_metrics(world, waves[:24][::-1], 24, waves[20:24][::-1])
    assert right["texture_score"] == 0 and wrong["texture_score"] > 0.3
    assert right["event_accuracy"] >= 0.9 and right["recall"] >= 0.9
    assert wrong["event_accuracy"] < 0.2 and wrong["recall"] < 0.5
    right, wrong, quick = waves[:2], waves[2:4], scoring.quick_superresolution_metric
    assert quick(right, [right, right], 2_000) == {"lsd_hf": 0.0, "energy_score": 0.0}
    far = quick(right, [wrong, wrong], 2_000)
    assert far["lsd_hf"] > 0.5 < far["energy_score"]


def test_the_quick_energy_score_is_the_slow_one_of_both_samples_and_the_lsd_is_of_the_first(waves):
    """Over frames, bands above the cutoff: |x - y| of both samples less half their distance. Negative
    control: without that half a model that guesses the same twice would look as good."""
    reals, samples = waves[:3], [waves[3:6], waves[6:9]]
    slow, without = [], []
    for real, first, second in zip(reals, *samples):
        y, a, b = (metrics.high_band_mel(x, 2_000) for x in (real, first, second))
        for frame in range(len(y)):
            far = np.mean([np.sqrt(np.mean((x[frame] - y[frame]) ** 2)) for x in (a, b)])
            slow.append(far - 0.5 * np.sqrt(np.mean((a[frame] - b[frame]) ** 2)))
            without.append(far)
    found = scoring.quick_superresolution_metric(reals, samples, 2_000)
    assert found["energy_score"] == pytest.approx(np.mean(slow), rel=1e-4)
    assert found["energy_score"] < 0.9 * np.mean(without)
    first = [metrics.lsd(metrics.log_power(x), metrics.log_power(y), 2_000)["lsd_hf"]
             for x, y in zip(reals, samples[0])]
    assert found["lsd_hf"] == pytest.approx(np.mean(first))


def test_each_factor_is_right_for_the_true_answers_and_wrong_for_their_opposites():
    """Count, pitch and order are asked of events that are detected; recall is 0 where none is."""
    world = SoundWorld("val", 200)
    truth = factor_table(world, 200)
    right = {"presence": np.where(truth["presence"] > 0.5, 1.0, -1.0), "onset": truth["onset"],
             "pitch": np.nan_to_num(truth["pitch"]),
             "count": np.eye(4)[np.nan_to_num(truth["count"], nan=1).astype(int) - 1]}
    hit = np.ones(200, bool)
    found = scoring.factor_scores(world, truth, right, hit)
    asked = found.pop("order_n")
    relations = [world.scene(i).relation for i in range(200)]
    assert found == {"recall": 1, "count": 1, "pitch": 1, "order": 1}
    assert asked == relations.count("then") + relations.count("then-while")
    assert min(relations.count("then"), relations.count("then-while")) > 3
    wrong = {**right, "onset": -truth["onset"], "pitch": -right["pitch"],
             "count": np.roll(right["count"], 1, -1)}
    found = scoring.factor_scores(world, truth, wrong, hit)
    assert found == {"recall": 1, "count": 0, "pitch": 0, "order": 0, "order_n": asked}
    slight = np.where(np.abs(right["pitch"]) < 0.5, -right["pitch"], right["pitch"])
    assert (slight != right["pitch"])[truth["presence"] > 0.5].any()
    found = scoring.factor_scores(world, truth, {**right, "pitch": slight}, hit)
    assert found["pitch"] == 1, "asked of clearly high or low ones alone"
    found = scoring.factor_scores(world, truth, {**right, "presence": -right["presence"]}, ~hit)
    assert found == {"recall": 0, "count": None, "pitch": None, "order": None, "order_n": 0}


def test_a_table_tells_its_results_by_number_of_events_and_of_new_captions_apart(monkeypatch):
    """Three clips: one event, right; two events, of which one is found; one event, right, its caption new."""
    presence = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    detected = np.where([[1, 0, 0], [1, 0, 0], [0, 0, 1]], 2.0, -2.0)
    judged = {"presence": np.where(presence, 2.0, -2.0)}
    judged["presence"][2, 1] = 1.0                         # the true answers are no mirror of the model's
    answers = {"presence": detected, "embedding": np.random.default_rng(0).standard_normal((3, 4))}
    monkeypatch.setattr(scoring, "judge_clips", lambda judge, waves: answers)
    monkeypatch.setattr(scoring, "factor_table", lambda world, n: {"presence": presence})
    monkeypatch.setattr(scoring, "factor_scores", lambda *a: {})
    unseen = scoring.UnseenClips(None, [], {}, None, judged, answers["embedding"][::-1],
                                 np.array([False, False, True]))
    found = scoring.text_scores(unseen, [None] * 3, None)
    assert found["by_events"] == {1: {"exact": 1.0, "n": 2}, 2: {"exact": 0.0, "n": 1}}
    assert found["new_wording"]["exact"] == 1.0 and found["new_wording"]["n"] == 1
    assert found["interval"] == metrics.wilson(2, 3)
    assert found["new_wording"]["interval"] == metrics.wilson(1, 1)

    # KL(true | model), in that order, of the two answers of nine that differ.
    def kl(p, q):
        return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    high, low, some = (1 / (1 + np.exp(-z)) for z in (2, -2, 1))
    assert found["event_kl"] == pytest.approx((kl(high, low) + kl(some, low)) / 9)
    assert kl(some, low) != pytest.approx(kl(low, some), rel=0.1)


def test_how_many_clips_a_curve_is_of_is_what_its_last_evaluation_says():
    config = {"task": "sr", "score_clips": 60}
    assert scoring.preview_clips(config) == scoring.preview_clips(config, [{"eval": {"lsd_hf": 1.0}}]) == 16
    assert scoring.preview_clips(config, [{"eval": {}}, {"eval": {"measured_on": 48}}]) == 48
