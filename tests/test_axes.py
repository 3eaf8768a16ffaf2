"""Claims about what an experiment measures while its runs are trained: both axes, at two guidance scales."""
import pytest

import evaluate
import train
from lab import axes
from parts.runs import read_log
from parts.soundworld import SoundWorld


def drawn_elsewhere(*anything):
    """In place of a background that draws."""


def test_both_axes_are_measured_at_the_scale_of_the_run_and_at_1(t2a_run, monkeypatch):
    asked, generate = [], evaluate.generate

    def few_steps(run, captions, seeds, **how):
        asked.append((len(captions), how.pop("w")))
        return generate(run, captions, seeds, w=asked[-1][1], **{**how, "steps": 2})
    monkeypatch.setattr(evaluate, "generate", few_steps)
    monkeypatch.setitem(axes.CLIPS, "t2a", 3)
    found = axes.both_axes(evaluate.load_run(t2a_run), SoundWorld("val", 5), drawn_elsewhere)
    assert asked == [(4, None), (3, None), (3, None), (3, 1.0), (3, 1.0)], "previews; two samples each"
    assert {"event_accuracy", "texture_score", *(f"{name}_w1" for name in axes.AT_W1)} <= set(found)
    assert found["texture_score"] != found["texture_score_w1"]


def test_super_resolution_has_two_samples_and_no_guidance_scale(sr_run, monkeypatch):
    monkeypatch.setitem(axes.CLIPS, "sr", 2)
    found = axes.both_axes(evaluate.load_run(sr_run), SoundWorld("val", 4), drawn_elsewhere)
    assert set(found) == {"lsd_hf", "energy_score", "measured_on"}


@pytest.mark.parametrize("split, own", [("test", 0), ("val", 1)])
def test_the_scale_is_chosen_on_other_clips_than_it_is_reported_on(t2a_run, monkeypatch, split, own):
    """Of validation clips, by fewer steps; where validation is what is reported, of another seed's."""
    share, asked = {1.0: 0.5, 1.75: 0.9, 2.5: 0.7, 4.0: 0.6}, []

    def measured(config, clips, make, n, twice, device, judge="dev"):
        asked.append((make, clips.split, clips.seed, n, judge))
        return {"event_accuracy": share[make[1]], "of": make}

    monkeypatch.setattr(axes, "maker", lambda run, steps, w: (steps, w))
    monkeypatch.setattr(axes, "quick_metrics", measured)
    run = evaluate.load_run(t2a_run)
    run.config.update(score_split=split, judge="final", score_clips=7)
    found = axes.final_axes(run)
    assert found["w"] == 1.75 and found["by_w"] == {str(w): x for w, x in share.items()}
    assert found["w1"]["of"] == (None, 1.0) and found["tuned"]["of"] == (None, 1.75)
    assert asked[:4] == [((axes.QUICK_STEPS, w), "val", own, 7, "dev") for w in share]
    assert {each[1:] for each in asked[4:]} == {(split, 0, 7, "final")}


def test_a_run_logs_what_it_is_told_to_measure_and_else_its_previews(tmp_path, tiny, bare):
    def measured(run, val_set, background):
        return {"measured_at": run.step}
    for name, quick in (("told", measured), ("plain", None)):
        out = train.train({**tiny, "out": str(tmp_path / name)}, quick=quick)
        evaluations = [line for line in read_log(out) if "eval" in line]
        assert evaluations
        for line in evaluations:
            assert line["eval"].get("measured_at") == (line["step"] if quick else None)


def test_an_experiments_run_draws_its_page_at_every_evaluation(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(axes.CLIPS, "t2a", 2)
    monkeypatch.setattr(evaluate, "score", lambda *a, **k: None)
    out = train.train({**tiny, "out": str(tmp_path / "run")}, quick=axes.both_axes)
    assert (out / "index.html").is_file() and (out / "dashboard.png").is_file()
