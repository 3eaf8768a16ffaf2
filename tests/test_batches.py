"""Claims about batches on their way to a device: what is gathered there or drawn ahead is what would have
been read; how long captions are padded."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended_gpu import pretend

import data
import model
from parts import batches
from parts.config import Config


def choose(latents, muffled, batch, length, rng, rows) -> dict:
    """A stand-in for data.choose_crops: what the generator says."""
    return rng.integers(0, 1 << 30, batch)[rows]


def read(crops, latents, muffled, length, phi) -> dict:
    """And for data.read_crops: the same, and whether phi was asked for."""
    return {"i": crops, "x0": np.float32(crops), "phi asked": phi is not None}


def prefetcher(device) -> data.Prefetcher:
    latents = SimpleNamespace(channels=3, z=np.zeros((5, 3)))
    clips = SimpleNamespace(latents=latents, muffled=SimpleNamespace(z=latents.z), T=4,
                            phi=SimpleNamespace(z=latents.z))
    return data.Prefetcher(Config(batch=8, device=device), clips, choose, read)


def test_what_is_drawn_ahead_is_what_would_have_been_drawn():
    """The thread that a GPU run uses gives each step the same clips, noise and generator, also where guidance
    is switched on in between."""
    with pretend(free=1):
        plain, ahead = prefetcher("cpu"), prefetcher("cuda")
        plain.rows = ahead.rows = slice(2, 5)
        assert plain.pool is None and ahead.pool is not None and ahead.resident is None
        for step, with_phi in ((1, False), (2, False), (3, True), (4, True), (9, True)):
            (now, generator), (before, its_generator) = plain(step, with_phi), ahead(step, with_phi)
            assert np.array_equal(now["x0"], before["x0"]) and len(now["i"]) == 3
            assert now["phi asked"] == before["phi asked"] == with_phi
            eps = torch.randn(8, 4, 3, generator=generator)[2:5]
            assert torch.equal(eps, before["eps"]) and "eps" not in now
            assert torch.equal(torch.rand(2, generator=generator), torch.rand(2, generator=its_generator))
        ahead.pool.shutdown()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_processes_of_a_job_share_the_rows_of_a_batch(monkeypatch, world):
    whole = prefetcher("cpu")(1, False)[0]["i"]
    monkeypatch.setattr(batches, "WORLD", world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(batches, "RANK", rank)
        shares.append(prefetcher("cpu")(1, False)[0]["i"])
    assert {len(share) for share in shares} == {8 // world}
    assert np.array_equal(np.concatenate(shares), whole)


def test_rows_are_cut_out_by_index_with_zeros_behind_their_end():
    """Against a loop; a broken value behind the end of a clip does not get into it."""
    rows = torch.randn(20, 2, 3)
    rows[9] = float("nan")
    first, count, variant = torch.tensor([4, 15, 0]), torch.tensor([5, 5, 2]), torch.tensor([1, 0, 1])
    found = batches.cut_rows(rows, first, count, 6, variant)
    for j, (start, n, v) in enumerate(zip(first, count, variant)):
        assert torch.equal(found[j, :n], rows[start : start + n, v]) and not found[j, n:].any()
    assert batches.cut_rows(torch.arange(9), first[:1], count[:1], 7).tolist() == [[4, 5, 6, 7, 8, 0, 0]]


def test_captions_are_padded_to_few_lengths():
    lengths = {batches.padded_words(n, False) for n in range(1, 41)}
    assert lengths == {16, 32, 40} and all(batches.padded_words(n, False) >= n for n in range(1, 41))
    assert {batches.padded_words(n, True) for n in range(2, 66)} == {17, 33, 49, 65}


def test_padding_of_captions_changes_no_prediction():
    """What is padded is not attended to. Negative control: another word is."""
    torch.manual_seed(0)
    net = model.DiT(8, 32, 2, 2, vocab=20)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, ids = torch.randn(2, 12, 8), torch.rand(2), torch.tensor([[3, 4, 5], [6, 0, 0]])
    padded = torch.nn.functional.pad(ids, (0, 13))
    other = padded.clone()
    other[:, 5] = 7
    predictions = [net(x, t, net.encode_text(some)) for some in (ids, padded, other)]
    assert torch.allclose(predictions[0], predictions[1], atol=1e-5)
    assert not torch.allclose(predictions[0], predictions[2], atol=1e-3)


def test_on_a_cpu_a_batch_is_left_as_it_is():
    batch = {"x0": torch.randn(2, 3, 4), "ids": torch.ones(2, 5, dtype=torch.long)}
    assert all(batches.to_device(batch, "cpu")[name] is value for name, value in batch.items())
    with pretend() as gpu:
        there = batches.to_device(batch, "cuda")
        assert there["ids"].shape == (2, 16) and there["x0"].is_cuda and not gpu.waits


def test_data_too_large_for_the_gpu_is_said_to_be_read_from_disk(capsys):
    with pretend(free=1):
        run = prefetcher("cuda")
    assert run.resident is None and "read from disk step by step" in capsys.readouterr().out
