"""Claims about the round trip through a latent space: it is scored clip by clip."""
import json

import numpy as np
import pytest
import torch
from conftest import in_process
from folders import write_tone
from tiny_models import tiny_model, write_recordings

import evaluate
from lab import score_codec
from parts.audio import CLIP_S, first_seconds
from parts.codec import Codec
from parts.metrics import log_power, lsd
from parts.recordings import AudioFolder


@pytest.mark.parametrize("kind", ["mel", "dac"])
def test_the_round_trip_of_a_latent_space_is_scored_before_anything_is_trained(waves, tmp_path, kind):
    """Oracle: the same metrics of the codec itself, clip by clip. Wide latents also without the PCA."""
    (tmp_path / "recordings").mkdir()
    folder = write_recordings(tmp_path / "recordings", waves)
    name = "mel" if kind == "mel" else str(tiny_model("dac", tmp_path / "dac"))
    done = in_process(
        score_codec, name, "--data", folder, "--val-fold", 3, "--channels", 16, "--out", tmp_path / "s.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "s.json").read_text())
    names = [row["row"] for row in result["rows"]]
    assert names == (["16 channels"] if kind == "mel" else ["all 64", "16 channels"])
    assert result["protocol"]["tokens_per_s"] == (25 if kind == "mel" else 50)
    if kind == "mel":
        assert abs(result["rows"][0]["lsd"]["mean"] - mel_round_trip_lsd(folder, channels=16)) < 1e-3
    assert in_process(score_codec, cwd=tmp_path).returncode == 2
    assert in_process(evaluate, "score", cwd=tmp_path).returncode == 2


def test_too_little_sound_and_files_that_cannot_be_read_end_in_one_line(tmp_path):
    for k in range(2):
        write_tone(tmp_path / "set" / "class" / f"{k}.wav", 0.02)
    done = in_process(score_codec, "mel", "--data", "set", "--clips", 2, cwd=tmp_path)
    assert done.returncode == 2 and "give more sound, or fewer --channels" in done.stderr
    (tmp_path / "set" / "class" / "bad.wav").write_text("none")
    asked = ("mel", "--data", "set", "--channels", 2, "--clips", 2)
    done = in_process(score_codec, *asked, cwd=tmp_path)
    assert done.returncode == 2 and "bad.wav" in done.stderr
    done = in_process(score_codec, *asked, "--max-bad-share", 0.5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def mel_round_trip_lsd(folder, channels):
    """Mean LSD of the embedded codec on the test clips of a folder, fitted on its training clips."""
    train = AudioFolder(folder, "train", 3).prepare(0)
    test = AudioFolder(folder, "test", 3).prepare(0)
    codec = Codec(channels).fit(first_seconds(train.wave(i), CLIP_S) for i in range(len(train)))
    distances = []
    for i in range(len(test)):
        x = first_seconds(test.wave(i), CLIP_S)
        y = codec.decode(codec.encode(torch.from_numpy(x)[None]))[0, : len(x)].numpy()
        distances.append(lsd(log_power(x), log_power(y))["lsd"])
    return np.mean(distances)
