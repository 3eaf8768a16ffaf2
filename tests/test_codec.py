"""Claims about the embedded codec: the latent space, the spectra, and decoding."""
import numpy as np
import pytest
import torch
from einops import rearrange

from parts.band_limit import band_limit
from parts.codec import Codec, keep_low_band
from parts.errors import UserError
from parts.spectra import stft


@pytest.fixture(scope="module")
def codec(waves):
    return Codec(64).fit(waves)


# --- latent space

def test_codec_is_the_best_linear_autoencoder(codec, waves):
    """Projection error equals that of numpy's SVD truncated to 64 components, and no random basis comes
    near."""
    x = torch.cat([codec._frames(torch.as_tensor(w)[None])[0] for w in waves]).double()
    basis = codec.basis.double()
    ours = x - ((x - codec.mean) @ basis @ basis.T + codec.mean)
    centred = x - x.mean(0)
    s = np.linalg.svd(centred.numpy(), compute_uv=False)
    assert abs(float(ours.square().sum()) / (s[64:] ** 2).sum() - 1) < 1e-3
    assert abs(codec.explained - (s[:64] ** 2).sum() / (s**2).sum()) < 1e-4
    q = torch.linalg.qr(torch.randn(128, 64, dtype=torch.float64)).Q
    assert float((centred - centred @ q @ q.T).square().sum()) > 5 * float(ours.square().sum())


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
    again = (rearrange(mel, "b (t p) m -> b t (p m)", p=2) - codec.mean) @ codec.basis / codec.scale
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
    louder = torch.full((1, 1, 128), 2.0) @ codec.basis / codec.scale  # every band e^2 times louder
    loud = codec.decode(z + louder)
    assert abs(float(loud.abs().max()) - 0.95) < 1e-4
    assert (loud.abs() > 0.949).sum() < 20, "scaled, not clipped"


def test_the_key_names_the_latent_space(codec, waves):
    """Caches of latents are stored under it: the same fit has the same key, another fit another one."""
    assert Codec(64).fit(waves).key == codec.key
    assert len({codec.key, Codec(64).key, Codec(64).fit(waves[:32]).key, Codec(32).fit(waves).key}) == 4
    assert Codec(64).key == "501287e8f7b8155a", "not fitted; pinned so that caches made earlier are found"
    assert list(codec.state_dict()) == ["mean", "basis", "scale"], "in every checkpoint"


def test_too_few_frames_for_the_components_are_refused(waves):
    with pytest.raises(UserError, match="3 tokens of sound can't fit 64 principal components; give more"):
        Codec(64).fit([waves[0][: 3 * 640]])


# --- spectra


# --- decoding

def low_band_error(y, x):
    """Of 30 to 1,800 Hz, phases included, as a share of x."""
    band = slice(2, 115)
    return float((stft(y)[..., band] - stft(x)[..., band]).norm() / stft(x)[..., band].norm())


def test_known_low_band_survives_super_resolution_decoding(codec, waves):
    x = torch.as_tensor(waves[:4])
    low = torch.as_tensor(np.stack([band_limit(w, 2_000) for w in waves[:4]]))
    y = codec.decode(codec.encode(x), low, 2_000)
    assert low_band_error(y, x) < 0.1, "the recording's own band, phases included"
    without = codec.decode(codec.encode(x))
    assert low_band_error(without, x) > 0.5, "negative control: without it phases are made up"


def test_the_low_band_of_a_recording_replaces_that_of_another_decoders_output(waves):
    """The rest stays: nothing above the cutoff changes."""
    x = torch.as_tensor(waves[:4])
    other = torch.as_tensor(waves[4:8])
    low = torch.as_tensor(np.stack([band_limit(w, 2_000) for w in waves[:4]]))
    y = keep_low_band(other, low, 2_000)
    assert low_band_error(y, x) < 0.1 and low_band_error(other, x) > 0.5
    above = slice(132, None)  # from 2,060 Hz
    assert torch.allclose(stft(y)[..., above], stft(other)[..., above], atol=0.02)
