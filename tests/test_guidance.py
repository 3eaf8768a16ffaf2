"""Claims about SSL guidance: the loss, its decay, the teacher and how it was made."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import guidance as G
from model import Codec, log_mel

# --- the loss

def slow_loss(z, phi, mask):
    out = [1 - float(z[b, t] @ phi[b, t] / (z[b, t].norm() * phi[b, t].norm())) for b in range(z.shape[0]) for t in range(z.shape[1]) if mask[b, t]]
    return np.mean(out)


def test_the_alignment_loss_is_the_slow_loop_over_real_tokens():
    z, phi, mask = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.rand(3, 5) < 0.7
    assert abs(float(G.alignment_loss(z, phi, mask)) - slow_loss(z, phi, mask)) < 1e-5
    assert abs(float(G.alignment_loss(z, phi)) - slow_loss(z, phi, torch.ones(3, 5))) < 1e-5


def matching_features_cost_nothing() -> bool:
    phi = torch.randn(2, 4, 6)
    return abs(float(G.alignment_loss(3 * phi, phi))) < 1e-5 and abs(float(G.alignment_loss(-phi, phi)) - 2) < 1e-5


def test_the_alignment_loss_is_0_for_matching_and_2_for_opposite_features():
    assert matching_features_cost_nothing()


def test_negative_control_without_normalisation_matching_features_cost_something(monkeypatch):
    monkeypatch.setattr(G.F, "normalize", lambda x, dim, eps: x)
    assert not matching_features_cost_nothing()


def test_loss_and_gradient_are_those_of_torchs_cosine_similarity():
    z, phi = torch.randn(3, 5, 7, dtype=torch.float32, requires_grad=True), 3 * torch.randn(3, 5, 7)
    oracle = (1 - F.cosine_similarity(z, phi, dim=-1)).mean()
    assert torch.allclose(G.alignment_loss(z, phi), oracle, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(loss, z)[0] for loss in (G.alignment_loss(z, phi), oracle)), atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    phi, z = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    G.alignment_loss(z, phi).backward()
    assert phi.grad is None and z.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in G.load_teacher().parameters()) and not G.load_teacher().training


def test_the_loss_is_finite_for_zero_and_huge_half_precision_features():
    for z in (torch.zeros(1, 2, 8), torch.full((1, 2, 8), 6e4).half(), torch.full((1, 2, 8), 1e30).bfloat16()):
        z = z.requires_grad_()
        loss = G.alignment_loss(z, torch.randn(1, 2, 8))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_lambda_falls_from_lambda0_and_is_exactly_zero_past_its_end():
    values = [G.weight(r, 0.5, 2.0) for r in np.linspace(0, 1, 101)]
    assert values[0] == 0.5 and values == sorted(values, reverse=True) and abs(values[50] - 0.5 * 0.25) < 1e-12
    assert G.weight(G.OFF_AT, 0.5) > 0 and all(G.weight(r, 0.5) == 0 for r in (G.OFF_AT + 1e-9, 1.0))


def test_the_projector_draws_nothing_from_the_common_stream():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    a, b = G.Projector(8, 6, seed=0), G.Projector(8, 6, seed=1)
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(a.net[0].weight, b.net[0].weight) and torch.equal(a.net[0].weight, G.Projector(8, 6, seed=0).net[0].weight)


def test_gradient_agreement_is_the_cosine_of_the_gradients_and_leaves_none_behind():
    x, y = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    a, b = (x**2).sum() + y.sum(), (x**3).sum()  # b does not know y
    ga, gb = torch.cat([2 * x, torch.ones(3)]), torch.cat([3 * x**2, torch.zeros(3)])
    assert abs(G.gradient_agreement(a, b, [x, y]) - F.cosine_similarity(ga, gb, dim=0).item()) < 1e-5
    assert x.grad is None and abs(G.gradient_agreement(a, -a, [x, y]) + 1) < 1e-5
    a.backward()  # the graph is still alive


# --- the teacher

def test_the_shipped_weights_are_small():
    assert G.WEIGHTS.stat().st_size < 4e6


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="python guidance.py pretrain"):
        G.load_teacher(tmp_path / "none.safetensors")


def test_features_are_one_a_token_and_in_time_with_the_mel():
    """A change in mel frame f moves the features of token f // 2 most."""
    teacher, mel = G.load_teacher(), torch.full((1, 128, 64), -6.0)
    base = teacher(mel)
    assert base.shape == (1, 64, teacher.features)
    for frame in (20, 61, 100):
        other = mel.clone()
        other[:, frame, 10:40] = 0.0
        moved = (teacher(other) - base).norm(dim=-1)[0]
        assert abs(int(moved.argmax()) - frame // 2) <= 1


def test_the_ear_hears_latents_as_it_hears_their_mel_frames(waves):
    codec = Codec(32).fit(waves[:20])
    ear, x = G.Ear(codec, G.load_teacher()), torch.as_tensor(waves[:3])
    z = codec.encode(x)
    assert torch.equal(ear.encode(x), ear(z)) and torch.allclose(ear(z), ear.teacher(codec.decode_mel(z)))
    assert ear.tokens(40_960) == codec.tokens(40_960) and ear.key != codec.key
    assert G.Ear(Codec(16).fit(waves[:20]), G.load_teacher()).key != ear.key, "features of another codec must not be taken from its cache"


def test_the_teacher_beats_both_controls_on_soundworld_events():
    """Linear probe, paired over clips: the interval of the gain excludes 0. Negative control: a random network gains nothing over itself."""
    report = evaluate.probe_teacher(G.load_teacher(), None, clips=600, inits=1)["soundworld"]
    assert all(report[f"teacher - {k}"]["interval"][0] > 0 for k in ("mel statistics", "random initialisation"))
    torch.manual_seed(100)
    report = evaluate.probe_teacher(G.Teacher().eval(), None, clips=200, inits=1)["soundworld"]
    assert report["teacher - random initialisation"]["mean"] == 0


# --- its pretraining

def test_info_nce_is_the_slow_loop():
    """-log of the partner's share among all, both ways; rows of the same clip are left out of the denominator."""
    a, b, own, tau = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), 0.3
    cos = lambda i, j: float(F.cosine_similarity(a[i], b[j], dim=0)) / tau
    def slow(own):
        total = 0.0
        for i in range(6):
            rivals = [j for j in range(6) if j == i or own is None or own[i] != own[j]]
            total += 0.5 * (np.log(sum(np.exp(cos(i, j)) for j in rivals)) + np.log(sum(np.exp(cos(j, i)) for j in rivals))) - cos(i, i)
        return total / 6
    assert abs(float(G.info_nce(a, b, tau)) - slow(None)) < 1e-4 and abs(float(G.info_nce(a, b, tau, own)) - slow(own)) < 1e-4


def test_pretraining_is_deterministic_and_the_task_is_learnable():
    losses = {}
    for objective in ("contrastive", "masked"):
        teacher = G.pretrain(clips=64, steps=3, batch=16, objective=objective)
        again = G.pretrain(clips=64, steps=3, batch=16, objective=objective)
        assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), again.state_dict().values()))
        losses[objective] = teacher
    assert not torch.equal(losses["contrastive"].join.weight, losses["masked"].join.weight)
    bank = torch.from_numpy(data.RandomPatches(64).features(log_mel).copy()).float()  # the shipped teacher tells partners from strangers
    a, b = (F.normalize(G.pool(G.load_teacher()(bank[:, k])) - G.pool(G.load_teacher()(bank.flatten(0, 1))).mean(0), dim=1) for k in (0, 1))
    assert ((a @ b.T).argmax(1) == torch.arange(64)).float().mean() > 0.5


def test_random_patches_are_repeatable_audible_and_their_pairs_related():
    world, again = data.RandomPatches(40), data.RandomPatches(40)
    pairs = np.stack([world.pair(i) for i in range(40)])
    assert np.array_equal(pairs[7], again.pair(7)) and np.isfinite(pairs).all() and np.abs(pairs).max() <= 0.951
    assert np.sqrt((pairs**2).mean(-1)).min() > 1e-3 and not np.array_equal(pairs[:, 0], pairs[:, 1])
    mel = G.pool(log_mel(torch.from_numpy(pairs).flatten(0, 1))).reshape(40, 2, -1)
    apart = (mel[:, 0, None] - mel[None, :, 1]).norm(dim=-1)       # (40, 40)
    assert apart.diagonal().mean() < 0.75 * apart.mean()


def test_patches_know_nothing_of_soundworld():
    """No recipe, name or factor of the judged world is used: its synthesizers could be removed and every patch would be the same."""
    before = data.RandomPatches(4).pair(3)
    saved = {s.synth.__name__: s.synth for s in data.SOUNDS}
    try:
        for name in saved:
            delattr(data, name)
        assert np.array_equal(data.RandomPatches(4).pair(3), before)
    finally:
        for name, f in saved.items():
            setattr(data, name, f)
