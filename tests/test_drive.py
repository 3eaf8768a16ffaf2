"""Claims about train.drive: what the regime r and the settings make of lambda, the density and structure."""
import pytest

import structure_reg
import train
from parts.config import Config


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
