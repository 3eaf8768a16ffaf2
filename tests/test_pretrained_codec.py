"""Claims about pretrained codecs: time, width and a recording's own band survive."""
import json

import numpy as np
import pytest
import torch
from tiny_models import noise, tiny_model

from parts.audio import RATE
from parts.band_limit import band_limit
from parts.checkpoints import load_weights
from parts.errors import UserError
from parts.pretrained_codec import PretrainedCodec

RATES = {
    "dac": 50.0,
    "encodec": 75.0,
    "mimi": 12.5,
    "vibevoice_acoustic_tokenizer": 7.5,
    "pocket_tts_audio_tokenizer": 12.5,
}


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory):
    """open_tiny(kind, channels) -> a tiny codec of that family, not fitted; each model is saved once."""
    folders = {}

    def get(kind, channels=8, **options):
        if kind not in folders:
            folders[kind] = tiny_model(kind, tmp_path_factory.mktemp(kind))
        return PretrainedCodec(str(folders[kind]), channels, **options)
    return get


@pytest.mark.parametrize("kind", RATES)
def test_a_codec_of_each_family_keeps_time_and_its_whole_latent_space(open_tiny, kind, waves):
    """Any length gives ceil(N rate / 16000) tokens and comes back at least as long; with as many channels as
    the latents are wide the PCA loses nothing; with fewer it keeps the best part: more channels are never
    worse."""
    codec = open_tiny(kind, 512).fit(waves[:12])
    assert codec.rate == RATES[kind] and codec.channels == codec.mean.shape[0]
    assert abs(codec.explained - 1) < 1e-6
    for n in (16_000, 12_345, 40_960):
        z = codec.encode(torch.from_numpy(waves[:2, :n]))
        assert z.shape == (2, int(np.ceil(n * codec.rate / RATE)), codec.channels)
        assert z.shape == (2, codec.tokens(n), codec.channels)
        y = codec.decode(z)
        assert y.shape[1] >= n and y.shape[1] - n <= RATE / codec.rate and y.isfinite().all()

    native = codec.native(torch.from_numpy(waves[:2]))
    back = codec.restore(codec.project(native))
    assert torch.allclose(back, native, atol=1e-3 * float(native.abs().max()))
    rows = torch.cat([codec.project(codec.native(torch.from_numpy(w)[None]))[0] for w in waves[:12]])
    variance = float(rows.var(0).mean())
    assert abs(variance - 1) < 0.02, "one on average: the scale that the noise expects"
    small = open_tiny(kind, 4).fit(waves[:12])
    assert small.channels == 4 and small.explained < 1 and small.key != codec.key


@pytest.mark.parametrize("kind", ["dac", "encodec"])
def test_a_click_moves_the_latents_and_the_decoded_sound_where_it_is(open_tiny, kind):
    codec = open_tiny(kind, 512)
    n = 16_000
    at = 9_000
    quiet = 0.01 * noise(n, 1)
    clicked = quiet.clone()
    clicked[0, at] += 1.0
    moved = (codec.native(clicked) - codec.native(quiet)).square().sum(-1)[0]
    assert abs((float(moved.argmax()) + 0.5) / codec.rate - at / n) < 1.6 / codec.rate

    z = codec.native(quiet)
    bump = z.clone()
    bump[0, 20] += 3.0
    change = (codec.wave(bump) - codec.wave(z)).square()[0]
    # DAC reaches as far to both sides; EnCodec is causal, and its LSTM has a long tail: the beginning counts.
    share = torch.tensor(0.5 if kind == "dac" else 0.05)
    place = torch.searchsorted(change.cumsum(0) / change.sum(), share)
    assert abs(float(place) / RATE - 20.5 / codec.rate) < 1.6 / codec.rate


def test_a_codec_is_restored_from_the_few_numbers_in_a_checkpoint(open_tiny, waves):
    fitted = open_tiny("dac").fit(waves[:8])
    restored = open_tiny("dac")
    assert set(fitted.state_dict()) == {"mean", "basis", "scale"}
    restored.load_state_dict(fitted.state_dict())
    x = torch.from_numpy(waves[:2])
    assert torch.equal(fitted.encode(x), restored.encode(x)) and fitted.key == restored.key
    with pytest.raises(UserError, match="another codec"):
        load_weights("run", open_tiny("encodec"), fitted.state_dict())


def test_super_resolution_keeps_the_recordings_own_low_band(open_tiny, waves):
    codec = open_tiny("dac").fit(waves[:8])
    x = waves[:2]
    muffled = np.stack([band_limit(wave, 2_000) for wave in x])
    given = torch.from_numpy(muffled)
    y = codec.decode(codec.encode(given), given, 2_000)[:, : x.shape[1]].numpy()
    for output, condition in zip(y, muffled):
        # Without the edges, where filters ring.
        low_output = band_limit(output, 1_500)[2_000:-2_000]
        low_condition = band_limit(condition, 1_500)[2_000:-2_000]
        assert np.abs(low_output - low_condition).max() < 0.02 * np.abs(low_condition).max()


@pytest.mark.parametrize("config, message", [
    (dict(model_type="encodec", normalize=True, audio_channels=2), "use the mono model"),
    (dict(model_type="hubert"), "no codec known here"),
])
def test_codecs_that_rescale_chunks_and_models_that_are_none_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        PretrainedCodec(str(tmp_path))
