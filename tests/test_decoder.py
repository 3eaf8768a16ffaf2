"""Claims about the decoder: what it is before training, its phases, and what the shipped one is better at."""
import numpy as np
import pytest
import torch

from lab.griffin_lim import decode_by_griffin_lim
from parts.codec import Codec
from parts.decoder import Decoder, griffin_lim, load_decoder, phases
from parts.metrics import fine_texture
from parts.soundworld import SoundWorld
from parts.spectra import log_mel, stft


def test_before_training_it_writes_noise_of_the_right_colour(waves):
    mel = log_mel(torch.as_tensor(waves[:8]))                      # (8, F, 64)
    torch.manual_seed(0)
    decoder = Decoder().eval()
    with torch.no_grad():
        made = decoder.decode(mel, list(range(8)))
        tones, gain = decoder(mel)
    assert made.shape == (8, 320 * mel.shape[1])
    loud = mel > mel.amax((1, 2), keepdim=True) - 5                # where the clip is not all but silent
    error = (log_mel(made) - mel)[loud]
    assert abs(error.mean()) < 0.2 and error.std() < 0.4, "nats"
    assert tones.mean() < 0.5 * gain.mean()


def test_any_spectrum_is_fitted_to_the_mel_that_the_clip_had(waves):
    wav = torch.as_tensor(waves[:4])
    mel, other = log_mel(wav), stft(wav.roll(1, 0))[:, :-1]        # the next clip's spectrum
    decoder = Decoder()

    def error(spec):
        found = (spec.abs() @ decoder.filters).clamp_min(1e-4).log()
        return float((found - mel)[mel > -6].abs().mean())
    assert error(decoder.fit(other, mel)) < 0.25 * error(other)
    exact = stft(wav)[:, :-1]
    inner = slice(1, -1)                                           # no mel band holds 0 and 8,000 Hz
    assert torch.allclose(decoder.fit(exact, mel)[..., inner], exact[..., inner], atol=1e-3), "it has it"


def test_phases_of_a_steady_tone_agree_after_four_rounds_and_random_ones_do_not():
    """A sine between two bins, from its magnitudes alone."""
    n = 16_000
    sine = torch.sin(2 * torch.pi * 1_003.7 * torch.arange(n) / 16_000)[None]
    magnitude = stft(sine).abs()

    def error(phase, rounds):
        made = griffin_lim(torch.polar(magnitude, phase), n, rounds)
        inner = slice(5, -5)
        return float((stft(made).abs() - magnitude)[:, inner].norm() / magnitude[:, inner].norm())
    random = 2 * torch.pi * torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    assert error(phases(magnitude), 0) < 0.2 < 0.5 < error(random, 0)
    assert error(phases(magnitude), 4) < 0.01 < 0.1 < error(random, 4)


def test_a_clip_is_decoded_alike_in_any_batch_and_otherwise_from_another_seed(waves):
    mel, decoder = log_mel(torch.as_tensor(waves[:4])), load_decoder()
    together = decoder.decode(mel, [0, 1, 2, 3])
    assert torch.allclose(decoder.decode(mel[2:3], [2])[0], together[2], atol=1e-5)
    other = decoder.decode(mel[2:3], [0])[0]
    assert (other - together[2]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def round_trips(waves):
    """Twelve unseen clips, their round trip by Griffin-Lim, by the shipped decoder, by an untrained one."""
    codec = Codec().fit(waves)
    world = SoundWorld("test", 12)
    real = np.stack([world.wave(i) for i in range(12)])
    z = codec.encode(torch.as_tensor(real))
    torch.manual_seed(0)
    untrained = Decoder().eval().requires_grad_(False)
    return {"real": real, "griffin-lim": decode_by_griffin_lim(codec, z).numpy(),
            "learned": codec.decode(z).numpy(),
            "untrained": untrained.decode(codec.decode_mel(z), [0] * 12).numpy()}


def test_fine_texture_of_round_trips_is_a_third_nearer_to_the_clips_than_griffin_lims(round_trips):
    of = {name: np.stack([fine_texture(x) for x in made]) for name, made in round_trips.items()}
    away = {name: np.abs(found - of["real"]).mean() for name, found in of.items()}
    assert away["learned"] < 2 / 3 * away["griffin-lim"], away
    assert away["learned"] < 0.8 * away["untrained"], "training did some of it, and not the noise alone"


def test_levels_of_round_trips_are_about_those_of_the_clips(round_trips):
    def error(name):
        level = {which: 10 * np.log10((round_trips[which] ** 2).mean(1)) for which in (name, "real")}
        return np.abs(level[name] - level["real"]).mean()
    assert error("learned") < 1.5 and error("learned") < error("griffin-lim") + 0.5, "dB"
