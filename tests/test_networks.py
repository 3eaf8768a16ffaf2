"""Claims about what learns: accumulation, checkpointing, the average, what is saved."""
import numpy as np
import pytest
import torch

import data
import evaluate
import model
import regime
import sampler
import train
from lab.estimate import saved_bytes
from parts.config import Config
from parts.errors import UserError
from parts.text import Words

SMALL = dict(device="cpu", precision="fp32", task="sr", width=32, depth=2, heads=2, channels=8, batch=4,
             align_block=1)


def networks_of(**settings):
    return train.build_networks(Config(**{**SMALL, **settings}), None, 6, torch.zeros(6))


def batch_of(seed=0, clips=4):
    """A random batch of networks_of(): x0, eps, cond (B, 16, 8), phi (B, 16, 6)."""
    torch.manual_seed(seed)
    latents = {name: torch.randn(clips, 16, 8) for name in ("x0", "eps", "cond")}
    drop = torch.zeros(clips, dtype=torch.bool)
    return {**latents, "t": torch.rand(clips), "drop": drop, "phi": torch.randn(clips, 16, 6)}


GUIDED = train.Driven(lam=0.5, density=sampler.LogitNormal(), share=0.0, mu=0.0, groups=[0, 1])
PLAIN = GUIDED._replace(lam=0.0)


def one_step(networks, k):
    """Step k with guidance and without the structure loss."""
    loss = train.losses(networks.cfg, networks, batch_of(k), k, GUIDED)
    loss["total"].backward()
    return train.update(networks.cfg, networks, k)


def gradient_of(networks, parts) -> torch.Tensor:
    networks.model.zero_grad()
    for part in parts:
        (train.losses(networks.cfg, networks, part, 1, GUIDED)["total"] / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in networks.model.parameters() if p.grad is not None])


def test_clips_of_fewer_tokens_than_take_turns_are_guided_at_every_step():
    networks, batch = networks_of(guide_every=8), batch_of()
    short = {name: x[:, :3] if x.ndim == 3 else x for name, x in batch.items()}
    for k in range(8):
        assert 0 < train.losses(networks.cfg, networks, short, k, GUIDED)["ssl"].item() < 2


@pytest.mark.parametrize("others", [{"optimizer": "adamw"}, {"guidance": "off"}])
def test_optimizers_of_other_settings_are_refused_by_the_folder(others):
    """As a config.json that was changed by hand asks for them."""
    state = networks_of().state_dict()
    networks = networks_of(**others)
    if others.get("guidance"):
        networks = train.build_networks(networks.cfg, None)
    with pytest.raises(UserError, match="runs/x: its optimizers are of other settings than config.json's"):
        networks.load(state, "runs/x")


def test_parts_of_a_batch_of_unequal_clips_give_its_gradient_with_guidance_on(monkeypatch):
    """Clips of 3 to 16 tokens: each weighs the same, in whatever part it is."""
    networks, batch = networks_of(batch=8), batch_of(1, clips=8)
    T = batch["x0"].shape[1]
    lengths = torch.tensor([3, T, 5, T // 2, T, 4, 7, T])
    batch["mask"] = torch.arange(T) < lengths[:, None]
    whole = gradient_of(networks, [batch])
    assert distance_of(gradient_of(networks, data.split_batch(batch, 4)), whole) < 1e-6

    def over_tokens(z, phi, mask):
        each = 1 - torch.cosine_similarity(z, phi, dim=-1)
        return (each * mask).sum() / mask.sum()
    monkeypatch.setattr(train.guidance, "alignment_loss", over_tokens)
    wrong = gradient_of(networks, data.split_batch(batch, 4)), gradient_of(networks, [batch])
    assert distance_of(*wrong) > 1e-3, "negative control: a mean over the tokens of a part"


def everywhere(networks, std=0.1):
    """Networks whose blocks all do something: adaLN is 0 at first, and so is what a block adds."""
    torch.manual_seed(1)
    for net in (networks.model, networks.ema):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=std)
    return networks


@pytest.mark.parametrize("teacher", ["tiny", "shuffled"])
def test_guidance_is_of_every_fourth_token_of_one_block_and_the_centred_features_of_its_clip(teacher):
    """Against a loop over clips and tokens, at step 2; the control's features are another clip's."""
    networks = everywhere(networks_of(depth=4, align_block=2, teacher=teacher))
    networks.phi_mean = torch.randn(6)
    batch, each = batch_of(1), []
    found = train.losses(networks.cfg, networks, batch, 2, GUIDED)
    _, hs, _ = model.predict(networks.model, batch)
    for clip in range(4):
        for token in range(2, 16, 4):
            z = networks.projector(hs[2][clip, token])
            phi = batch["phi"][clip - (teacher == "shuffled"), token] - networks.phi_mean
            each.append(1 - torch.cosine_similarity(z, phi, dim=0).item())
    assert found["ssl"].item() == pytest.approx(np.mean(each), rel=1e-4)
    assert found["total"].item() == pytest.approx((found["fm"] + 0.5 * found["ssl"]).item(), rel=1e-6)


def test_what_stands_at_padded_tokens_changes_no_loss_and_no_measurement():
    """Negative control: without the mask each of them changes."""
    networks = everywhere(networks_of())
    mask = torch.arange(16) < torch.tensor([5, 16, 9, 12])[:, None]
    driven = GUIDED._replace(share=0.1, mu=1.0)

    def measured(seed, masked):
        """With other numbers at padded tokens for each seed."""
        batch = batch_of(1)
        torch.manual_seed(seed)
        for name in ("x0", "eps", "cond", "phi"):
            batch[name] = torch.where(mask[..., None], batch[name], torch.randn_like(batch[name]))
        if masked:
            batch["mask"] = mask
        loss = train.losses(networks.cfg, networks, batch, 2, driven)
        probe = regime.Probe(batch, torch.nn.Identity(), None, "latent")
        D = probe(model.conditioned(networks.ema, batch))["D"]
        return [*(loss[name].item() for name in ("fm", "ssl", "struct")), D,
                *evaluate.validation_loss(networks.ema, [batch], 2)]
    assert np.allclose(measured(2, True), measured(3, True), rtol=1e-5)
    assert not np.isclose(measured(2, False), measured(3, False), rtol=1e-5).any()


def test_a_probe_of_padded_clips_is_not_moved_by_what_the_network_makes_of_padding():
    """With features that depend on neighbouring tokens, as a teacher's do. Negative control: without mask."""
    networks, batch = everywhere(networks_of()), batch_of(1)
    mask = torch.arange(16) < torch.tensor([5, 16, 9, 12])[:, None]

    def extract(x):                                            # each feature: a mean over seven tokens
        return torch.nn.functional.avg_pool1d(x.mT, 7, 1, 3).mT

    def measured(seed, **masked):
        noise = torch.randn(batch["eps"].shape, generator=torch.Generator().manual_seed(seed))
        eps = torch.where(mask[..., None], batch["eps"], noise)
        predict = model.conditioned(networks.ema, {**batch, **masked})
        return regime.probe(predict, extract, batch["x0"], eps, **masked)["t0.9"]
    assert np.isclose(measured(2, mask=mask), measured(3, mask=mask), rtol=1e-5)
    assert not np.isclose(measured(2), measured(3), rtol=1e-5)


def test_the_validation_loss_is_the_mean_over_clips_at_ten_noise_levels_with_the_condition():
    networks, by_t = everywhere(networks_of()), []
    batches = [batch_of(1), {**batch_of(2), "drop": torch.ones(4, dtype=torch.bool)}]
    for t in np.arange(0.05, 1, 0.1):
        each = []
        for batch in batches:
            level = torch.full((4,), t, dtype=torch.float32)
            x_t = (1 - level[:, None, None]) * batch["x0"] + level[:, None, None] * batch["eps"]
            v_hat = networks.ema(x_t, level, None, batch["cond"])
            each += list((v_hat - (batch["eps"] - batch["x0"])).square().mean((1, 2)))
        by_t.append(float(torch.stack(each).mean()))
    found = evaluate.validation_loss(networks.ema, batches)
    assert found == pytest.approx(by_t, rel=1e-4) and len(set(found)) == 10


def test_each_optimizer_cools_from_a_rate_of_its_own():
    networks = networks_of(lr=1e-3, muon_lr=3e-3, steps=100, warmup=4, cool=0.2)
    for k, factor in ((2, 0.5), (50, 1.0), (91, 10 / 21), (100, 1 / 21)):
        one_step(networks, k)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in networks.model_optimizers]
        assert rates == pytest.approx([1e-3 * factor, 3e-3 * factor]), k


def distance_of(a, b) -> float:
    return float((a - b).norm() / b.norm())


def test_checkpointing_saves_less_and_changes_no_gradient():
    torch.manual_seed(0)
    net = model.DiT(8, 32, 4, 2, vocab=20)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, ids = torch.randn(4, 32, 8), torch.rand(4), torch.randint(1, 20, (4, 6))

    def loss():
        return net(x, t, net.encode_text(ids)).square().mean()

    gradients, saved = {}, {}
    for on in (False, True):
        net.checkpointing = on
        saved[on] = saved_bytes(loss)
        net.zero_grad()
        loss().backward()
        gradients[on] = [p.grad.clone() for p in net.parameters()]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[False], gradients[True]))
    assert saved[True] < 0.6 * saved[False]


def test_checkpointing_and_the_optimizer_are_those_of_the_settings():
    plain, other = networks_of(), networks_of(checkpointing=True, optimizer="adamw")
    assert other.model.checkpointing and not plain.model.checkpointing
    kinds = [type(o).__name__ for o in plain.optimizers]
    assert kinds == ["AdamW", "Muon", "AdamW"], "the last: projector"
    assert [type(o).__name__ for o in other.optimizers] == ["AdamW", "AdamW"]
    owned = [p for o in plain.optimizers for group in o.param_groups for p in group["params"]]
    learning = [*plain.model.parameters(), *plain.projector.parameters()]
    assert sorted(map(id, owned)) == sorted(map(id, learning))


def test_the_average_is_a_ramped_ema_of_the_weights_and_is_not_trained():
    """Against the recursion written down again, 30 steps. Negative control: without the ramp."""
    networks = networks_of()
    name = "blocks.0.qkv.weight"
    weight, average = networks.model.state_dict()[name], networks.ema.state_dict()[name]
    expected, unramped = average.clone().double(), average.clone().double()
    for k in range(1, 31):
        one_step(networks, k)
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * weight
        unramped = 0.9999 * unramped + 0.0001 * weight
    assert torch.allclose(average, expected.float(), atol=1e-6)
    assert not torch.allclose(average, unramped.float(), atol=1e-4)
    assert not any(p.requires_grad for p in networks.ema.parameters()) and not networks.ema.training


def test_a_short_memory_of_the_average_is_that_of_the_settings():
    networks = networks_of(ema=0.5)
    weight = networks.model.state_dict()["blocks.0.qkv.weight"]
    average = networks.ema.state_dict()["blocks.0.qkv.weight"]
    expected = average.clone()
    for k in range(1, 21):
        one_step(networks, k)
        expected = torch.lerp(weight, expected, min(0.5, (1 + k) / (10 + k)))
    assert torch.allclose(average, expected, atol=1e-6)


def test_the_projector_is_neither_warmed_up_nor_cooled_nor_part_of_the_clipped_norm():
    networks = networks_of(cool=0.2, warmup=10, steps=100)
    for k in (1, 50, 100):
        total = train.losses(networks.cfg, networks, batch_of(k), k, GUIDED)["total"]
        total.backward()
        own = torch.stack([p.grad.norm() for p in networks.model.parameters() if p.grad is not None]).norm()
        assert train.update(networks.cfg, networks, k) == pytest.approx(float(own), rel=1e-5)
        assert networks.optimizers[-1].param_groups[0]["lr"] == networks.cfg.lr


def test_a_step_without_a_finite_gradient_moves_nothing():
    networks = networks_of()
    one_step(networks, 1)
    before = {name: weight.clone() for name, weight in networks.model.state_dict().items()}
    batch = batch_of()
    batch["x0"][0, 0, 0] = float("nan")
    train.losses(networks.cfg, networks, batch, 2, PLAIN)["total"].backward()
    assert not np.isfinite(train.update(networks.cfg, networks, 2))
    assert all(torch.equal(weight, before[name]) for name, weight in networks.model.state_dict().items())
    one_step(networks, 3)
    after = networks.model.state_dict()
    moved = any(not torch.equal(after[name], before[name]) for name in before)
    assert moved, "negative control: a finite one moves weights"


def test_plain_networks_are_the_same_ones_called_without_a_wrapper():
    """What torch.compile or several devices wrap is called as it is; weights, average and optimizers are
    shared, so losses and gradients are those of the networks themselves."""
    networks = networks_of(compile=True)
    assert networks.net is not networks.model, "negative control: it is wrapped"
    networks.project = torch.nn.Sequential(networks.projector)
    plain = networks.plain()
    assert plain.net is networks.model and plain.project is networks.projector
    assert networks.net is not plain.net and networks.project is not plain.project, "left alone"
    for name in ("model", "ema", "projector", "optimizers", "model_optimizers", "phi_mean", "cfg"):
        assert getattr(plain, name) is getattr(networks, name)


def test_neutral_plain_changes_no_bit_of_a_loss_or_gradient():
    found = []
    for change in (lambda same: same, train.Networks.plain):
        networks = networks_of()
        one_step(networks, 1)
        loss = train.losses(networks.cfg, change(networks), batch_of(2), 2, GUIDED)
        loss["total"].backward()
        learning = [*networks.model.parameters(), *networks.projector.parameters()]
        found.append((loss["total"], [p.grad for p in learning if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][1]) == len(found[1][1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_networks_go_on_from_their_state_as_if_they_had_never_stopped(tmp_path):
    straight = networks_of()
    for k in (1, 2):
        one_step(straight, k)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = networks_of()
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True), "run")
    for networks in (straight, resumed):
        one_step(networks, 3)
    a, b = straight.state_dict(), resumed.state_dict()
    for part in ("model", "ema", "projector"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])


def test_weights_of_another_shape_are_refused_with_the_folder():
    other = networks_of(width=64).state_dict()
    with pytest.raises(UserError, match="^runs/x: its weights are those of another model"):
        networks_of().load(other, "runs/x")


def test_bfloat16_is_used_where_the_settings_say_so():
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        networks = networks_of(precision=precision)
        with networks.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind
    assert networks_of().lr == Config().lr


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_multiplies_in_the_precision_of_the_settings(precision, dtype):
    """In bfloat16 on a processor that must emulate it, three quarters of a step were Muon's."""
    assert networks_of(precision=precision).model_optimizers[1].dtype == dtype


def test_captions_build_a_network_that_reads_them():
    words = Words.fit(["a low bell", "rain"])
    cfg = Config(**{**SMALL, "task": "t2a"})
    networks = train.build_networks(cfg, words)
    assert networks.projector is None and networks.state_dict()["projector"] == {}
    encode = networks.model.encode_text
    assert not torch.allclose(*(encode(words.encode([x])).pooled for x in ("rain", "a low bell")), atol=1e-3)
    again = train.build_networks(cfg, words)
    for a, b in zip(networks.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b), "initial weights are a function of the seed"


def test_a_network_that_cannot_be_compiled_runs_as_it_is_and_one_line_says_so(monkeypatch, capsys):
    """Out of memory is no reason to go on."""
    def broken(net, **how):
        def fail(*args):
            raise RuntimeError("no compiler\nand a page of details")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    networks, plain = networks_of(compile=True), networks_of()
    for k in (1, 2):
        one_step(networks, k)
        one_step(plain, k)
    a, b = networks.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    said = capsys.readouterr().out
    assert said.count("can't be compiled here (no compiler)") == 1 and len(said.splitlines()) == 1

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    networks.net.compiled = full
    with pytest.raises(torch.OutOfMemoryError):
        one_step(networks, 3)
