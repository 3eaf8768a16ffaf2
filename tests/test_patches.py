"""Claims about random patches, what the self-supervised teacher is trained on."""
import numpy as np
import torch

from parts import patches, synths
from parts.patches import RandomPatches
from parts.soundworld import SOUNDS
from parts.spectra import log_mel
from parts.teacher import pool


def test_random_patches_are_repeatable_audible_and_their_pairs_related():
    world, again = RandomPatches(40), RandomPatches(40)
    pairs = np.stack([world.pair(i) for i in range(40)])                         # (40, 2, N)
    assert np.array_equal(pairs[7], again.pair(7))
    assert np.isfinite(pairs).all() and np.abs(pairs).max() <= 0.951
    assert np.sqrt((pairs**2).mean(-1)).min() > 1e-3 and not np.array_equal(pairs[:, 0], pairs[:, 1])
    mel = pool(log_mel(torch.from_numpy(pairs).flatten(0, 1))).reshape(40, 2, -1)
    apart = (mel[:, 0, None] - mel[None, :, 1]).norm(dim=-1)                     # (40, 40)
    assert apart.diagonal().mean() < 0.75 * apart.mean()


def test_the_patches_are_those_that_the_shipped_teacher_knows():
    """If this fails, a random draw has moved: raise RandomPatches.version and train the teacher again."""
    world = RandomPatches(2)
    assert (world.version, world.key) == (1, "patches-1bc40b2a2a200cd9")
    assert np.allclose(np.std(world.pair(1), axis=-1), [0.0139797, 0.0515829], rtol=1e-4)


def test_every_source_passes_through_every_gate():
    rng = np.random.default_rng(0)
    for source in patches.SOURCES:
        for gate in patches.GATES:
            patch = patches.Patch(source, gate, rng.uniform(0.2, 0.8, 40), 0.1, 0.9)
            x = patches.render_patch(patch, 40_960, rng)
            assert x.shape == (40_960,) and np.isfinite(x).all(), (source, gate)
            assert abs(synths.loudness(x) - 1) < 1e-6, (source, gate)


def test_patches_know_nothing_of_soundworld(monkeypatch):
    """No recipe, name or factor of the judged world is used: its synthesizers could be removed and every
    patch would be the same."""
    before = RandomPatches(4).pair(3)
    for sound in SOUNDS:
        name = sound.synth.__name__
        assert getattr(patches, name, None) is not sound.synth
        monkeypatch.delattr(synths, name)
    assert np.array_equal(RandomPatches(4).pair(3), before)
