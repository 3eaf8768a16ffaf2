"""Claims about spectra: the STFT is inverted, mel bands are the library's, tones read as they should."""
import torch
import torchaudio

from parts import spectra
from parts.spectra import FLOOR, HOP, istft, log_mel, mel_filters, stft


def test_the_inverse_of_the_stft_is_exact(waves):
    wav = torch.as_tensor(waves[:4])
    assert torch.allclose(istft(stft(wav), wav.shape[1]), wav, atol=1e-5)
    assert torch.allclose(istft(stft(wav, 256, 64), wav.shape[1], 256, 64), wav, atol=1e-5)


def test_mel_bands_are_torchaudios_scaled_to_weighted_means():
    fb = torchaudio.functional.melscale_fbanks(513, 0, 8_000, 64, 16_000, mel_scale="slaney")
    assert torch.allclose(mel_filters() * fb.sum(0), fb, atol=1e-6)
    assert torch.allclose(torch.ones(513) @ mel_filters(), torch.ones(64), atol=1e-5)


def test_log_mel_of_a_tone_peaks_in_its_band_and_silence_is_at_the_floor():
    """A sine of amplitude a has STFT magnitude a N_FFT / 4 at its bin."""
    n = 50 * HOP
    sine = 0.5 * torch.sin(2 * torch.pi * 1_000 * torch.arange(n) / 16_000)
    mel = log_mel(torch.stack([sine, torch.zeros(n)]))
    assert mel.shape == (2, 50, 64)
    expected = int((mel_filters()[64]).argmax())                   # bin 64 is 1,000 Hz
    assert (mel[0, 2:-2].argmax(-1) == expected).all()
    assert torch.equal(mel[1], torch.full((50, 64), FLOOR).log())


def test_log_mel_of_a_long_recording_is_made_in_blocks_and_is_that_of_the_whole(monkeypatch):
    x = 0.1 * torch.randn(2, 5 * 16_000 + 123, generator=torch.Generator().manual_seed(0))
    whole = spectra.log_mel(x)
    monkeypatch.setattr(spectra, "LONG", 1)
    in_blocks = spectra.log_mel(x)
    assert in_blocks.shape == whole.shape and torch.allclose(in_blocks, whole, atol=1e-4)
