"""Claims about train.drive and train.measure: what the regime r and the settings make of lambda, the density
and structure, and what r is measured from."""
import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from run_files import step_rows

import guidance
import regime
import sampler
import structure_reg
import train
from parts.config import Config
from parts.devices import Timer, ignore


def test_negative_control_a_regime_turned_round_drives_everything_the_other_way():
    """drive: r up means lambda down, m towards its late value, structure's share and weight up; with
    1 - r for r each of these claims fails."""
    cfg, detector = Config(steps=100), structure_reg.GroupDetector(8)
    detector.activated_at, detector.groups, detector.ratio = 0, [0, 0, 0, 1, 1, 1, 2, 2], 0.5

    def claims(early, late):
        a, b = (train.drive(cfg, r, 50, detector) for r in (early, late))
        return a.lam > b.lam, a.density.m > b.density.m, a.share < b.share, a.mu < b.mu

    assert all(claims(0.1, 0.8)) and not any(claims(1 - 0.1, 1 - 0.8))


def test_the_share_of_structure_sets_in_over_a_tenth_of_the_run_and_lambda_falls_with_its_exponent():
    cfg, detector = Config(steps=100, gamma=2.0), structure_reg.GroupDetector(8)
    detector.activated_at, detector.groups, detector.ratio = 40, [0, 0, 0, 1, 1, 1, 2, 2], 0.5
    shares = [train.drive(cfg, 0.5, k, detector).share for k in (40, 45, 50, 60)]
    assert shares == pytest.approx([0, 0.25 * cfg.struct_share, 0.5 * cfg.struct_share, shares[2]])
    assert train.drive(cfg, 0.5, 60, detector).lam == pytest.approx(cfg.lambda0 / 4)


def test_the_settings_of_lambda_and_of_each_density_reach_the_step():
    detector = structure_reg.GroupDetector(8)
    cfg = Config(steps=100, lambda0=0.3, m=0.7, s=1.7, m_early=3.0, s_early=0.5, m_late=-1.0, s_late=2.5)
    driven = train.drive(cfg, 0.25, 50, detector)
    assert driven.lam == pytest.approx(0.225) and driven.density == sampler.LogitNormal(2.0, 1.0)
    constant = dataclasses.replace(cfg, guidance="constant", timesteps="constant")
    driven = train.drive(constant, 0.25, 50, detector)
    assert driven.lam == 0.3 and driven.density == sampler.LogitNormal(0.7, 1.7)


def test_the_structure_loss_has_the_weight_that_gives_it_its_share_and_none_while_that_is_unknown():
    """mu = share / ratio. Negative control: twice the ratio, half the weight."""
    cfg, detector = Config(steps=100, depth=8, structure="constant"), structure_reg.GroupDetector(8)
    unknown = train.drive(cfg, 0.0, 50, detector)
    assert (unknown.share, unknown.mu) == (cfg.struct_share, 0.0)
    weights = {}
    for ratio in (0.25, 0.5):
        detector.ratio = ratio
        driven = train.drive(cfg, 0.0, 50, detector)
        weights[ratio] = driven.mu
        assert driven.mu * ratio == pytest.approx(cfg.struct_share)
    assert weights[0.25] == 2 * weights[0.5]


def test_constant_structure_keeps_its_groups_by_depth_whatever_is_found_meanwhile():
    detector = structure_reg.GroupDetector(8)
    detector.activated_at, detector.groups = 0, [0, 1, 0, 1, 0, 1, 2, 2]
    by_depth = structure_reg.depth_groups(8, detector.G)
    for mode, groups in (("constant", by_depth), ("adaptive", detector.groups)):
        cfg = Config(steps=100, depth=8, structure=mode)
        assert train.drive(cfg, 0.8, 50, detector).groups == groups


GROUPS = [0, 1, 0, 1, 0, 1]


def structured(tiny, folder, r: dict, monkeypatch) -> list[dict]:
    """Log of a run that r {step: r} drives; its six blocks count as grouped by GROUPS whatever they hold."""
    monkeypatch.setattr(structure_reg, "group", lambda S, G=3: np.array(GROUPS))
    for test in ("axes_test", "depth_test"):
        monkeypatch.setattr(structure_reg, test, lambda *a: 0.005)
    monkeypatch.setattr(structure_reg, "MOVED", 0.0)
    lines = [json.dumps({"step": step, "r": value}) for step, value in r.items()]
    (folder / "r.jsonl").write_text("\n".join(lines) + "\n")
    run = train.train({**tiny, "task": "t2a", "depth": 6, "steps": 100, "eval_every": 100,
                       "regime": f"replay:{folder / 'r.jsonl'}", "out": str(folder / "run")})
    return step_rows(run)


def test_adaptive_structure_sets_in_once_groups_are_accepted_and_has_its_share(
        tiny, tmp_path, bare, monkeypatch):
    """At the first check after r has passed a half, here late, with the weight that gives q r of the
    flow-matching gradient."""
    rows = structured(tiny, tmp_path, {1: structure_reg.ACCEPT_FROM, 70: 0.8}, monkeypatch)
    checked = [row for row in rows if "structure" in row]
    accepted = [row["step"] for row in checked if row["structure"]["accepted"]]
    assert accepted == [row["step"] for row in checked if row["step"] >= 70] and len(accepted) > 1
    assert all(row["mu"] == 0 for row in rows if row["step"] <= accepted[0])
    measured = [row for row in rows if row.get("struct_share")]
    assert measured and rows[-1]["mu"] > 0 and rows[-1]["loss_struct"] > 0
    assert measured[-1]["struct_share"] == pytest.approx(0.8 * Config().struct_share, rel=0.8)


def test_negative_control_no_groups_are_accepted_while_the_network_acquires_semantics(
        tiny, tmp_path, bare, monkeypatch):
    rows = structured(tiny, tmp_path, {1: structure_reg.ACCEPT_FROM}, monkeypatch)
    checked = [row["structure"] for row in rows if "structure" in row]
    assert len(checked) >= 3 and checked[-1]["streak"] >= 3
    assert not any(found["accepted"] for found in checked)
    assert all(row["mu"] == 0 for row in rows)
    assert tiny["depth"] < structure_reg.TESTABLE, "shallower networks are not checked at all"


# --- what is measured ---------------------------------------------------------------------------------------

def test_agreement_is_measured_on_the_aligned_block_alone(tiny, tmp_path, bare, monkeypatch):
    """Block 2 of 3, by the identity of its parameters."""
    built, build, asked, agree = [], train.build_networks, [], guidance.gradient_agreement

    def kept(*a):
        built.append(build(*a))
        return built[-1]

    def noted(fm, ssl, params):
        asked.append([id(param) for param in params])
        return agree(fm, ssl, params)
    monkeypatch.setattr(train, "build_networks", kept)
    monkeypatch.setattr(guidance, "gradient_agreement", noted)
    train.train({**tiny, "task": "t2a", "depth": 3, "align_block": 2, "steps": 34, "eval_every": 34,
                 "out": str(tmp_path / "r")})
    block = [id(param) for param in built[0].model.blocks[1].parameters()]
    assert asked and all(params == block for params in asked)


def test_the_seconds_of_a_run_are_those_of_training_with_what_it_took_before_it_was_resumed():
    """Without previews and logs; wall clock with them."""
    timer = Timer()
    timer.seconds = {"forward": 3.0, "backward": 5.0, "log and evaluation": 100.0}
    run = types.SimpleNamespace(seconds_before=40.0, wall_before=1_000.0)
    assert train.Training.seconds(run, timer) == 48 and train.Training.wall(run, timer) == 1_108


def test_a_probe_before_which_all_steps_were_skipped_tells_nothing():
    run = types.SimpleNamespace(cfg=Config(structure="off"), regime=regime.Regime("loss", 100), probe=None,
                                step=38)
    train.measure(run, 1, ignore)
    assert run.regime.D == []
    run.regime.observe(torch.tensor(2.0))
    train.measure(run, 1, ignore)
    assert run.regime.D == [2.0]
