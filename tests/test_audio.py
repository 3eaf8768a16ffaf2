"""Claims about waveforms: what is written, and long recordings in pieces."""
import errno
import io
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import soundfile
from folders import sine

from parts.audio import RATE, active_rms, at_level, in_segments, mu_law_wav, with_added, write_wav
from parts.errors import UserError


def test_wav_files_never_clip(tmp_path):
    write_wav(tmp_path / "x.wav", 10 * sine())
    rate, x = scipy.io.wavfile.read(tmp_path / "x.wav")
    assert rate == RATE and x.dtype == np.int16 and 32_000 < np.abs(x).max() <= 32_767


def test_a_wav_file_is_whole_or_absent(tmp_path, monkeypatch):
    """On a disk that fills up while it is written the one before it stays."""
    write_wav(tmp_path / "x.wav", np.zeros(10))

    def fills_up(path, content):
        with open(path, "wb") as file:
            file.write(content[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    for name in ("x.wav", "y.wav"):
        with pytest.raises(UserError, match=f"{name}: can't be written .*; make room there"):
            write_wav(tmp_path / name, np.ones(10))
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]
    assert (soundfile.read(tmp_path / "x.wav")[0] == 0).all()


def powers_at_a_seam(made, segment=400, fade=100):
    """Power of the samples at each offset from the start of a seam, mean over seams: (fade,)."""
    seams = [made[start : start + fade] for start in range(segment - fade, len(made) - fade, segment - fade)]
    return (np.array(seams) ** 2).mean(0)


def test_independent_pieces_keep_their_power_across_seams(monkeypatch):
    """White noise, drawn anew for each piece: no dip. Negative control: linear weights lose 3 dB halfway."""
    rng, n = np.random.default_rng(0), 300_000

    def noise(start, stop):
        pieces.append((start, stop))
        return rng.standard_normal(stop - start)
    pieces = []
    power = powers_at_a_seam(in_segments(noise, n, 400, 100))
    assert np.abs(10 * np.log10(power.reshape(5, 20).mean(1))).max() < 0.15
    assert pieces[0] == (0, 400) and pieces[1] == (300, 700) and pieces[-1][1] == n
    assert max(stop - start for start, stop in pieces) == 400
    monkeypatch.setattr(np, "sqrt", lambda x: x)
    power = powers_at_a_seam(in_segments(noise, n, 400, 100))
    assert 10 * np.log10(power[40:60].mean()) < -2.7


def test_short_signals_are_one_piece_and_every_length_is_covered():
    for n in (1, 90, 100, 101, 180, 181, 1_000):
        made = in_segments(lambda start, stop: np.ones(stop - start), n, segment=100, fade=10)
        assert made.shape == (n,) and made.min() >= 1 - 1e-6 and made.max() <= np.sqrt(2)


# --- levels

def test_the_active_level_does_not_depend_on_silence_and_scales():
    x = sine(1.0)
    padded = np.concatenate([np.zeros(3 * RATE, np.float32), x])
    assert abs(active_rms(x) - 0.3 / np.sqrt(2)) < 1e-3
    assert abs(active_rms(padded) / active_rms(x) - 1) < 0.01
    assert abs(active_rms(1e-3 * x) / active_rms(x) - 1e-3) < 1e-8
    assert active_rms(0 * x) == 0


def test_nothing_is_added_where_the_recording_is_silent():
    x = np.concatenate([sine(0.5), np.zeros(RATE // 2, np.float32), 1e-4 * sine(0.5)])
    loud, gains = at_level(x[None], 0.1)
    assert abs(active_rms(loud[0]) - 0.1) < 1e-6
    y = with_added(x[None], np.ones_like(loud), gains)[0]
    assert np.abs(y[RATE // 4] - x[RATE // 4] - 1 / gains[0, 0]) < 1e-5
    assert (y[RATE // 2 + 640 : RATE - 640] == 0).all()
    assert np.abs(y[-RATE // 4 :] - x[-RATE // 4 :]).max() < 1e-3, "69 dB below its loudest frame"
    silent, gains = at_level(0 * x[None], 0.1)
    assert (silent == 0).all() and gains == 1


@pytest.mark.parametrize("n", [0, 1, 16_000, 16_001])
def test_a_byte_a_sample_is_read_back_by_others_with_little_noise(n):
    """By soundfile, at every level down to -40 dB; silence stays silent, full scale does not wrap."""
    rng = np.random.default_rng(0)
    for level in (0.3, 0.03, 0.01):
        x = np.clip(level * rng.standard_normal(n), -1, 1)
        y, rate = soundfile.read(io.BytesIO(mu_law_wav(x)))
        assert rate == RATE and len(y) == n
        if n > 1:
            assert 10 * np.log10(np.mean(x**2) / np.mean((x - y) ** 2)) > 33
    exact, _ = soundfile.read(io.BytesIO(mu_law_wav(np.array([0.0, 1.0, -1.0]))))
    assert np.allclose(exact, [0, 1, -1], atol=0.02) and exact[0] == 0
