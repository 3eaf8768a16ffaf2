"""Spectrograms: one axis of any figure, and the previews of one evaluation.

    draw_spectrogram    one axis of any figure
    draw_previews       real and generated clips side by side: a png, the wav files and their captions
    spectrogram_png     a small picture without axes, for pages

Waveforms are (N,) float32 in [-1, 1] at 16 kHz; axes are in seconds, kHz and dB. matplotlib is imported when
something is drawn.

Public: pyplot, write_figure, log_steps, draw_spectrogram, draw_previews, spectrogram_png.
"""
from __future__ import annotations

import io
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch

from parts.audio import RATE, write_wav
from parts.files import write_bytes, write_text
from parts.spectra import N_FFT, stft


def pyplot():
    """matplotlib.pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_figure(path: Path, fig) -> None:
    """A figure as png, whole or not at all; it is closed. UserError where the file can't be written."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A caption in a script that matplotlib's font lacks is drawn as boxes; pages have it as text.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        fig.savefig(picture, format="png", dpi=90)
    pyplot().close(fig)
    write_bytes(path, picture.getvalue())


def log_steps(ax) -> None:
    """A step axis that is logarithmic and reads in plain numbers: powers of two, and of fewer than three
    doublings halfway between them."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    ax.set_xscale("log", base=2)
    first, last = ax.get_xlim()
    if last < 1.3 * first:                                 # of one step: with room for ticks beside it
        first, last = ax.set_xlim(first / 1.3, last * 1.3)
    ax.xaxis.set_major_locator(LogLocator(2, (1, 1.5) if last < 8 * first else (1,)))
    ax.xaxis.set_major_formatter(ScalarFormatter())


def decibels(x: np.ndarray) -> np.ndarray:
    """(N,) -> (bins, frames) in dB, relative to full scale of the STFT; at least -100."""
    # A sine of amplitude 1 has the STFT magnitude N_FFT / 4 under a Hann window.
    magnitude = stft(torch.as_tensor(x)[None])[0].abs().numpy().T / (N_FFT / 4)
    return 20 * np.log10(np.maximum(magnitude, 1e-5))


def draw_spectrogram(ax, x: np.ndarray, title: str):
    """Spectrogram of (N,) with axes in s and kHz. Returns the image (for a colour bar)."""
    db = decibels(x)
    extent = (0, len(x) / RATE, 0, RATE / 2_000)
    image = ax.imshow(db, origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0, cmap="magma")
    lines = textwrap.wrap(title, 34)[:3]
    ax.set_title("\n".join(lines), fontsize=8, parse_math=False)  # a caption may hold dollars
    ax.tick_params(labelsize=7)
    return image


def spectrogram_png(x: np.ndarray, width: int = 128, height: int = 96, shades: int = 32) -> bytes:
    """(N,) -> a png file of about 8 kB: time from left to right, frequency from 0 at the bottom to 8 kHz,
    from -80 dB (black) to 0 dB (bright) in as many shades."""
    from matplotlib import colormaps
    from PIL import Image

    # A cell is the mean power of its bins and frames: a mean of decibels would hide a tone among silence.
    power = torch.as_tensor(10 ** (decibels(x) / 10))[None]                      # (1, bins, frames)
    cells = torch.nn.functional.adaptive_avg_pool2d(power, (height, min(width, power.shape[-1])))[0].numpy()
    level = (10 * np.log10(cells[::-1]) + 80) / 80 * (shades - 1)
    level = np.clip(level, 0, shades - 1).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(level), "P")
    # Its lightness rises with the level, so it reads in grey.
    colours = colormaps["magma"](np.linspace(0, 1, shades), bytes=True)[:, :3]
    image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True, bits=5)
    return buffer.getvalue()


# --- previews -----------------------------------------------------------------------------------------------


def draw_previews(path: Path, step: int, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write previews of a run folder: pairs of (caption, real (N,), made (N,)) -> samples/stepNNNNNN.png,
    real-K.wav, stepNNNNNN-K.wav and captions.txt ("K: caption", a line each)."""
    plt = pyplot()
    fig = plt.figure(figsize=(3.2 * len(pairs), 4.6), layout="constrained")
    axes = fig.subplots(2, len(pairs), sharex=True, sharey=True, squeeze=False)
    for column, (caption, real, made) in zip(axes.T, pairs):
        draw_spectrogram(column[0], real, caption)
        image = draw_spectrogram(column[1], made, "model")
        column[1].set_xlabel("time (s)", fontsize=8)
    axes[0, 0].set_ylabel("real\nfrequency (kHz)", fontsize=8)
    axes[1, 0].set_ylabel(f"step {step}\nfrequency (kHz)", fontsize=8)
    fig.colorbar(image, ax=axes, label="dB re full scale", shrink=0.7)

    samples = path / "samples"
    write_figure(samples / f"step{step:06d}.png", fig)
    for k, (_, real, made) in enumerate(pairs):
        write_wav(samples / f"real-{k}.wav", real)
        write_wav(samples / f"step{step:06d}-{k}.wav", made)
    captions = "".join(f"{k}: {caption}\n" for k, (caption, _, _) in enumerate(pairs))
    write_text(samples / "captions.txt", captions)
