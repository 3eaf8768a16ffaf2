"""Claims about the comparison of decoders: what is the same scores 0, and both arms get the same latents."""
import numpy as np

from lab import score_decoder


def test_a_perfect_decoder_is_no_distance_away_and_a_silent_one_is(waves):
    same = score_decoder._measure(waves[:3], waves[:3], None)
    silent = score_decoder._measure(waves[:3], np.zeros_like(waves[:3]), None)
    for name in ("fine", "texture", "lsd"):
        assert np.allclose(same[name], 0, atol=1e-6) and (silent[name] > 0.2).all(), name


def test_both_decoders_are_compared_on_the_same_clips():
    config = {"data": "soundworld", "val_fold": 0, "seconds": 2.56, "channels": 16, "task": "t2a"}
    result = score_decoder.compare(config, clips=4, fitted_on=20, rounds=2)
    rows = {row["row"]: row for row in result["rows"]}
    difference = rows["learned"]["fine"]["mean"] - rows["Griffin-Lim"]["fine"]["mean"]
    assert np.isclose(rows["learned - Griffin-Lim"]["fine"]["mean"], difference)
    assert set(rows["real"]) == {"row", "event_set"} and result["n"] == 4
    printed = score_decoder.table(result)
    assert "learned - Griffin-Lim" in printed and "milliseconds a clip" in printed


def test_the_difference_of_decoders_is_paired_over_clips(monkeypatch):
    """Clips that differ by far more than the decoders: a constant difference has an interval of no width."""
    of_clips = np.array([1.0, 5.0, 20.0, 80.0])
    both = iter((of_clips, of_clips - 0.5))                # Griffin-Lim, learned
    monkeypatch.setattr(score_decoder, "_measure", lambda *a: {"fine": next(both)})
    config = {"data": "soundworld", "val_fold": 0, "seconds": 2.56, "channels": 16, "task": "t2a"}
    rows = {row["row"]: row for row in score_decoder.compare(config, clips=4, fitted_on=20, rounds=2)["rows"]}
    assert rows["learned - Griffin-Lim"]["fine"] == {"mean": -0.5, "interval": [-0.5, -0.5]}
