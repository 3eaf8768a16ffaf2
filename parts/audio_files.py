"""Sound files of any format -> float32 at 16 kHz, whole or refused.

    file --open_sound--> soundfile.SoundFile whose header is plausible and whose sound is all there
         --read_audio--> (N,) mono         --read_channels--> (C, N)

Files come from elsewhere, so no header is believed: libsndfile reads as many samples as the header says, and
takes the rest for nothing. An mp3 without an index, two recordings joined in one file, a download that was
cut: for each format the file itself is asked how much sound it holds (`_unread`).

Memory is that of the result: a recording is read and resampled in blocks, so neither its rate nor channels
that are mixed down cost any.

Public: AUDIO_TYPES, LONGEST_S, open_sound, file_rate, read_audio, read_channels, refuse_overwriting.
"""
from __future__ import annotations

import contextlib
import mmap
import os
import re
from pathlib import Path

import numpy as np

from parts.audio import RATE, resample_blocks
from parts.errors import UserError, printable

AUDIO_TYPES = (".wav", ".flac", ".ogg", ".mp3")
# What a header may say: a wrong one must not fill the memory.
RATES = (2_000, 768_000)  # Hz, lowest and highest
LONGEST_S = 3_600
CANCELS = 0.01            # the mean of channels with less than this share of their power is no mix  # ASSUMED


# --- reading --------------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_sound(path: Path):
    """An open soundfile.SoundFile with a plausible header, of a file that is whole; whatever goes wrong in
    the block is a UserError that names the file."""
    import soundfile  # lazily: the default path (SoundWorld) needs no audio library
    try:
        if not path.is_file():
            # Devices and pipes are no files either.
            what = "a folder, not a sound file" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {what}")
        open(path, "rb").close()  # where the system refuses it, libsndfile does not say why
        # As the bytes that the system has: a name may be in no encoding.
        with soundfile.SoundFile(path if os.name == "nt" else os.fsencode(path)) as sound:
            if not RATES[0] <= sound.samplerate <= RATES[1]:
                raise UserError(f"{path}: its header says {sound.samplerate} Hz; from {RATES[0]} to "
                                f"{RATES[1]} can be read")
            if sound.frames > 1 << 60:
                raise UserError(f"{path}: its header does not say how long it is; {CONVERT}")
            if not 0 <= sound.frames <= LONGEST_S * sound.samplerate:
                raise UserError(f"{path}: its header says {sound.frames / sound.samplerate:.0f} s; cut it "
                                "into pieces of at most an hour")
            unread = _unread(path, sound)
            if unread:
                raise UserError(f"{path}: {unread}")
            yield sound
    except OSError as e:
        raise UserError(f"{path}: can't be read ({e.strerror})") from None
    except (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError) as e:
        why = re.sub(r"^Error opening b?'.*': ", "", printable(str(e)).strip())[:120]
        raise UserError(f"{path}: can't be read as audio ({why}); use wav, flac, ogg or mp3") from None


def file_rate(path: str | Path) -> int:
    """The sampling rate (Hz) that a file's header says; UserError as in open_sound."""
    with open_sound(Path(path)) as sound:
        return sound.samplerate


def read_audio(path: str | Path) -> np.ndarray:
    """Any wav/flac/ogg/mp3 of up to an hour -> mono float32 (N,) at 16 kHz: the mean of the channels, or,
    where they cancel each other, the loudest of the first two. UserError (names the file) if it can't be
    read."""
    def mix(block: np.ndarray) -> np.ndarray:
        return np.stack([block.mean(1), *block[:, :2].T], 1) if block.shape[1] > 1 else block
    x = _read(path, mix)
    power = (x**2).sum(1)
    cancels = len(x) > 1 and power[0] < CANCELS * power[1:].max()
    return x[1 + int(power[1:].argmax())] if cancels else x[0]


def read_channels(path: str | Path) -> np.ndarray:
    """The same, each channel by itself: float32 (C, N) at 16 kHz."""
    return _read(path, lambda block: block)


def _read(path: str | Path, mix) -> np.ndarray:
    """mix(block (n, channels)) -> (n, k): what is kept of the channels. -> (k, N) float32 at 16 kHz."""
    path = Path(path)
    read = 0

    def blocks(sound):
        nonlocal read
        at_once = max(1, (1 << 20) // sound.channels)
        while True:
            block = sound.read(at_once, dtype="float32", always_2d=True)           # (n, channels)
            if len(block) == 0:
                return
            if not np.abs(block).max() < 1e6:  # NaN too
                raise UserError(f"{path}: holds NaN, infinite or absurdly large samples")
            read += len(block)
            yield mix(block)

    with open_sound(path) as sound:
        rate, frames = sound.samplerate, sound.frames
        pieces = list(resample_blocks(blocks(sound), rate, RATE))
    if read == 0 and path.stat().st_size > MOST_HEADER:
        raise UserError(f"{path}: its header says that it holds no samples: the length was never written, as "
                        f"where a recorder died; save it anew with an audio editor, or: {REPAIR}")
    if read == 0:
        raise UserError(f"{path}: holds no samples")
    if read < 0.9 * frames - 0.1 * rate:
        raise UserError(f"{path}: ends after {read / rate:.1f} of the {frames / rate:.1f} s that its "
                        "header says")
    return np.ascontiguousarray(np.concatenate(pieces).T)


# --- is all of it read? ---------------------------------------------------------------------------------

REPAIR = "ffmpeg -i FILE FILE.wav"
CONVERT = f"convert it anew, for example: {REPAIR}"
MOST_HEADER = 4_096  # bytes: a longer file holds more than its header                             # ASSUMED


def _unread(path: Path, sound) -> str:
    """Why a file holds another length of sound than the frames that would be read; '' where it does not, or
    where nothing is known of its format (whatever its name)."""
    cut = _cut(sound.extra_info)
    if cut:
        return cut
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic = data[:4]
        if magic == b"fLaC":
            again = max(data.find(b"fLaC" + first, 4) for first in (b"\0\0\0\x22", b"\x80\0\0\x22"))
            return f"several recordings joined in one flac file; {CONVERT}" if again > 0 else ""
        if magic == b"OggS":
            return _cut_or_joined_ogg(data)
        seconds = _mp3_seconds(data) if sound.format == "MP3" else None
    # Encoders add up to a fifth of a second at both ends, which is taken off again.
    said = sound.frames / sound.samplerate
    if seconds is None or abs(seconds - said) < 0.25:
        return ""
    return (f"holds {seconds:.2f} s of mp3 but only {said:.2f} s can be read (it lacks an index, is "
            f"cut, or several were joined); {CONVERT}")


def _cut(log: str) -> str:
    """Why a wav, AIFF, AU, W64 or RF64 file is cut, or ''. libsndfile's log says both lengths, "data : 80000
    (should be 39978)"; it ends after 2 kB: where comments fill them, the whole file's length counts."""
    whole = "" if "\ndata : " in log else "|RIFF"                  # sloppy writers get that of a wav wrong
    lengths = rf"(?m)^\s*(?:data|Data Size|FORM|riff|Riff size{whole})\s*: (\d+) \(should be (\d+)\)"
    for said, there in re.findall(lengths, log):
        known = int(said) < 0xFFFFFF00 or 1 << 32 <= int(said) < 1 << 62       # when the file was begun
        if known and int(there) < int(said):
            return f"cut off: {there} of {said} bytes are there"
    return ""


def _cut_or_joined_ogg(data) -> str:
    """An ogg file is a chain of pages (RFC 3533). The first page of a stream after other pages begins another
    recording."""
    at, past_first = 0, False
    while at + 27 <= len(data) and data[at : at + 4] == b"OggS":
        first = bool(data[at + 5] & 2)
        if first and past_first:
            return f"several recordings joined in one ogg file; {CONVERT}"
        past_first |= not first
        sizes = data[at + 27 : at + 27 + data[at + 26]]            # of the page's segments
        at += 27 + data[at + 26] + sum(sizes)
    return f"cut off: its last page is not complete; {CONVERT}" if at > len(data) else ""


# Layer III, kbit/s by the header's four bits, and Hz (ISO 11172-3; halved rates: ISO 13818-3).
MPEG1_KBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MPEG2_KBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
MPEG_RATES = (44_100, 48_000, 32_000)


def _mp3_frame(data, at: int) -> tuple[int, float] | None:
    """(bytes, seconds) of the layer III frame whose header begins at a byte, or None where none does."""
    header = int.from_bytes(data[at : at + 4], "big")
    version, layer = header >> 19 & 3, header >> 17 & 3            # version 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    kbits, rate, padding = header >> 12 & 15, header >> 10 & 3, header >> 9 & 1
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or kbits in (0, 15) or rate == 3:
        return None
    hz = MPEG_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples, table = (1_152, MPEG1_KBITS) if version == 3 else (576, MPEG2_KBITS)
    return samples // 8 * table[kbits] * 1_000 // hz + padding, samples / hz


def _mp3_seconds(data) -> float | None:
    """Length of an mp3 by its frames, without the one that holds the index; None where it has no frames that
    are understood."""
    seconds, at, in_step = 0.0, 0, False
    if data[:3] == b"ID3" and len(data) > 10:                      # a tag before the sound: 4 x 7 bits
        size = int.from_bytes(data[6:10], "big")
        at = 10 + sum((size >> 8 * k & 0x7F) << 7 * k for k in range(4))
    while at + 4 <= len(data):
        frame = _mp3_frame(data, at)
        # After anything else two in a row are asked for: the picture of a tag holds some that look like one.
        in_step = frame and (in_step or _mp3_frame(data, at + frame[0]) or at + frame[0] + 4 > len(data))
        if not in_step:
            at = data.find(b"\xff", at + 1)
            if at < 0:
                break
            continue
        index = any(word in data[at : at + min(frame[0], 64)] for word in (b"Xing", b"Info", b"VBRI"))
        if at + frame[0] <= len(data) and not index:
            seconds += frame[1]
        at += frame[0]
    return seconds or None


def refuse_overwriting(source: Path, out: Path) -> None:
    """UserError where a result would take the place of the recording that it is made of."""
    if source.exists() and out.exists() and source.samefile(out):
        raise UserError(f"--out {out}: is the input; name another file")
