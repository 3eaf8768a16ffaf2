"""Shared fixtures: a private cache, and one tiny run a task that many tests use."""
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["STAGE_AUDIO_CACHE"] = tempfile.mkdtemp(prefix="stage-audio-test-")  # before data.py is used; workers inherit it
os.environ["MPLBACKEND"] = "Agg"

TINY = dict(clips=100, width=32, depth=2, heads=2, batch=8, steps=12, eval_every=6, warmup=4, score_clips=8, sample_steps=3,
            precision="fp32", device="cpu", workers=0, variants=1, channels=16)


def in_process(module, *argv, cwd):
    """`python MODULE.py ARGV` in this process (starting Python and torch takes seconds): -> returncode, stdout, stderr."""
    import contextlib
    import io
    import types
    import data
    out, err, old_argv, old_cwd, code = io.StringIO(), io.StringIO(), sys.argv, os.getcwd(), 0
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            data.run_cli(module.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = old_argv
        os.chdir(old_cwd)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="session")
def tiny():
    return dict(TINY)


@pytest.fixture(scope="session")
def t2a_run(tmp_path_factory):
    """A finished tiny caption run."""
    import train
    return train.train({**TINY, "task": "t2a", "out": str(tmp_path_factory.mktemp("runs") / "t2a")})


@pytest.fixture(scope="session")
def sr_run(tmp_path_factory):
    """A finished tiny super-resolution run."""
    import train
    return train.train({**TINY, "task": "sr", "out": str(tmp_path_factory.mktemp("runs") / "sr")})


@pytest.fixture(scope="session")
def waves():
    """64 SoundWorld clips (64, N)."""
    import numpy as np
    import data
    world = data.SoundWorld("val", 64)
    return np.stack([world.wave(i) for i in range(64)])
