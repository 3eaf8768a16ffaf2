"""Claims about the interpolant, the loss, integration, guidance and the network."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as M
from model import DiT
from parts.text import Text


def dit(**settings) -> DiT:
    """A small network whose zero-initialised parts were shaken, so that every path carries signal."""
    torch.manual_seed(0)
    net = DiT(**{**dict(channels=6, width=32, depth=2, heads=2, vocab=20, cond=False), **settings})
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def two_captions(net, ids=((2, 3), (4, 0))) -> tuple:
    """Encoded captions, and as many empty ones."""
    return net.encode_text(torch.tensor(ids)), net.encode_text(torch.tensor([[1], [1]]))


# --- interpolant and loss

def test_velocity_and_point_recover_both_ends():
    """x0 = x_t - t v and eps = x_t + (1 - t) v."""
    x0, eps, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([0.0, 0.3, 1.0])
    x_t, v = M.interpolate(x0, eps, t)
    t = t[:, None, None]
    assert torch.allclose(x_t - t * v, x0, atol=1e-6) and torch.allclose(x_t + (1 - t) * v, eps, atol=1e-6)
    assert torch.equal(x_t[2], eps[2]) and torch.equal(x_t[0], x0[0]), "t = 1 is noise, t = 0 is data"


def test_gaussian_velocity_is_the_regression_of_v_on_x_t():
    """The oracle itself: E[v | x_t] by least squares over samples (it is linear for Gaussian data)."""
    generator, n = torch.Generator().manual_seed(0), 400_000
    normal = [torch.randn(n, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2)]
    x0, eps = 2 + 0.5 * normal[0], normal[1]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        x_t, v = M.interpolate(x0, eps, torch.full((n,), t, dtype=torch.float64))
        slope, intercept = np.polyfit(x_t.flatten().numpy(), v.flatten().numpy(), 1)
        exact = M.gaussian_velocity(ends, t, 2, 0.5).numpy()
        assert np.allclose(exact, [intercept, intercept + slope], atol=0.02)


def test_masked_loss_is_the_loss_of_the_real_tokens():
    v_hat, v = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    loss = M.flow_matching_loss(v_hat, v, mask)
    assert torch.allclose(loss[1], M.flow_matching_loss(v_hat[1:, :4], v[1:, :4])[0])
    assert torch.allclose(loss[0], M.flow_matching_loss(v_hat, v)[0])


def test_predictions_leave_out_the_dropped_conditions_on_request():
    net, ids, drop = dit(), torch.tensor([[2, 3], [4, 5]]), torch.tensor([True, False])
    x0, eps, t = torch.randn(2, 9, 6), torch.randn(2, 9, 6), torch.tensor([0.2, 0.7])
    batch = {"x0": x0, "eps": eps, "t": t, "drop": drop, "ids": ids}
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * eps
    for leave_out in (True, False):
        v_hat, hs, v = M.predict(net, batch, drop=leave_out)
        text = net.encode_text(ids, drop if leave_out else None)
        assert torch.equal(v_hat, net(x_t, t, text)) and torch.equal(v, eps - x0) and len(hs) == 3
    assert not torch.allclose(M.predict(net, batch)[0][0], M.predict(net, batch, drop=False)[0][0], atol=1e-3)


# --- integration

def error_of(steps, method, sign=1.0) -> float:
    """Mean error of the solution: for Gaussian data it is x0 = mu + sigma x1."""
    x1 = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0))
    out = M.integrate(lambda x, t: sign * M.gaussian_velocity(x, t, 2, 0.5), x1, steps, method)
    return float((out - (2 + 0.5 * x1)).abs().mean())


def test_euler_is_first_and_heun_second_order_on_the_exact_field():
    """For Gaussian data the flow's solution is x0 = mu + sigma x1, so the error is known."""
    assert 1.7 < error_of(20, "euler") / error_of(40, "euler") < 2.3
    assert 3.0 < error_of(20, "heun") / error_of(40, "heun") < 5.0
    assert error_of(40, "heun") < 1e-3


def test_negative_control_a_flipped_velocity_misses_the_data():
    assert error_of(40, "euler", sign=-1.0) > 1


# --- the network

@torch.no_grad()
def test_a_block_without_words_is_what_is_written_by_hand():
    """adaLN on both branches, normalised and rotated queries and keys of each head, gates."""
    block = dit().blocks[0]
    h, c = torch.randn(2, 9, 32), torch.randn(2, 32)
    block.ada.weight.normal_(0, 0.1)
    heads, d = block.heads, 32 // block.heads
    angle = torch.arange(9)[:, None] * 100.0 ** (-2 * torch.arange(d // 2) / d)
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        (c @ block.ada.weight.T + block.ada.bias)[:, None].chunk(6, -1))

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x, weight):
        a, b = (norm(x) * weight).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    q, k, v = block.qkv(norm(h) * (1 + scale1) + shift1).chunk(3, -1)
    mixed = []
    for n in range(heads):
        own = slice(n * d, (n + 1) * d)
        scores = turned(q[..., own], block.q_norm.weight) @ turned(k[..., own], block.k_norm.weight).mT
        mixed.append((scores / d**0.5).softmax(-1) @ v[..., own])
    expected = h + gate1 * block.out(torch.cat(mixed, -1))
    expected = expected + gate2 * block.mlp(norm(expected) * (1 + scale2) + shift2)
    assert torch.allclose(block(h, c, M.rope_table(9, d, "cpu")), expected, atol=1e-4)


@torch.no_grad()
def test_attention_to_words_by_hand():
    """Their keys are normalised by a layer of their own and not rotated; words that pad do not count."""
    block, h, rope = dit().blocks[0], torch.randn(2, 9, 32), M.rope_table(9, 16, "cpu")
    text = Text(torch.randn(2, 3, 32), torch.tensor([[True] * 3, [True] * 2 + [False]]), torch.randn(2, 32))
    q, k, v, text_k, text_v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (
        *block.qkv(h).chunk(3, -1), *block.text_kv(text.tokens).chunk(2, -1)))
    k = torch.cat([M.rotate(block.k_norm(k), rope), block.text_norm(text_k)], 2)
    scores = M.rotate(block.q_norm(q), rope) @ k.mT / 16**0.5
    scores[1, :, :, -1] = -torch.inf
    mixed = (scores.softmax(-1) @ torch.cat([v, text_v], 2)).transpose(1, 2).flatten(2)
    assert torch.allclose(block.attend(h, rope, text, None), block.out(mixed), atol=1e-5)


@torch.no_grad()
def test_the_velocity_by_hand_from_what_the_blocks_put_out():
    """v_hat = ((2t - 1) x_t / std_t + y) / std_t, y the head's of the last block under adaLN, whose input is
    SiLU of time and caption."""
    net, x, t = dit(), torch.randn(2, 9, 6), torch.tensor([0.3, 0.8])
    text = net.encode_text(torch.tensor([[2, 3], [4, 5]]))
    v_hat, hs = net(x, t, text, return_blocks=True)
    c, rope = F.silu(net.time(net.time_features(t)) + text.pooled), M.rope_table(9, 16, "cpu")
    for block, before, after in zip(net.blocks, hs, hs[1:]):
        assert torch.allclose(block(before, c, rope, text), after, atol=1e-5)
    shift, scale = net.ada(c)[:, None].chunk(2, -1)
    y = net.head(F.layer_norm(hs[-1], (32,), eps=1e-6) * (1 + scale) + shift)
    t = t[:, None, None]
    std_t = ((1 - t) ** 2 + t**2).sqrt()
    assert torch.allclose(v_hat, ((2 * t - 1) * x / std_t + y) / std_t, atol=1e-5)


def test_features_of_time_and_place_have_the_frequencies_that_are_stated():
    """Time: 1 to 1,000 radians over [0, 1]; place: wavelengths from 4 to 1,000 tokens."""
    time, place = DiT.time_features(torch.tensor([0.3]))[0], DiT.place_features(1_001, "cpu")
    assert time[[0, 127, 128, 255]].tolist() == pytest.approx(
        [np.cos(0.3), np.cos(300), np.sin(0.3), np.sin(300)], abs=1e-3)
    assert place[[1, 2, 4], 0].tolist() == pytest.approx([0, -1, 1], abs=1e-4)
    assert place[[250, 500, 1_000], 31].tolist() == pytest.approx([0, -1, 1], abs=1e-3)
    assert place[[1, 250], [32, 63]].tolist() == pytest.approx([1, 1], abs=1e-3), "sines"


@torch.no_grad()
def test_a_caption_enters_by_its_pooled_vector_and_by_its_words():
    net, x, t = dit(), torch.randn(2, 9, 6), torch.tensor([0.3, 0.7])
    text, other = (net.encode_text(torch.tensor(ids)) for ids in ([[2, 3], [4, 5]], [[5, 4], [3, 2]]))
    v = net(x, t, text)
    assert not torch.allclose(net(x, t, text._replace(pooled=other.pooled)), v, atol=1e-3)
    assert not torch.allclose(net(x, t, text._replace(tokens=other.tokens)), v, atol=1e-3)


@torch.no_grad()
def test_the_noise_level_reaches_the_blocks():
    """Of inputs that are equal to the embedding (x_t / std_t) at both levels."""
    net, x = dit(), torch.randn(2, 9, 6)
    hidden = []
    for level in (0.3, 0.4):
        std_t = ((1 - level) ** 2 + level**2) ** 0.5
        hidden.append(net(std_t * x, torch.full((2,), level), return_blocks=True)[1])
    assert torch.allclose(hidden[0][0], hidden[1][0], atol=1e-5)
    assert (hidden[0][2] - hidden[1][2]).abs().max() > 1e-3


# --- guidance

def test_guidance_scale_one_is_the_conditional_network_bitwise():
    net, x = dit(), torch.randn(2, 9, 6)
    text, null = two_captions(net)
    with torch.no_grad():
        field = M.VelocityField(net, text, null, w=1.0)
        assert torch.equal(field(x, 0.7), net(x, torch.full((2,), 0.7), text))


def test_guidance_is_linear_between_null_and_condition():
    """v = v_null + w (v_cond - v_null): w = 0 is unconditional, and the line is straight."""
    net, x = dit(), torch.randn(2, 9, 6)
    text, null = two_captions(net, ((2, 3, 5), (4, 0, 0)))
    v = {w: M.VelocityField(net, text, null, w=w)(x, 0.7) for w in (0.0, 1.0, 3.0)}
    assert torch.allclose(v[0.0], net(x, torch.full((2,), 0.7), null), atol=1e-5)
    assert torch.allclose(v[3.0], v[0.0] + 3 * (v[1.0] - v[0.0]), atol=1e-5)
    assert (v[1.0] - v[0.0]).abs().max() > 1e-3, "the condition must matter, or this test shows nothing"


@torch.no_grad()
@torch.no_grad()
def test_guidance_by_a_band_limited_input_is_linear_between_null_and_condition():
    net, t = dit(vocab=0, cond=True), torch.full((2,), 0.7)
    x, cond = torch.randn(2, 2, 9, 6)
    v_null, v_cond = net(x, t), net(x, t, cond=cond)
    assert (v_null - v_cond).abs().max() > 1e-2, "the condition must matter, or this test shows nothing"
    for w in (0.0, 1.0, 3.0):
        v = M.VelocityField(net, cond=cond, w=w)(x, 0.7)
        assert torch.allclose(v, v_null + w * (v_cond - v_null), atol=1e-5)


def test_rescaled_guidance_is_finite_where_no_noise_is_left():
    """Heun's second evaluation of the last step is at t = 0, where x0_hat of both branches is x_t itself."""
    net, x = dit(), torch.randn(2, 9, 6)
    text, null = two_captions(net)
    assert M.integrate(M.VelocityField(net, text, null, w=4.0, rescale=1.0), x, 4, "heun").isfinite().all()


@torch.no_grad()
def test_rescaled_guidance_has_the_spread_of_the_conditional_branch():
    """At 1 the std of x0_hat is the conditional branch's, halfway at 0.5; at 0 nothing happens, bitwise."""
    net, x, t = dit(), torch.randn(2, 9, 6), 0.7
    text, null = two_captions(net)

    def spread(w, **settings):
        return (x - t * M.VelocityField(net, text, null, w=w, **settings)(x, t)).flatten(1).std(1)

    own, free = spread(1.0), spread(6.0)
    assert (free / own - 1).abs().min() > 0.005, "guidance must change the spread, or this shows nothing"
    assert torch.allclose(spread(6.0, rescale=1.0), own, rtol=1e-3)
    assert torch.allclose(spread(6.0, rescale=0.5), (own + free) / 2, rtol=1e-3)
    assert torch.equal(spread(6.0, rescale=0.0), free)


@torch.no_grad()
def test_without_guidance_there_is_nothing_to_rescale():
    """w = 0 is the unconditional velocity whatever the caption, w between 0 and 1 a mixture."""
    net, x, t = dit(), torch.randn(2, 9, 6), 0.7
    text, null = two_captions(net)
    other = type(text)(*(y.flip(0) for y in text))

    def v(w, of=text, rescale=1.0):
        return M.VelocityField(net, of, null, w=w, rescale=rescale)(x, t)
    assert (v(0.0) - v(0.0, other)).abs().max() < 1e-5
    assert (v(0.0) - net(x, torch.full((2,), t), null)).abs().max() < 1e-5
    assert torch.equal(v(0.5), v(0.5, rescale=0.0))
    assert (v(2.0) - v(2.0, rescale=0.0)).abs().max() > 1e-3, "negative control: above 1 it acts"


# --- windows

def local_field(x, t, text=None, cond=None, mask=None, drop=None):
    """A network without memory over time."""
    return 2 * x + cond


def test_windows_average_to_the_field_where_it_is_local():
    """A field without memory over time is the same with and without windows; one window is exactly no
    window."""
    x, cond = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    for window in (16, 17, 50):
        v = M.VelocityField(local_field, cond=cond, window=window)(x, 0.5)
        assert torch.allclose(v, 2 * x + cond, atol=1e-5)


def test_each_window_is_evaluated_with_the_caption_of_its_clip():
    x = torch.randn(2, 50, 3)
    text, null = (Text(torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), torch.randn(2, 3))
                  for _ in range(2))

    def net(x, t, text=None, cond=None, mask=None, drop=None):
        return 2 * x + text.pooled[:, None]
    for w in (1.0, 3.0):
        windowed, whole = (M.VelocityField(net, text, null, w=w, window=n)(x, 0.5) for n in (16, 50))
        assert torch.allclose(windowed, whole, atol=1e-5)


# --- network

def test_a_fresh_network_is_exact_for_unit_gaussian_data_and_its_blocks_are_the_identity():
    net, x = DiT(channels=6, width=32, depth=3, heads=2, vocab=20), torch.randn(2, 9, 6)
    for t in (0.0, 0.3, 1.0):
        text = net.encode_text(torch.tensor([[2], [3]]))
        v, hs = net(x, torch.full((2,), t), text, return_blocks=True)
        assert torch.allclose(v, M.gaussian_velocity(x, t, 0, 1), atol=1e-6)
        assert len(hs) == 4 and all(torch.equal(hs[0], h) for h in hs)


def test_a_fresh_network_has_words_far_apart_and_sharp_text_logits():
    """Embeddings of deviation 0.5; keys of words are scaled by 3 (ASSUMED: results/log.md)."""
    net = DiT(channels=6, width=128, depth=2, heads=2, vocab=200)
    assert net.text.embed.weight.std().item() == pytest.approx(0.5, rel=0.05)
    for block in net.blocks:
        assert (block.text_norm.weight == 3).all() and (block.k_norm.weight == 1).all()


def test_block_outputs_on_request_change_nothing():
    net, x, t = dit(vocab=0), torch.randn(2, 9, 6), torch.rand(2)
    v, hs = net(x, t, return_blocks=True)
    assert torch.equal(v, net(x, t)) and hs[0].shape == (2, 9, 32)


def test_block_weights_are_those_that_read_and_write_the_stream():
    """A single token attends to itself alone: what a block's attention adds is W_O W_V h."""
    net, h = dit(vocab=0), torch.randn(1, 1, 32)
    assert len(M.block_weights(net)) == 2
    for block, (wo, wv, w1, w2, c) in zip(net.blocks, M.block_weights(net)):
        nothing = torch.zeros_like(h)
        rope = M.rope_table(1, 16, "cpu")
        attended = block.attend(h, rope, None, None) - block.attend(nothing, rope, None, None)
        assert torch.allclose(attended, h @ (wo @ wv).T, atol=1e-5)
        assert w1 is block.mlp[0].weight and w2 is block.mlp[2].weight and c is block.ada.weight


def test_padded_tokens_are_not_attended_to():
    net, x, t = dit(), torch.randn(1, 9, 6), torch.tensor([0.4])
    text = net.encode_text(torch.tensor([[2, 3]]))
    mask = torch.tensor([[True] * 6 + [False] * 3])
    other = x.clone()
    other[:, 6:] = 99
    v = net(x, t, text, mask=mask)[:, :6]
    assert torch.allclose(v, net(other, t, text, mask=mask)[:, :6], atol=1e-5)
    assert torch.allclose(v, net(x[:, :6], t, text), atol=1e-5)


@torch.no_grad()
def test_equal_tokens_at_different_places_give_different_outputs():
    """Equal tokens at all places: relative positions alone give equal outputs; with the place features each
    differs."""
    net, x, t = dit(), torch.randn(1, 1, 6).expand(1, 9, 6), torch.full((1,), 0.7)

    def spread():
        return (net(x, t) - net(x, t)[:, :1]).abs().max()

    assert spread() > 1e-3
    net.place.weight.zero_()
    assert spread() < 1e-5, "negative control: without them a token can't tell"


def test_dropped_condition_is_the_null_condition():
    net, x, t = dit(vocab=0, cond=True), torch.randn(2, 9, 6), torch.rand(2)
    cond, drop = torch.randn(2, 9, 6), torch.tensor([True, False])
    half = net(x, t, cond=cond, drop=drop)
    assert torch.equal(half[0], net(x, t)[0]) and torch.equal(half[1], net(x, t, cond=cond)[1])
