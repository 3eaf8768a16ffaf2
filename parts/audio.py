"""Waveforms: the project's sampling rate, resampling, cutting, writing. Everything here is numpy, (N,)
float32 in [-1, 1].

Public: RATE, CLIP_S, resample, resample_blocks, first_seconds, in_segments, ACTIVE_RMS, active_rms,
without_rumble, gains_to_level, at_level, with_added, write_wav, read_wav, scaled_note, mu_law_wav.
"""
from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.io.wavfile
import scipy.signal
from tqdm import tqdm

from parts.errors import UserError
from parts.files import write_bytes

RATE = 16_000  # Hz; every waveform inside the project has this rate
CLIP_S = 2.56  # s; 40,960 samples = 128 codec frames = 64 tokens


def resample(x: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling (scipy), (N,) -> (ceil(N to / rate),) float32."""
    if rate == to:
        return x.astype(np.float32)
    divisor = np.gcd(int(rate), int(to))
    return scipy.signal.resample_poly(x, to // divisor, rate // divisor).astype(np.float32)


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, to: int) -> Iterator[np.ndarray]:
    """`resample` for a long recording (N, channels) that comes in blocks (n, channels) -> blocks whose sum of
    lengths is ceil(N to / rate): the same numbers, without the whole of it in memory."""
    if rate == to:
        yield from (block.astype(np.float32) for block in blocks)
        return
    divisor = np.gcd(int(rate), int(to))
    up, down = to // divisor, rate // divisor

    # resample_poly's filter reaches 10 max(up, down) / up samples to each side. Pieces begin and end at
    # multiples of `down`, where an output sample stands on an input sample.
    reach = down * -(-10 * max(up, down) // (up * down))
    length = down * -(-max(4 * reach, 1 << 16) // down)
    waiting = []  # blocks of input, from the context of the next piece on
    before = 0    # of their samples, those done already: they are context of the filter alone

    def resampled(x: np.ndarray, skip_first: int, skip_last: int) -> np.ndarray:
        y = scipy.signal.resample_poly(x, up, down, axis=0).astype(np.float32)
        return y[skip_first * up // down : len(y) - skip_last * up // down]
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) < before + length + reach:
            continue
        x = np.concatenate(waiting)
        n = (len(x) - before - reach) // down * down               # samples that can be done now
        yield resampled(x[: before + n + reach], before, reach)
        x = x[max(0, before + n - reach) :]
        waiting, before = [x], reach
    if waiting:
        yield resampled(np.concatenate(waiting), before, 0)


def first_seconds(x: np.ndarray, seconds: float) -> np.ndarray:
    """The first `seconds` of (N,); a shorter clip is padded with silence."""
    n = round(seconds * RATE)
    return np.pad(x[:n], (0, max(0, n - len(x))))


def in_segments(process, n: int, segment: int, fade: int, desc: str = "") -> np.ndarray:
    """A signal (n,) that is made piece by piece, so that memory does not grow with its length.

    process(start, stop) -> (stop - start,): a piece of `segment` samples or fewer. Pieces overlap by `fade`
    samples and are taken to be independent there, as noise and searched phases are: squared weights sum to 1,
    so that their power does not dip (with weights that sum to 1 it would fall by 3 dB). desc: of the progress
    bar, which is shown where there are several pieces."""
    starts = [0] if n <= segment else list(range(0, n - fade, segment - fade))
    out, rise = np.zeros(n, np.float32), np.sqrt((np.arange(fade) + 0.5) / fade)
    for k, start in enumerate(tqdm(starts, desc=desc, unit="segment", disable=not desc or len(starts) == 1)):
        stop = min(start + segment, n)
        weight = np.ones(stop - start)
        if k > 0:
            weight[:fade] = rise
        if stop < n:
            weight[-fade:] *= rise[::-1]
        out[start:stop] += weight * process(start, stop)
    return out


# --- levels ---------------------------------------------------------------------------------------------

ACTIVE_RMS = 0.06              # of what super-resolution is given: median of SoundWorld's, -24 dB
FRAME = 320                    # samples, 20 ms
SOUNDS_DB = 40                 # a frame sounds if it is at most this far below the loudest  # ASSUMED
SILENT_DB = 70                 # and is silent from this far below it on  # ASSUMED
RUMBLE_HZ = 40                 # below this there is only rumble,  # ASSUMED
RUMBLES = 1.12                 # which counts where it makes the level 1 dB higher  # ASSUMED


def _frame_power(x: np.ndarray) -> np.ndarray:
    """Mean power of each frame of (N,), the last one padded with silence."""
    padded = np.pad(x, (0, -len(x) % FRAME)).astype(np.float64)
    return (padded.reshape(-1, FRAME) ** 2).mean(1)


def active_rms(x: np.ndarray) -> float:
    """RMS of (N,) over the frames in which something sounds; 0 for silence."""
    power = _frame_power(x)
    return float(np.sqrt(power[power >= power.max() * 10 ** (-SOUNDS_DB / 10)].mean()))


def without_rumble(x: np.ndarray) -> np.ndarray:
    """(N,) without what lies below 40 Hz, where that is loud: a constant offset, wind, handling. What lies
    there no model is trained to use, but the level of the recording would be its level."""
    sections = scipy.signal.butter(8, RUMBLE_HZ, "highpass", fs=RATE, output="sos")
    # In blocks, since it works in float64; each with a second on either side, after which nothing rings on.
    y, block = np.empty(len(x), np.float32), 1 << 20
    for start in range(0, len(x), block):
        before = min(start, RATE)
        part = x[start - before : start + block + RATE]
        filtered = scipy.signal.sosfiltfilt(sections, part, padlen=min(len(part) - 1, RATE // 4))
        y[start : start + block] = filtered[before : before + block]
    return y if active_rms(x) > RUMBLES * active_rms(y) else x


def silence_gate(x: np.ndarray) -> np.ndarray:
    """(N,) from 0 where x is silent, relative to its loudest frame, to 1 where it is 10 dB above that."""
    # Rumble alone is silence; so is what the filter makes of silence after a sound.
    power = np.minimum(_frame_power(x), _frame_power(without_rumble(x)))
    loudest = power.max() or 1.0                                   # of silence everything is silent
    above_db = 10 * np.log10(np.maximum(power / loudest, 1e-30)) + SILENT_DB
    centres = (np.arange(len(power)) + 0.5) * FRAME
    return np.interp(np.arange(len(x)), centres, (above_db / 10).clip(0, 1)).astype(np.float32)


def gains_to_level(waves: np.ndarray, rms: float) -> np.ndarray:
    """(B, N) -> gains (B, 1) that bring each to an active RMS; 1 for silence."""
    own = np.array([active_rms(x) for x in waves])[:, None]
    return np.where(own > 0, rms / np.maximum(own, 1e-12), 1.0)


def at_level(waves: np.ndarray, rms: float = ACTIVE_RMS, rumble=True) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) -> each at an active RMS, and the gains (B, 1) that this took: what is made of a recording must
    not depend on how loud it is. Silence stays as it is. rumble: keep it."""
    if not rumble:
        waves = np.stack([without_rumble(x) for x in waves])
    gains = gains_to_level(waves, rms)
    return (waves * gains).astype(np.float32), gains


def with_added(waves: np.ndarray, added: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """(B, N) and what was added to it at the level of at_level; nothing where it is silent itself."""
    gate = np.stack([silence_gate(x) for x in waves])
    return (waves + gate * added / gains).astype(np.float32)


def write_wav(path: str | Path, x: np.ndarray, bits: int = 16) -> float:
    """Write (N,) or (N, channels) float in [-1, 1] as 16 kHz wav of 16 bits (scipy) or 24 (soundfile);
    louder sounds are scaled down, never clipped. -> the factor of that, 1 where nothing was scaled. UserError
    for NaN and infinities: there is no such sound."""
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise UserError(f"{path}: not written: the sound that was made is not finite")
    factor, file = 1 / max(1.0, np.abs(x).max(initial=0)), io.BytesIO()
    if bits == 16:
        scipy.io.wavfile.write(file, RATE, np.round(x * factor * 32_767).astype(np.int16))
    else:
        import soundfile  # some machines that train lack it
        soundfile.write(file, x * factor, RATE, "PCM_24", format="WAV")
    write_bytes(Path(path), file.getvalue())
    return factor


def read_wav(path: str | Path) -> np.ndarray:
    """What write_wav wrote -> (N,) float32."""
    return scipy.io.wavfile.read(path)[1].astype(np.float32) / 32_767


def scaled_note(factor: float) -> str:
    """What to say where write_wav had to scale."""
    return f"; {20 * np.log10(factor):.1f} dB quieter, to fit full scale" if factor < 1 else ""


def mu_law_wav(x: np.ndarray) -> bytes:
    """(N,) float in [-1, 1] -> a 16 kHz wav file of one byte a sample, which browsers play: mu-law (ITU-T
    G.711), about 38 dB of signal to noise at any level above -40 dB."""
    # magnitude + 33/8192 of full scale = 2^segment (1 + step / 16), both stored; all bits inverted   # G.711
    biased = np.minimum(np.round(np.abs(x) * 32_767), 32_635).astype(np.int64) + 132
    segment = np.floor(np.log2(biased)).astype(np.int64) - 7           # 0 to 7
    step = (biased >> (segment + 3)) & 15
    codes = ~(np.where(x < 0, 128, 0) | segment << 4 | step) & 255

    # fmt: tag 7, channels, rate, bytes a second, bytes a frame, bits, no extension; fact: samples.
    head = struct.pack("<4sIHHIIHHH4sII", b"fmt ", 18, 7, 1, RATE, RATE, 1, 8, 0, b"fact", 4, len(codes))
    body = struct.pack("<4sI", b"data", len(codes)) + codes.astype(np.uint8).tobytes()
    body += b"\0" * (len(codes) % 2)                                  # chunks are of even length
    return struct.pack("<4sI4s", b"RIFF", 4 + len(head) + len(body), b"WAVE") + head + body
