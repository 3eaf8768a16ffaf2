"""Claims about what the blocks of a trained network add."""
import json

import numpy as np
import torch
from conftest import ROOT, in_process

import evaluate
from lab import block_work as B


def test_the_matrix_is_the_slow_loop_over_clips_and_pairs(t2a_run, monkeypatch):
    run, seen = evaluate.load_run(t2a_run), {}
    predict = B.predict

    def spy(*args, **how):
        seen["v_hat"], seen["hs"], v = predict(*args, **how)
        return seen["v_hat"], seen["hs"], v
    monkeypatch.setattr(B, "predict", spy)
    found = B.block_work(run)

    pooled = [h.double().mean(1) for h in seen["hs"]]
    u = [after - before for before, after in zip(pooled, pooled[1:])]
    u = [x - x.mean(0) for x in u]
    slow = np.mean([float(torch.cosine_similarity(u[0][b], u[1][b], 0)) ** 2 for b in range(B.CLIPS)])
    cos2 = np.array(found["cos2"])
    assert cos2.shape == (2, 2) and (np.diag(cos2) == 1).all() and cos2[0, 1] == cos2[1, 0]
    assert abs(cos2[0, 1] - slow) < 5e-3
    assert abs(found["between_groups"] - slow) < 5e-3, "two blocks, a group each: the loss is their cos^2"


def test_the_command_writes_one_matrix_a_run(t2a_run, tmp_path):
    made = in_process(B, t2a_run, "--out", tmp_path / "work.json", cwd=ROOT)
    assert made.returncode == 0, made.stderr
    (found,) = json.loads((tmp_path / "work.json").read_text()).values()
    assert found["groups"] == [0, 1] and found["structure"] == "adaptive"
