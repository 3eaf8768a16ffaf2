"""Claims about the embedded SSL teacher and its features at the times of tokens.

align_to_tokens is tested where teachers have other frame rates: tests/test_pretrained_teacher.py."""
import numpy as np
import pytest
import torch

from parts.codec import Codec
from parts.latents import LatentCache
from parts.soundworld import SoundWorld
from parts.teacher import WEIGHTS, Teacher, TeacherFeatures, feature_mean, load_teacher, random_teacher


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size < 4e6


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m lab.pretrain_teacher"):
        load_teacher(tmp_path / "none.safetensors")


def test_the_shipped_teacher_is_frozen():
    teacher = load_teacher()
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_the_random_control_is_repeatable_and_draws_nothing_from_the_common_stream():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    a, b, c = random_teacher(0), random_teacher(0), random_teacher(1)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(a.join.weight, b.join.weight) and not torch.equal(a.join.weight, c.join.weight)
    assert not any(p.requires_grad for p in a.parameters()) and not a.training


def test_features_are_one_a_token_and_in_time_with_the_mel():
    """A change in mel frame f moves the features of token f // 2 most."""
    teacher = load_teacher()
    mel = torch.full((1, 128, 64), -6.0)
    base = teacher(mel)
    assert base.shape == (1, 64, teacher.features)
    for frame in (20, 61, 100):
        other = mel.clone()
        other[:, frame, 10:40] = 0.0
        moved = (teacher(other) - base).norm(dim=-1)[0]
        assert abs(int(moved.argmax()) - frame // 2) <= 1


def test_features_of_latents_are_those_of_their_mel_frames(waves):
    codec = Codec(32).fit(waves[:20])
    extract = TeacherFeatures(codec, load_teacher())
    x = torch.as_tensor(waves[:3])
    z = codec.encode(x)
    assert torch.equal(extract.encode(x), extract(z))
    assert torch.allclose(extract(z), extract.teacher(codec.decode_mel(z)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = extract(z)
    assert torch.equal(inside, extract(z)), "D compares features of one precision"
    assert extract.tokens(40_960) == codec.tokens(40_960) and extract.key != codec.key
    other = TeacherFeatures(Codec(16).fit(waves[:20]), load_teacher())
    assert other.key != extract.key, "features of another codec must not be taken from its cache"


class WaveTeacher(torch.nn.Module):
    """A teacher of waveforms: level and peak of each 20 ms."""
    takes, rate, first, features, key = "wave", 50.0, 0.01, 2, "levels"

    def forward(self, wav):
        frames = wav.unfold(1, 320, 320)
        return torch.stack([frames.square().mean(-1), frames.abs().amax(-1)], -1)


def test_a_teacher_of_waves_gets_the_recording_itself(waves):
    """And what the codec decodes where there are latents alone; two of its frames are one token."""
    codec = Codec(32).fit(waves[:20])
    extract = TeacherFeatures(codec, WaveTeacher())
    x = torch.as_tensor(waves[:3])
    expected = WaveTeacher()(x).unflatten(1, (64, 2)).mean(2)      # (3, 64, 2)
    assert torch.allclose(extract.encode(x), expected, atol=1e-6)
    z = codec.encode(x)
    decoded = WaveTeacher()(codec.decode(z)).unflatten(1, (64, 2)).mean(2)
    assert torch.allclose(extract(z), decoded, atol=1e-6)
    assert not torch.allclose(decoded, expected, atol=1e-3), "negative control: the codec loses something"
    assert extract.key == f"{codec.key}-phi-levels"


def test_the_data_set_mean_is_that_of_all_tokens_and_ignores_a_broken_clip(waves):
    codec = Codec(32).fit(waves[:20])
    world = SoundWorld("val", 12)
    latents = LatentCache(world, codec, workers=0)
    extract = TeacherFeatures(codec, load_teacher())
    mean = feature_mean(extract, latents, world, "cpu")
    phi = torch.cat([extract(torch.from_numpy(latents.crop(i, 0, 64))[None])[0] for i in range(12)])
    assert mean.shape == (Teacher().features,)
    assert (mean - phi.mean(0)).norm() < 0.1 * mean.norm(), "clips meet their neighbours at the seams only"

    latents.z = np.array(latents.z)
    latents.z[100] = np.nan
    assert torch.isfinite(feature_mean(extract, latents, world, "cpu")).all()
