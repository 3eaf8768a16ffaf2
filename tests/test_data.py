"""Claims about what a batch is made of: what is drawn, how it is padded, who reads which rows."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import make_folder

import data
from parts.codec import Codec
from parts.config import Config
from parts.progress import nonfinite_clips
from parts.recordings import AudioFolder
from parts.soundworld import SoundWorld
from sampler import LogitNormal

# --- what is drawn

@pytest.fixture(scope="module")
def cached():
    """Latents of 90 clips, and of two band-limited versions of each."""
    world = SoundWorld("val", 90)
    codec = Codec(16).fit(world.wave(i) for i in range(20))
    return data.LatentCache(world, codec, workers=0), data.LatentCache(world, codec, 2, workers=0)


def test_a_batch_depends_on_its_generator_alone(cached):
    first, again = (data.draw_batch(*cached, 8, 32, np.random.default_rng(5)) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_batches_pad_short_clips_with_a_mask_and_crop_long_ones(tmp_path):
    names = [f"{k}.wav" for k in range(10)]  # 0.2 to 1.1 s: 5 to 28 tokens
    rows = [(name, "a tone") for name in names]
    folder = AudioFolder(make_folder(tmp_path, names, rows, ("file_name", "caption"))).prepare(workers=0)
    codec = Codec(8).fit(SoundWorld("val", 4).wave(i) for i in range(4))
    z = data.LatentCache(folder, codec, workers=0)
    drawn = data.draw_batch(z, z, 64, 16, np.random.default_rng(0))
    assert drawn["x0"].shape == (64, 16, 8)
    assert not drawn["mask"].all() and drawn["mask"].all(1).any()
    for j, i in enumerate(drawn["i"]):
        n = min(16, codec.tokens(folder.lengths()[i]))
        assert drawn["mask"][j].sum() == n and (drawn["x0"][j, n:] == 0).all()
        same_place = np.array_equal(drawn["x0"][j], drawn["cond"][j])
        assert same_place, "condition and target are cut at the same place"


class Numbered:
    """Latents that say where they are from: token + 100 x version, 50 tokens a clip; versions 0 and 1 are
    band-limited, 2 and 3 their originals."""
    p, channels, variants, where = None, 1, 2, np.arange(0, 1_001, 50)

    def __len__(self):
        return 20

    def crop(self, i, start, length, variant=0):
        tokens = np.arange(start, min(start + length, 50), dtype=np.float32)
        return tokens[:, None] + 100 * variant

    def pair(self, i, start, length, variant):
        return self.crop(i, start, length, variant), self.crop(i, start, length, 2 + variant)


def test_crops_start_everywhere_and_condition_target_and_features_are_of_one_moment():
    z = Numbered()
    drawn = data.draw_batch(z, z, 600, 16, np.random.default_rng(0), z)
    x0, cond, phi = (drawn[name][..., 0] for name in ("x0", "cond", "phi"))
    assert set(x0[:, 0] % 100) == set(range(35)), "from the first start to the last"
    assert (phi == x0[:, :1] % 100 + np.arange(16)).all()
    assert (x0 == cond + 200).all() and set(cond[:, 0] // 100) == {0, 1}


def test_clips_are_drawn_with_the_probabilities_of_their_set():
    z = Numbered()
    z.p = np.where(np.arange(20) < 2, [0.25, 0.75] * 10, 0)
    i = data.choose_crops(z, None, 4_000, 16, np.random.default_rng(0)).i
    assert set(i) == {0, 1} and abs(np.mean(i) - 0.75) < 0.03
    alike = data.choose_crops(Numbered(), None, 4_000, 16, np.random.default_rng(0)).i
    assert set(alike) == set(range(20)), "None: all of them"


def test_rows_of_a_batch_are_those_of_the_whole_batch(waves):
    """The clips of each row, and the noise that is added to them."""
    z = data.LatentCache(SoundWorld("val", 64), Codec(8).fit(waves[:10]))
    whole = data.draw_batch(z, z, 12, 20, np.random.default_rng(3), z)
    crops = data.choose_crops(z, z, 12, 20, np.random.default_rng(3), slice(4, 9))
    part = data.read_crops(crops, z, z, 20, z)
    assert all(np.array_equal(part[name], whole[name][4:9]) for name in whole)
    cfg, token_ids = Config(device="cpu"), [[torch.tensor([2, 3])]] * 64
    del whole["cond"], part["cond"]
    noised = []
    for drawn, rows in ((whole, slice(None)), (part, slice(4, 9))):
        generator = torch.Generator().manual_seed(1)
        noised.append(data.add_noise(drawn, token_ids, cfg, generator, LogitNormal(0.5), 12, rows))
    whole, part = noised
    assert whole.keys() == part.keys() and all(torch.equal(part[name], whole[name][4:9]) for name in whole)


# --- as tensors

def test_tensors_are_those_arrays_with_the_wording_that_was_drawn():
    x0 = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    drawn = {"i": np.array([1, 0]), "wording": np.array([5, 2]), "x0": x0, "mask": np.ones((2, 3), bool)}
    token_ids = [[torch.tensor([7])], [torch.tensor([2, 3, 4]), torch.tensor([5, 6])]]
    batch = data.to_tensors(drawn, token_ids)
    assert np.array_equal(batch["x0"].numpy(), x0)
    assert batch["ids"].tolist() == [[5, 6], [7, 0]], "wordings are counted round; captions are padded with 0"
    assert list(batch) == ["x0", "ids"], "without padding no mask"
    drawn["mask"][1, 2:] = False
    drawn["cond"] = 2 * x0
    batch = data.to_tensors(drawn, token_ids)
    assert batch["mask"].tolist() == [[True] * 3, [True, True, False]]
    assert torch.equal(batch["cond"], 2 * batch["x0"]) and "ids" not in batch


def test_a_split_batch_is_the_batch_in_equal_parts():
    batch = {"x0": torch.randn(8, 5, 3), "t": torch.rand(8), "drop": torch.rand(8) < 0.5}
    for n in (1, 4):
        parts = data.split_batch(batch, n)
        assert [len(part["t"]) for part in parts] == [8 // n] * n
        assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)


def test_validation_is_of_held_out_clips_in_two_batches_that_are_the_same_each_time():
    clips = SimpleNamespace(val_latents=Numbered(), val_muffled=Numbered(), latents=None, muffled=None, T=16,
                            val_token_ids=None, token_ids=None)
    first, again = (data.validation_batches(clips, Config(device="cpu"), LogitNormal()) for _ in range(2))
    assert [len(batch["x0"]) for batch in first] == [64, 64]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again) for name in a)
    for name in ("x0", "eps"):
        assert not torch.equal(first[0][name], first[1][name]), f"{name}: negative control"
    (other, _) = data.validation_batches(clips, Config(device="cpu", seed=1), LogitNormal())
    assert not torch.equal(first[0]["x0"], other["x0"]), "of another seed other clips"


def test_conditions_are_dropped_as_often_as_the_settings_say():
    drawn = {"x0": np.zeros((4_000, 1, 1), np.float32), "cond": np.zeros((4_000, 1, 1), np.float32),
             "mask": np.ones((4_000, 1), bool)}
    for share in (0.0, 0.25, 1.0):
        cfg, generator = Config(device="cpu", cond_drop=share), torch.Generator().manual_seed(0)
        dropped = data.add_noise(drawn, [], cfg, generator, LogitNormal())["drop"]
        assert float(dropped.float().mean()) == pytest.approx(share, abs=0.03 * (0 < share < 1))


# --- what is not finite

def test_clips_that_are_not_finite_are_named_or_else_all_of_them():
    drawn = {"i": np.array([3, 1, 2]), "x0": np.zeros((3, 4, 2)), "cond": np.zeros((3, 4, 2))}
    train_set = SimpleNamespace(name=lambda i: f"clip {i}")
    assert nonfinite_clips(drawn, train_set) == ["clip 1", "clip 2", "clip 3"]
    drawn["cond"][1, 2, 0] = np.nan
    assert nonfinite_clips(drawn, train_set) == ["clip 1"]
