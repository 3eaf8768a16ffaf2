"""Small folders of recordings, for the tests of what reads them.

Public: sine, write_tone, make_folder, captions_of, nonempty, run_unprivileged.
"""
import csv
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from parts.audio import RATE
from parts.errors import UserError
from parts.recordings import AudioFolder


def sine(seconds=0.5, rate=RATE, hz=440.0, level=0.3):
    """A pure tone (N,) float32."""
    t = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def write_tone(path, seconds=0.5, rate=RATE, hz=440.0, level=0.5):
    """A pure tone as a file, and its folder where there is none; returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sine(seconds, rate, hz, level), rate)
    return path


def make_folder(root, names, rows, header, meta="metadata.csv"):
    """Tones of 0.2 s, 0.3 s ... under `names`, and a csv; returns root."""
    root.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        write_tone(root / name, 0.2 + 0.1 * k, level=0.3)
    with open(root / meta, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return root


def captions_of(folder, split, **how):
    """{file name: its captions} of a split."""
    clips = AudioFolder(folder, split, **how)
    return {path.name: captions for path, captions in zip(clips.paths, clips.captions)}


def nonempty(folder, split):
    """Has the folder clips of this split?"""
    try:
        return len(AudioFolder(folder, split)) > 0
    except UserError:
        return False


def run_unprivileged(code, *argv):
    """stderr of `python -c CODE ARGV`, run by someone who may not open every file, as root may."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    if os.geteuid() == 0:
        if not shutil.which("capsh"):
            pytest.skip("root may open every file, and capsh is missing")
        drop = "--drop=cap_dac_override,cap_dac_read_search"
        command = ["capsh", drop, "--", "-c", shlex.join(command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
