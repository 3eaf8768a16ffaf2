"""Claims about decoding without a network: its spectrum fits the mel, its phases agree."""
import torch
import torchaudio

from lab.griffin_lim import magnitude
from parts.decoder import griffin_lim
from parts.spectra import FLOOR, log_mel, mel_filters, stft


def test_spectrum_from_mel_reproduces_the_mel(waves):
    mel = log_mel(torch.as_tensor(waves[:4]))
    s = magnitude(mel)
    assert (s >= 0).all()
    assert float(((s @ mel_filters()).clamp_min(FLOOR).log() - mel).abs().mean()) < 0.1


def test_griffin_lim_is_as_consistent_as_torchaudios(waves):
    """Same spectral convergence as torchaudio's fast Griffin-Lim from a random start (an independent
    implementation)."""
    n = waves.shape[1]
    mag = stft(torch.as_tensor(waves[:4])).abs()

    def error(y):
        return float((stft(y).abs() - mag).norm() / mag.norm())

    def ours(iters):
        phase = 2 * torch.pi * torch.rand(mag.shape[1:], generator=torch.Generator().manual_seed(0))
        return griffin_lim(torch.polar(mag, phase.expand_as(mag)), n, iters)

    window = torch.hann_window(1_024)
    ref = torchaudio.functional.griffinlim(mag.mT, window, 1_024, 320, 1_024, 1.0, 32, 0.99, n, True)
    assert error(ours(32)) < 1.1 * error(ref)
    assert error(ours(2)) > 1.3 * error(ref)
