"""Shared fixtures: a private cache, commands run in this process, and one tiny finished run a task.

    tiny              settings of a run that takes a second
    t2a_run, sr_run   folders of a finished tiny run of each task: to be read, never written to
    bare              training alone: no previews, no pictures, no final table
    waves             64 SoundWorld clips (64, N)

Tiny random models of pretrained families: tests/tiny_models.py.
"""
import contextlib
import io
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before parts/cache.py is used; worker processes inherit it.
# The processes of pytest-xdist share one: what one has rendered the other need not.
TEST_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")
if TEST_RUN:
    CACHE = Path(tempfile.gettempdir()) / f"stage-audio-test-{TEST_RUN}"
else:
    CACHE = tempfile.mkdtemp(prefix="stage-audio-test-")
os.environ["STAGE_AUDIO_CACHE"] = str(CACHE)
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes side by side: their threads would fight over the cores.
    os.environ["OMP_NUM_THREADS"] = "1"

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imsave  # noqa: E402

# cool=0: at constant rates a run that is extended is the run that was longer.
TINY = dict(clips=100, width=32, depth=2, heads=2, batch=8, steps=12, eval_every=6, warmup=4, cool=0.0,
            score_clips=8, sample_steps=3, precision="fp32", device="cpu", workers=0, variants=1, channels=16)


# Drawing a figure takes longer than training a tiny network, and only tests of pictures look at it: elsewhere
# its file is one pixel.
DRAW = Figure.savefig
OF_PICTURES = ("test_best_by_step", "test_dashboard", "test_figures", "test_learning_curves", "test_plane",
               "test_spectrograms")
Figure.savefig = lambda fig, target, **how: imsave(target, [[0.5]], format="png")


@pytest.fixture(autouse=True)
def drawn_pictures(request, monkeypatch):
    """Pictures as users get them, in the tests of pictures."""
    if request.module.__name__ in OF_PICTURES:
        monkeypatch.setattr(Figure, "savefig", DRAW)


def in_process(module, *argv, cwd):
    """`python MODULE.py ARGV` in this process (starting Python and torch takes seconds): -> returncode,
    stdout, stderr."""
    from parts.errors import run_cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    old_argv, old_cwd = sys.argv, os.getcwd()
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_cli(module.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = old_argv
        os.chdir(old_cwd)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test's draws from torch's own generator don't depend on which tests its process ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_references():
    """What one test's clips are scored against is not what another's are: scoring.cached_reference."""
    if "parts.scoring" in sys.modules:
        sys.modules["parts.scoring"]._REFERENCES.clear()


@pytest.fixture(scope="session")
def tiny():
    return dict(TINY)


def made_once(name: str, settings: dict) -> Path:
    """Folder of a finished run: trained once, whichever process asks for it first."""
    import filelock

    import train

    folder = Path(f"{CACHE}-runs") / name
    folder.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        finished = folder.with_name(f"{name}.finished")
        if not finished.is_file():
            train.train({**settings, "out": str(folder)})
            finished.touch()
    return folder


def finished_run(task: str) -> Path:
    return made_once(task, {**TINY, "task": task})


@pytest.fixture(scope="session")
def t2a_run():
    """A finished tiny caption run."""
    return finished_run("t2a")


@pytest.fixture(scope="session")
def sr_run():
    """A finished tiny super-resolution run."""
    return finished_run("sr")


@pytest.fixture(scope="session", autouse=True)
def one_run_each(request, fitted_once):
    """In the whole suite each of two processes begins with a part of the clips and one of the two runs, so
    that none waits for another."""
    from parts.soundworld import SoundWorld

    shares = {"gw0": (("train", TINY["clips"]), "t2a"), "gw1": (("val", 256), "sr")}
    share = shares.get(os.environ.get("PYTEST_XDIST_WORKER"))
    if share and len(request.session.items) > 1_000:
        clips, task = share
        SoundWorld(*clips).prepare(0)
        finished_run(task)


@pytest.fixture(scope="session", autouse=True)
def fitted_once():
    """Hundreds of tiny runs have the same clips: the latent space and the mean of the teacher's features,
    half of what preparing them costs, are made for the first of them."""
    from parts import preparation
    from parts.codec import Codec

    fit, mean, codecs, means = preparation.fit_codec, preparation.feature_mean, {}, {}

    def fit_codec(codec, clips, cfg):
        if type(codec) is not Codec:
            return fit(codec, clips, cfg)
        of = clips.key, codec.channels, codec.whiten, cfg.task, cfg.seed
        if of not in codecs:
            fit(codec, clips, cfg)
            codecs[of] = {name: x.clone() for name, x in codec.state_dict().items()}, codec.explained
        state, codec.explained = codecs[of]
        codec.load_state_dict(state)

    def feature_mean(extract, latents, clips, device):
        of = clips.key, extract.key
        if device != "cpu":
            return mean(extract, latents, clips, device)
        if of not in means:
            means[of] = mean(extract, latents, clips, device)
        return means[of].clone()

    preparation.fit_codec, preparation.feature_mean = fit_codec, feature_mean


def training_alone(monkeypatch) -> None:
    """No previews, no pictures, no final table; validation on eight clips, whose 128 would take longer than a
    tiny network's steps."""
    import evaluate
    import train

    validation_loss = evaluate.validation_loss

    def of_eight_clips(net, batches):
        return validation_loss(net, [{name: x[:8] for name, x in batches[0].items()}])

    monkeypatch.setattr(evaluate, "validation_loss", of_eight_clips)
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    monkeypatch.setattr(train, "draw_pages", lambda *a: None)
    monkeypatch.setattr(train, "write_moment", lambda *a: None)
    monkeypatch.setattr(evaluate, "score", lambda *a, **k: None)


@pytest.fixture
def bare(monkeypatch):
    """Training alone."""
    training_alone(monkeypatch)


@pytest.fixture(scope="session")
def waves():
    """64 SoundWorld clips (64, N)."""
    import numpy as np

    from parts.soundworld import SoundWorld
    world = SoundWorld("val", 64)
    return np.stack([world.wave(i) for i in range(64)])
