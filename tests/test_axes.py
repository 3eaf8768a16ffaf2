"""Claims about what an experiment measures while its runs are trained: both axes, at two guidance scales."""
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
