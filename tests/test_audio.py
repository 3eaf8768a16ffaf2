"""Claims about waveforms: what is written, and long recordings in pieces."""
import numpy as np
import scipy.io.wavfile
from folders import sine

from parts.audio import RATE, in_segments, write_wav


def test_wav_files_never_clip(tmp_path):
    write_wav(tmp_path / "x.wav", 10 * sine())
    rate, x = scipy.io.wavfile.read(tmp_path / "x.wav")
    assert rate == RATE and x.dtype == np.int16 and 32_000 < np.abs(x).max() <= 32_767


def test_a_recording_in_pieces_is_the_recording():
    """Pieces that come back as they went in are put together without a seam, whatever the length."""
    def unchanged(piece, k):
        lengths.append(len(piece))
        return piece
    for n in (1, 90, 100, 101, 180, 181, 1_000):
        x, lengths = np.random.default_rng(n).standard_normal(n).astype(np.float32), []
        assert np.abs(in_segments(unchanged, x, segment=100, fade=10) - x).max() < 1e-6
        assert max(lengths) <= 100
