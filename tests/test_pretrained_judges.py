"""Claims about judges from outside: CLAP scores are the model's own, distances grow with difference."""
import json

import numpy as np
import pytest
import torch
import torchaudio.functional as TAF
from conftest import in_process
from tiny_models import noise, tiny_model

import evaluate
from parts.audio import RATE
from parts.errors import UserError
from parts.pretrained_judges import Clap, Embedder, _most_tokens
from parts.scoring import pretrained_scores


@pytest.mark.parametrize("kind", ["clap", "clap-fused"])
def test_clap_embeds_captions_and_sounds_on_one_sphere_whatever_the_batch(tmp_path, kind):
    clap = Clap(str(tiny_model(kind, tmp_path)))
    waves = noise(20_000, 3).numpy()
    long = noise(12 * RATE, 3).numpy()
    assert np.array_equal(clap.audio(long), clap.audio(long)), "no random crops"
    assert np.allclose(clap.audio(long), clap.audio(long[:, : 10 * RATE]), atol=1e-2), "no random crops"

    audio = clap.audio(waves)
    text = clap.text(["a dog", "rain and wind", "a dog"])
    assert audio.shape[1] == text.shape[1]
    assert np.allclose(np.linalg.norm(audio, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert np.allclose(text[0], text[2], atol=1e-6) and not np.allclose(text[0], text[1], atol=1e-3)
    assert np.allclose(clap.audio(waves, batch=1), audio, atol=1e-5)
    assert np.allclose(clap.text(["a dog"]), text[:1], atol=1e-5), "padding must not matter"
    with pytest.raises(UserError, match="a hubert model; a CLAP model"):
        Clap(str(tiny_model("hubert", tmp_path / "h")))


def test_captions_longer_than_clap_reads_are_counted_in_one_line_and_cut_there(tmp_path, capsys):
    """40 tokens, two of them its own marks. Negative control: none is longer, nothing is said."""
    clap = Clap(str(tiny_model("clap", tmp_path)))
    longest = " ".join(["dog"] * 38)
    exact = clap.text([longest, "rain"])
    assert capsys.readouterr().out == ""
    cut = clap.text([longest + " wind" * 3, "rain"])
    said = capsys.readouterr().out
    assert "1 of 2 captions have more than the 40 tokens that it reads" in said and said.count("\n") == 1
    assert np.allclose(cut, exact, atol=1e-6)


def test_the_text_tower_says_how_much_is_read_where_the_tokenizer_does_not(tmp_path):
    clap = Clap(str(tiny_model("clap", tmp_path)))
    clap.tokenizer.model_max_length = 10**30
    table = clap.model.text_model.embeddings.position_embeddings.weight
    assert _most_tokens(clap.tokenizer, clap.model.config.text_config) == len(table) - 1


@pytest.mark.parametrize("kind", ["clap", "wavlm"])
def test_any_audio_model_gives_one_embedding_a_clip(tmp_path, kind):
    embedding = Embedder(str(tiny_model(kind, tmp_path))).audio(noise(9_000, 5).numpy(), batch=2)
    assert embedding.shape[0] == 5 and embedding.dtype == np.float32 and np.isfinite(embedding).all()


def own_cosines(clap, waves, captions):
    """Cosine of each clip with its caption by the model's joint forward pass."""
    x = TAF.resample(torch.from_numpy(waves), RATE, 48_000)
    audio = clap.extractor([wave.numpy() for wave in x], sampling_rate=48_000, return_tensors="pt")
    text = clap.tokenizer(captions, padding=True, return_tensors="pt")
    inputs = {**audio, **text}
    inputs.pop("token_type_ids", None)
    joint = clap.model(**inputs)
    return (joint.logits_per_audio.diag() / clap.model.logit_scale_a.exp()).tolist()


def test_the_clap_score_is_the_models_own_cosine_and_distances_grow_with_difference(tmp_path, waves):
    """Oracle: the model's joint forward pass. KID in a model's space: real clips are nearer to other real
    clips than noise is."""
    clap = Clap(str(tiny_model("clap", tmp_path / "clap")))
    embedder = Embedder(str(tiny_model("wavlm", tmp_path / "wavlm")))
    captions = ["a dog barking", "rain and wind", "low bell", "high bell then rain"]
    found = pretrained_scores({"x": waves[:4]}, captions, waves[32:], clap, embedder)["x"]
    own = np.mean(own_cosines(clap, waves[:4], captions))
    low, high = found["clap_score"]["interval"]
    assert abs(found["clap_score"]["mean"] - own) < 1e-5 and low <= own <= high
    assert "frechet_model" not in found, "too few clips"

    rows = {"real": waves[:32], "hiss": noise(40_960, 32).numpy()}
    found = pretrained_scores(rows, [], waves[32:], None, embedder)
    assert found["real"]["kid_model"] < 0.2 * found["hiss"]["kid_model"]


def test_a_run_is_scored_by_pretrained_models_and_the_protocol_names_them(t2a_run, tmp_path):
    clap = tiny_model("clap", tmp_path / "clap")
    wavlm = tiny_model("wavlm", tmp_path / "wavlm")
    done = in_process(
        evaluate, "score", t2a_run, "--clips", 6, "--clap", clap, "--audio-model", wavlm,
        "--out", tmp_path / "s.json", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "s.json").read_text()).values()
    protocol = result["protocol"]
    assert str(clap) in protocol["clap"] and "48000 Hz" in protocol["clap"]
    assert str(wavlm) in protocol["embedder"] and protocol["candidates"] == 1
    assert all({"clap_score", "kid_model", "kid", "exact"} <= set(row) for row in result["rows"])
    done = in_process(evaluate, "score", t2a_run, "--clap", wavlm, cwd=tmp_path)
    assert done.returncode == 2 and "a CLAP model" in done.stderr
