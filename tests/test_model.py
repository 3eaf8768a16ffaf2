"""Claims about the latent space, the network, the loss and generation."""
import numpy as np
import pytest
import scipy.optimize
import torch
import torchaudio

import model as M
from model import Codec, DiT, Words


def dit(**k) -> DiT:
    """A small network whose zero-initialised parts were shaken, so that every path carries signal."""
    torch.manual_seed(0)
    net = DiT(**{**dict(channels=6, width=32, depth=2, heads=2, vocab=20, cond=False), **k})
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


# --- interpolant and loss

def test_velocity_and_point_recover_both_ends():
    """x0 = x_t - t v and eps = x_t + (1 - t) v."""
    x0, eps, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([0.0, 0.3, 1.0])
    x_t, v = M.interpolate(x0, eps, t)
    tt = t[:, None, None]
    assert torch.allclose(x_t - tt * v, x0, atol=1e-6) and torch.allclose(x_t + (1 - tt) * v, eps, atol=1e-6)
    assert torch.equal(x_t[2], eps[2]) and torch.equal(x_t[0], x0[0]), "t = 1 is noise, t = 0 is data"


def test_gaussian_velocity_is_the_regression_of_v_on_x_t():
    """The oracle itself: E[v | x_t] by least squares over samples (it is linear for Gaussian data)."""
    g = torch.Generator().manual_seed(0)
    x0, eps = 2 + 0.5 * torch.randn(400_000, 1, 1, generator=g, dtype=torch.float64), torch.randn(400_000, 1, 1, generator=g, dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        x_t, v = M.interpolate(x0, eps, torch.full((400_000,), t, dtype=torch.float64))
        slope, intercept = np.polyfit(x_t.flatten().numpy(), v.flatten().numpy(), 1)
        probe = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert np.allclose(M.gaussian_velocity(probe, t, 2, 0.5).numpy(), [intercept, intercept + slope], atol=0.02)


def test_masked_loss_is_the_loss_of_the_real_tokens():
    v_hat, v = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    loss = M.flow_matching_loss(v_hat, v, mask)
    assert torch.allclose(loss[1], M.flow_matching_loss(v_hat[1:, :4], v[1:, :4])[0])
    assert torch.allclose(loss[0], M.flow_matching_loss(v_hat, v)[0])


# --- integration and guidance

def _error(steps, method, sign=1.0):
    x1 = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0))
    out = M.integrate(lambda x, t: sign * M.gaussian_velocity(x, t, 2, 0.5), x1, steps, method)
    return float((out - (2 + 0.5 * x1)).abs().mean())


def test_euler_is_first_and_heun_second_order_on_the_exact_field():
    """For Gaussian data the flow's solution is x0 = mu + sigma x1, so the error is known."""
    assert 1.7 < _error(20, "euler") / _error(40, "euler") < 2.3
    assert 3.0 < _error(20, "heun") / _error(40, "heun") < 5.0
    assert _error(40, "heun") < 1e-3


def test_negative_control_a_flipped_velocity_misses_the_data():
    assert _error(40, "euler", sign=-1.0) > 1


def test_guidance_scale_one_is_the_conditional_network_bitwise():
    net, x = dit(), torch.randn(2, 9, 6)
    text, null = net.encode_text(torch.tensor([[2, 3], [4, 0]])), net.encode_text(torch.tensor([[1], [1]]))
    with torch.no_grad():
        assert torch.equal(M.velocity_field(net, text, null, w=1.0)(x, 0.7), net(x, torch.full((2,), 0.7), text))


def test_guidance_is_linear_between_null_and_condition():
    """v = v_null + w (v_cond - v_null): w = 0 is unconditional, and the line is straight."""
    net, x = dit(), torch.randn(2, 9, 6)
    text, null = net.encode_text(torch.tensor([[2, 3, 5], [4, 0, 0]])), net.encode_text(torch.tensor([[1], [1]]))
    v = {w: M.velocity_field(net, text, null, w=w)(x, 0.7) for w in (0.0, 1.0, 3.0)}
    assert torch.allclose(v[0.0], net(x, torch.full((2,), 0.7), null), atol=1e-5)
    assert torch.allclose(v[3.0], v[0.0] + 3 * (v[1.0] - v[0.0]), atol=1e-5)
    assert (v[1.0] - v[0.0]).abs().max() > 1e-3, "the condition must matter, or this test shows nothing"


def test_rescaled_guidance_has_the_spread_of_the_conditional_branch():
    """At 1 the std of x0_hat is the conditional branch's, halfway at 0.5; at 0 nothing happens, bitwise."""
    net, x, t = dit(), torch.randn(2, 9, 6), 0.7
    text, null = net.encode_text(torch.tensor([[2, 3], [4, 0]])), net.encode_text(torch.tensor([[1], [1]]))
    with torch.no_grad():
        std = lambda w, **k: (x - t * M.velocity_field(net, text, null, w=w, **k)(x, t)).flatten(1).std(1)
        own, free = std(1.0), std(6.0)
        assert (free / own - 1).abs().min() > 0.005, "guidance must change the spread, or this test shows nothing"
        assert torch.allclose(std(6.0, rescale=1.0), own, rtol=1e-3) and torch.allclose(std(6.0, rescale=0.5), (own + free) / 2, rtol=1e-3)
        assert torch.equal(std(6.0, rescale=0.0), free)


def test_windows_average_to_the_field_where_it_is_local():
    """A field without memory over time is the same with and without windows; one window is exactly no window."""
    local = lambda x, t, text=None, cond=None, mask=None, drop=None: 2 * x + cond
    x, cond = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    for window in (16, 17, 50):
        assert torch.allclose(M.velocity_field(local, cond=cond, window=window)(x, 0.5), 2 * x + cond, atol=1e-5)


def test_many_windows_are_evaluated_in_small_batches():
    """Memory must not grow with the length of the recording."""
    sizes = []
    def net(x, t, text=None, cond=None, mask=None, drop=None):
        sizes.append(len(x))
        return x
    M.velocity_field(net, cond=torch.zeros(1, 4_000, 3), window=16)(torch.randn(1, 4_000, 3), 0.5)
    assert max(sizes) <= 128 and sum(sizes) > 400


# --- network

def test_a_fresh_network_is_exact_for_unit_gaussian_data_and_its_blocks_are_the_identity():
    net, x = DiT(channels=6, width=32, depth=3, heads=2, vocab=20), torch.randn(2, 9, 6)
    for t in (0.0, 0.3, 1.0):
        v, hs = net(x, torch.full((2,), t), net.encode_text(torch.tensor([[2], [3]])), return_blocks=True)
        assert torch.allclose(v, M.gaussian_velocity(x, t, 0, 1), atol=1e-6) and len(hs) == 4 and all(torch.equal(hs[0], h) for h in hs)


def test_block_outputs_on_request_change_nothing():
    net, x, t = dit(vocab=0), torch.randn(2, 9, 6), torch.rand(2)
    v, hs = net(x, t, return_blocks=True)
    assert torch.equal(v, net(x, t)) and hs[0].shape == (2, 9, 32)


def test_padded_tokens_cannot_be_heard():
    net, x, t = dit(), torch.randn(1, 9, 6), torch.tensor([0.4])
    text = net.encode_text(torch.tensor([[2, 3]]))
    mask = torch.tensor([[True] * 6 + [False] * 3])
    other = x.clone()
    other[:, 6:] = 99
    assert torch.allclose(net(x, t, text, mask=mask)[:, :6], net(other, t, text, mask=mask)[:, :6], atol=1e-5)
    assert torch.allclose(net(x, t, text, mask=mask)[:, :6], net(x[:, :6], t, text), atol=1e-5)


def test_a_longer_neighbour_in_the_batch_changes_no_caption():
    net = dit()
    alone, padded = net.encode_text(torch.tensor([[2, 3]])), net.encode_text(torch.tensor([[2, 3, 0, 0], [4, 5, 6, 7]]))
    assert torch.allclose(alone.pooled[0], padded.pooled[0], atol=1e-5)
    x, t = torch.randn(1, 9, 6), torch.tensor([0.4])
    assert torch.allclose(net(x, t, alone), net(x, t, padded.rows(torch.tensor([0]))), atol=1e-5)


def test_word_order_matters():
    net = dit()
    a, b = net.encode_text(torch.tensor([[2, 3, 4]])), net.encode_text(torch.tensor([[4, 3, 2]]))
    assert (a.pooled - b.pooled).abs().max() > 1e-3


def test_a_token_knows_where_it_is():
    """Equal tokens at all places: relative positions alone give equal outputs; with the place features each differs."""
    net, x, t = dit(), torch.randn(1, 1, 6).expand(1, 9, 6), torch.full((1,), 0.7)
    spread = lambda: (net(x, t) - net(x, t)[:, :1]).abs().max()
    with torch.no_grad():
        assert spread() > 1e-3
        net.place.weight.zero_()
        assert spread() < 1e-5, "negative control: without them a token can't tell"


def test_dropped_condition_is_the_null_condition():
    net, x, t = dit(vocab=0, cond=True), torch.randn(2, 9, 6), torch.rand(2)
    cond = torch.randn(2, 9, 6)
    half = net(x, t, cond=cond, drop=torch.tensor([True, False]))
    assert torch.equal(half[0], net(x, t)[0]) and torch.equal(half[1], net(x, t, cond=cond)[1])
    ids = torch.tensor([[2, 3], [4, 5]])
    net = dit()
    assert torch.allclose(net.encode_text(ids, torch.tensor([True, False])).pooled, net.encode_text(torch.tensor([[1, 0], [4, 5]])).pooled)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    table = M.rope_table(20, 8, "cpu")
    rq, rk = (M.rotate(x.expand(1, 1, 20, 8), table)[0, 0] for x in (q, k))
    scores = rq @ rk.T
    assert torch.allclose(scores[3, 7], scores[10, 14], atol=1e-5) and not torch.allclose(scores[3, 7], scores[3, 8], atol=1e-3)


def test_text_layer_is_torchs_transformer_layer():
    ours, ref = M.TextLayer(64, 2), torch.nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    with torch.no_grad():
        for mine, theirs in ((ref.norm1, ours.norm1), (ref.norm2, ours.norm2), (ref.self_attn.out_proj, ours.out), (ref.linear1, ours.mlp[0]), (ref.linear2, ours.mlp[2])):
            mine.load_state_dict(theirs.state_dict())
        ref.self_attn.in_proj_weight.copy_(ours.qkv.weight)
        ref.self_attn.in_proj_bias.copy_(ours.qkv.bias)
    h, mask = torch.randn(3, 7, 64), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    assert torch.allclose(ours(h, mask)[mask], ref(h, src_key_padding_mask=~mask)[mask], atol=1e-5)
    assert not torch.allclose(ours(h, torch.ones_like(mask))[mask], ref(h, src_key_padding_mask=~mask)[mask], atol=1e-3), "negative control: the mask matters"


def test_attention_on_a_cpu_is_float32_under_autocast_and_the_formula():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = (torch.arange(5) < 4).expand(2, 1, 1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = M.attention(q, k, v, mask)
    by_hand = ((q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    assert out.dtype == torch.float32 and torch.allclose(out, by_hand, atol=1e-5)
    assert float((out - M.attention(*(x.bfloat16().float() for x in (q, k, v)), mask)).abs().max()) > 1e-4, "negative control: bfloat16 would be seen"


# --- codec

@pytest.fixture(scope="module")
def codec(waves):
    return Codec(64).fit(waves)


def test_codec_is_the_best_linear_autoencoder(codec, waves):
    """Projection error equals that of numpy's SVD truncated to 64 components, and no random basis comes near."""
    x = torch.cat([codec._frames(torch.as_tensor(w)[None])[0] for w in waves]).double()
    ours = x - ((x - codec.mean) @ codec.basis.double() @ codec.basis.T.double() + codec.mean)
    centred = (x - x.mean(0)).numpy()
    s = np.linalg.svd(centred, compute_uv=False)
    assert abs(float(ours.square().sum()) / (s[64:] ** 2).sum() - 1) < 1e-3
    assert abs(codec.explained - (s[:64] ** 2).sum() / (s**2).sum()) < 1e-4
    q = torch.linalg.qr(torch.randn(128, 64, dtype=torch.float64)).Q
    assert float(((x - x.mean(0)) - (x - x.mean(0)) @ q @ q.T).square().sum()) > 5 * float(ours.square().sum())


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_latents_have_unit_mean_variance_and_the_stated_channel_scale(waves, whiten):
    z = Codec(16, whiten).fit(waves).encode(torch.as_tensor(waves)).flatten(0, 1)
    var = z.var(0)
    assert abs(float(var.mean()) - 1) < 0.01 and z.mean(0).abs().max() < 0.02
    full = Codec(16, 0.0).fit(waves).encode(torch.as_tensor(waves)).flatten(0, 1).var(0)
    ratio = var / full ** (1 - whiten)
    assert float(ratio.std() / ratio.mean()) < 0.01


def test_decode_then_encode_is_the_identity_on_latents(codec):
    z = 0.3 * torch.randn(2, 10, 64)
    mel = codec.decode_mel(z)
    again = (M.rearrange(mel, "b (t p) m -> b t (p m)", p=2) - codec.mean) @ codec.basis / codec.scale
    assert torch.allclose(again, z, atol=1e-3)


def test_any_length_becomes_whole_tokens(codec):
    for n in (1, 639, 640, 641, 40_960):
        z = codec.encode(torch.randn(1, n) * 0.1)
        assert z.shape == (1, codec.tokens(n), 64) and torch.isfinite(z).all()


def test_silence_and_full_scale_stay_finite(codec):
    for x in (torch.zeros(1, 6_400), torch.ones(1, 6_400), torch.full((1, 6_400), 1e-38)):
        y = codec.decode(codec.encode(x))
        assert torch.isfinite(y).all() and y.abs().max() <= 1
    z = codec.encode(0.5 * torch.sin(torch.arange(6_400) * 0.3)[None])
    loud = codec.decode(z + (torch.full((1, 1, 128), 2.0) @ codec.basis / codec.scale))  # every band e^2 times louder
    assert abs(float(loud.abs().max()) - 0.95) < 1e-4 and (loud.abs() > 0.949).sum() < 20, "scaled, not clipped"


def test_mel_bands_are_torchaudios_scaled_to_weighted_means():
    fb = torchaudio.functional.melscale_fbanks(513, 0, 8_000, 64, 16_000, mel_scale="slaney")
    assert torch.allclose(M.mel_filters() * fb.sum(0), fb, atol=1e-6)
    assert torch.allclose(torch.ones(513) @ M.mel_filters(), torch.ones(64), atol=1e-5)


def test_spectrum_from_mel_reproduces_the_mel(codec, waves):
    mel = M.log_mel(torch.as_tensor(waves[:4]))
    s = codec.magnitude(mel)
    assert (s >= 0).all()
    assert float(((s @ M.mel_filters()).clamp_min(M.FLOOR).log() - mel).abs().mean()) < 0.1


def test_griffin_lim_is_as_consistent_as_torchaudios(waves):
    """Same spectral convergence as torchaudio's fast Griffin-Lim from a random start (an independent implementation)."""
    mag = M.stft(torch.as_tensor(waves[:4])).abs()
    ref = torchaudio.functional.griffinlim(mag.mT, torch.hann_window(1_024), 1_024, 320, 1_024, 1.0, 32, 0.99, waves.shape[1], True)
    error = lambda y: float((M.stft(y).abs() - mag).norm() / mag.norm())
    ours = M.griffin_lim(mag, waves.shape[1], generator=torch.Generator().manual_seed(0))
    assert error(ours) < 1.1 * error(ref)
    assert error(M.griffin_lim(mag, waves.shape[1], iters=2, generator=torch.Generator().manual_seed(0))) > 1.3 * error(ref)


def test_known_low_band_survives_super_resolution_decoding(codec, waves):
    import data
    x = torch.as_tensor(waves[:4])
    low = torch.as_tensor(np.stack([data.band_limit(w, 2_000) for w in waves[:4]]))
    y = codec.decode(codec.encode(x), low, 2_000)
    band = slice(2, 115)  # 30 to 1,800 Hz
    err = lambda a: float((M.stft(a)[..., band] - M.stft(x)[..., band]).norm() / M.stft(x)[..., band].norm())
    assert err(y) < 0.1, "the recording's own band, phases included"
    assert err(codec.decode(codec.encode(x))) > 0.5, "negative control: without it phases are invented"


# --- words

def test_unknown_words_are_reported_with_their_neighbours_and_left_out():
    words = Words.fit(["a low bell", "heavy rain, then two dogs"])
    assert words.unknown("a low bel zzzz") == {"bel": ["bell"], "zzzz": []}
    assert torch.equal(words.encode(["a zzzz low bell"]), words.encode(["A LOW bell!"]))
    assert words.encode(["zzzz"]).tolist() == [[1]] and words.encode([""]).tolist() == [[1]]


def test_digits_are_read_as_words():
    words = Words.fit(["two bells"])
    assert torch.equal(words.encode(["2 bells"]), words.encode(["two bells"]))


def test_batches_of_captions_are_padded_with_zero():
    ids = Words.fit(["a b c"]).encode(["a", "a b c"])
    assert ids.shape == (2, 3) and ids[0].tolist()[1:] == [0, 0] and (ids[1] > 1).all()


def test_muon_is_torchs_own_given_its_polynomials(monkeypatch):
    """Ten steps on matrices of three shapes (bf16 products in another order: small differences)."""
    monkeypatch.setattr(M.Muon, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
    g = torch.Generator().manual_seed(0)
    shapes = [(24, 8), (8, 24), (8, 8), (8, 24)]
    start = [torch.randn(s, generator=g) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    a, b = M.Muon(ours, 0.02, weight_decay=0.1), torch.optim.Muon(theirs, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    moved = [q.detach() - x for q, x in zip(theirs, start)]
    assert all((p.detach() - q.detach()).norm() < 0.03 * m.norm() for p, q, m in zip(ours, theirs, moved))


def test_muons_update_is_near_the_polar_factor_and_its_polynomials_are_minimax():
    """Against the singular vectors; and each polynomial against a linear programme's best one on what the one before leaves of [0.01, 1]."""
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = M.Muon.orthogonal(x).float()
    assert torch.nn.functional.cosine_similarity(y.flatten(1), (u @ v).flatten(1)).min() > 0.95
    s = torch.linalg.svdvals(y)
    assert 0.6 < s.min() and s.max() < 1.4 and torch.linalg.cond(x).min() > 2
    rank_one = torch.ones(1, 8, 8)  # its one singular value is its norm: the largest that there can be
    assert abs(float(torch.linalg.svdvals(M.Muon.orthogonal(rank_one).float()).max()) - 1) < 0.35
    low, high = 0.01, 1.0
    for ours in M.Muon.POLYNOMIALS:
        grid = np.geomspace(low, high, 2_000)
        powers = np.stack([grid, grid**3, grid**5], 1)
        column = -np.ones((len(grid), 1))
        best = scipy.optimize.linprog([0, 0, 0, 1], np.block([[powers, column], [-powers, column]]), np.repeat([1.0, -1.0], len(grid)), bounds=[(None, None)] * 4).x
        assert np.allclose(ours, best[:3], atol=0.02) and np.abs(powers @ ours - 1).max() < best[3] + 1e-3
        low, high = 1 - best[3], 1 + best[3]
    assert 0.7 < low and high < 1.3

