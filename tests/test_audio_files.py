"""Claims about sound files: whole or refused, channels, and memory."""
import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from folders import sine, write_tone

from parts.audio import RATE, resample, resample_blocks
from parts.audio_files import _mp3_frame, _mp3_seconds, read_audio, read_channels
from parts.errors import UserError


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def encoded(x: np.ndarray, ext: str, **how) -> bytes:
    file = io.BytesIO()
    subtype = {"mp3": "MPEG_LAYER_III", "ogg": "VORBIS"}.get(ext)
    soundfile.write(file, x, RATE, format=ext.upper(), subtype=subtype, **how)
    return file.getvalue()


def without_index(mp3: bytes) -> bytes:
    """An mp3 whose first frame, which says how many follow, is gone."""
    return mp3[_mp3_frame(mp3, 0)[0] :]


# --- is all of it read?

@pytest.mark.parametrize("seconds", [0.5, 3.3, 8.05])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_the_length_of_an_mp3_is_that_of_its_frames(seconds, mode):
    mp3 = encoded(noise(seconds), "mp3", bitrate_mode=mode)
    assert 0 <= _mp3_seconds(mp3) - seconds < 0.2
    assert _mp3_seconds(b"ID3\4\0\0\0\0\1\0" + bytes(128) + mp3) == _mp3_seconds(mp3), "a tag is no sound"
    assert _mp3_seconds(b"\xff" * 1_000) is None


def test_an_mp3_without_its_index_is_read_whole_or_refused_with_both_lengths(tmp_path):
    # Quiet at first: the length that is guessed from the first frames is far from the true one.
    x = np.concatenate([noise(4, 0.001), noise(4, 0.3)])
    path = tmp_path / "vbr.mp3"
    path.write_bytes(without_index(encoded(x, "mp3", bitrate_mode="VARIABLE")))
    guessed = soundfile.info(path).duration
    assert abs(guessed - 8) > 0.5, "negative control: libsndfile alone is wrong"
    with pytest.raises(UserError, match=rf"holds 8\.\d\d s of mp3 but only {guessed:.2f} s"):
        read_audio(path)


def ape_tag(picture: bytes) -> bytes:
    """An APEv2 tag with a cover, as it stands behind the frames of an mp3."""
    item = struct.pack("<II", len(picture), 2) + b"Cover Art (Front)\0" + picture
    ends = [b"APETAGEX" + struct.pack("<IIII", 2_000, len(item) + 32, 1, flags) + bytes(8)
            for flags in (0xA000_0000, 0x8000_0000)]
    return ends[0] + item + ends[1]


def test_a_picture_behind_the_frames_of_an_mp3_is_no_sound(tmp_path):
    mp3, tag = encoded(noise(3), "mp3"), ape_tag(np.random.default_rng(1).bytes(300_000))
    alike = [at for at in range(len(tag)) if tag[at] == 255 and _mp3_frame(tag, at)]
    assert len(alike) > 10, "negative control: the tag holds what looks like frames"
    path = tmp_path / "tagged.mp3"
    path.write_bytes(mp3 + tag)
    assert abs(len(read_audio(path)) / RATE - 3) < 0.01
    path.write_bytes(mp3 + tag + mp3)
    with pytest.raises(UserError, match="joined"):
        read_audio(path)                                           # what follows the tag is found still


@pytest.mark.parametrize("ext", ["mp3", "ogg", "flac"])
def test_joined_files_are_refused_and_not_read_in_part(tmp_path, ext):
    one, two = encoded(noise(2), ext), encoded(noise(1.5, seed=1), ext)
    path = tmp_path / f"joined.{ext}"
    path.write_bytes(one)
    assert abs(len(read_audio(path)) / RATE - 2) < 0.2, "negative control: one alone is read"
    path.write_bytes(one + two)
    assert abs(soundfile.info(path).duration - 2) < 0.2, "negative control: libsndfile sees the first alone"
    with pytest.raises(UserError, match=r"joined\.(mp3|ogg|flac): .*joined"):
        read_audio(path)


@pytest.mark.parametrize("ext", ["wav", "mp3", "ogg", "flac"])
def test_a_download_that_was_cut_is_refused(tmp_path, ext):
    whole = encoded(noise(6), ext)
    path = tmp_path / f"cut.{ext}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=f"cut.{ext}"):
        read_audio(path)


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "AIFF", "AU", "W64", "RF64"])
def test_a_file_that_ends_before_its_header_says_is_refused_with_both_lengths(tmp_path, kind):
    path = tmp_path / "cut.wav"
    soundfile.write(path, noise(2), RATE, format=kind, subtype="PCM_16")
    assert len(read_audio(path)) == 2 * RATE, "negative control"
    path.write_bytes(path.read_bytes()[:40_000])
    assert 0 < soundfile.info(path).frames < 2 * RATE, "negative control: libsndfile reads what is there"
    with pytest.raises(UserError, match=r"cut off: (39|40)\d{3} of 64\d{3} bytes are there"):
        read_audio(path)


def with_comments(wav: bytes) -> bytes:
    """A wav with 3 kB of comments before its sound: libsndfile's log, of 2 kB, ends before its data."""
    text = b"word " * 100
    info = b"INFO" + b"".join(name + struct.pack("<I", len(text)) + text
                              for name in (b"INAM", b"ICMT", b"IART", b"ICOP", b"IGNR", b"ISFT"))
    at = wav.find(b"data")
    wav = wav[:at] + b"LIST" + struct.pack("<I", len(info)) + info + wav[at:]
    return wav[:4] + struct.pack("<I", len(wav) - 8) + wav[8:]


def test_comments_before_the_sound_hide_no_cut(tmp_path):
    path = tmp_path / "x.wav"
    whole = with_comments(encoded(noise(2), "wav"))
    path.write_bytes(whole)
    assert len(read_audio(path)) == 2 * RATE, "negative control"
    path.write_bytes(whole[:-20_000])
    with soundfile.SoundFile(path) as sound:
        assert "data :" not in sound.extra_info, "negative control: the log says nothing of it"
    with pytest.raises(UserError, match="cut off"):
        read_audio(path)


def test_a_wav_whose_outer_length_alone_is_wrong_is_read(tmp_path):
    wav = encoded(noise(1), "wav")
    (tmp_path / "x.wav").write_bytes(wav[:4] + struct.pack("<I", 10 * len(wav)) + wav[8:])
    assert len(read_audio(tmp_path / "x.wav")) == RATE


def test_a_wav_written_to_a_pipe_says_no_length_and_is_read(tmp_path):
    wav = bytearray(encoded(noise(1), "wav"))
    at = wav.find(b"data") + 4
    wav[at : at + 4] = b"\xff" * 4
    (tmp_path / "pipe.wav").write_bytes(wav)
    assert len(read_audio(tmp_path / "pipe.wav")) == RATE


def without_length(path, kind: str) -> None:
    """A file as a recorder leaves it that dies: begun with lengths of 0, which are written at the end."""
    soundfile.write(path, noise(1), RATE, format=kind, subtype="PCM_16")
    raw = bytearray(path.read_bytes())
    at, size = {"WAV": (40, 4), "AU": (8, 4), "RF64": (28, 16)}[kind]
    raw[at : at + size] = bytes(size)
    path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["WAV", "AU", "RF64"])
def test_a_recording_whose_length_was_never_written_is_refused_with_the_repair(tmp_path, kind):
    path = tmp_path / "died.wav"
    without_length(path, kind)
    with pytest.raises(UserError, match="died.wav: .*length was never written.*an audio editor, or: ffmpeg"):
        read_audio(path)
    soundfile.write(path, noise(0), RATE, format=kind, subtype="PCM_16")
    with pytest.raises(UserError, match="died.wav: holds no samples$"):
        read_audio(path)                                           # negative control: it is empty


@pytest.mark.parametrize("kind", ["AIFF", "RF64"])
def test_samples_that_look_like_frames_of_an_mp3_make_no_mp3(tmp_path, kind):
    """Negative control: by the frames found in it the file would be much shorter than it is."""
    mp3 = encoded(noise(3), "mp3")
    samples = np.frombuffer(mp3[: len(mp3) // 2 * 2], ">i2" if kind == "AIFF" else "<i2")
    path = tmp_path / "x.wav"
    soundfile.write(path, samples.astype(np.int16), RATE, format=kind, subtype="PCM_16")
    seconds = len(samples) / RATE
    assert abs(_mp3_seconds(path.read_bytes()) - seconds) > 0.5
    assert abs(len(read_audio(path)) / RATE - seconds) < 1e-6


def test_a_flac_that_was_streamed_says_no_length_and_is_refused_with_the_way_out(tmp_path):
    """The last 36 bits of its second 8 bytes are the number of samples; 0: not known (RFC 9639)."""
    flac = bytearray(encoded(noise(1), "flac"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(flac)
    with pytest.raises(UserError, match="streamed.flac: .*does not say how long it is; convert it anew"):
        read_audio(tmp_path / "streamed.flac")


# --- channels

def test_channels_are_mixed_by_their_mean_unless_they_cancel(tmp_path):
    x, path = sine(1.0), tmp_path / "x.wav"
    for left, right, expected in ((x, x, x), (x, 0 * x, x / 2), (x, -x, x), (0.5 * x, -0.51 * x, -0.51 * x)):
        soundfile.write(path, np.stack([left, right], 1), RATE, subtype="FLOAT")
        assert np.abs(read_audio(path) - expected).max() < 1e-6
        assert np.abs(read_channels(path) - np.stack([left, right])).max() < 1e-6


# --- resampling and memory

@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 44_099])
def test_a_recording_resampled_in_blocks_is_that_resampled_at_once(rate):
    x = np.random.default_rng(rate).standard_normal((4 * rate + 12_345, 2)).astype(np.float32)
    cuts = np.sort(np.random.default_rng(1).integers(0, len(x), 12))
    y = np.concatenate(list(resample_blocks(np.split(x, cuts), rate, RATE)))
    whole = np.stack([resample(x[:, k], rate, RATE) for k in range(2)], 1)
    assert y.shape == whole.shape and np.abs(y - whole).max() < 2e-6


def test_memory_is_that_of_the_result_whatever_the_rate(tmp_path):
    path = write_tone(tmp_path / "high.flac", 60.0, 192_000)
    tracemalloc.start()
    x = read_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(x) == 60 * RATE
    assert peak < 46e6 < 60 * 192_000 * 4 + x.nbytes, "less than the samples before resampling take"
