"""Claims about pretrained parts, each family as a tiny random model of its real class, saved as a hub repository would hold it."""
import json

import numpy as np
import pytest
import torch
import torchaudio.functional as TAF

import data
import evaluate
import pretrained as P
from conftest import in_process, tiny_model

CONV = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")
TEACHERS = (*CONV, "whisper", "audio-spectrogram-transformer", "clap", "usad")
RATES = dict.fromkeys(TEACHERS, 50.0) | {"audio-spectrogram-transformer": 10.0, "clap": 3.2}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    made = {}
    def get(kind, **how):
        if kind not in made:
            made[kind] = tiny_model(kind, tmp_path_factory.mktemp(kind))
        return P.PretrainedTeacher(str(made[kind]), trust=kind == "usad", **how)
    return get


def noise(n, batch=2, seed=0):
    return 0.1 * torch.randn(batch, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_of_each_family_gives_frames_for_any_length_and_is_frozen(teacher, kind):
    t = teacher(kind)
    assert t.rate == RATES[kind] and not any(p.requires_grad for p in t.parameters()) and not t.training
    for n in (data.RATE, 40_960, 12_345, 700):
        phi = t(noise(n))
        assert phi.shape == (2, int(np.ceil(round(n / data.RATE * t.rate, 6))), t.features) and phi.dtype == torch.float32 and phi.isfinite().all()
    assert torch.equal(t(noise(12_345)), t(noise(12_345))) and not torch.allclose(t(noise(12_345)), t(noise(12_345, seed=1)), atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in TEACHERS if k not in ("clap", "usad")])
def test_layers_are_chosen_by_number_and_the_last_is_the_default(teacher, kind):
    x = noise(8_000)
    first, second, last = teacher(kind, layer=1)(x), teacher(kind, layer=2)(x), teacher(kind)(x)
    assert torch.equal(second, last) and not torch.allclose(first, last, atol=1e-3)
    with pytest.raises(data.UserError, match="layers 1 to 2"):
        teacher(kind, layer=3)


@pytest.mark.parametrize("kind", CONV)
def test_a_click_moves_the_conv_front_most_in_the_frame_that_its_time_names(teacher, kind):
    """Frame j is said to be centred at first + j / rate. Negative control: without the padding the same click is found 40 samples off
    centre and the last cell has no frame."""
    t, n = teacher(kind), 16_000
    front = t.model.feature_extractor
    quiet = 0.01 * noise(n, 1)
    pad = lambda x: torch.nn.functional.pad(x, (t.pad // 2, t.pad - t.pad // 2))
    for at in (0.25, 0.505, 0.9):
        clicked = quiet.clone()
        clicked[0, round(at * n)] += 1.0
        moved = (front(pad(clicked)) - front(pad(quiet))).square().sum(1)[0]
        assert abs(t.first + float(moved.argmax()) / t.rate - at) <= 0.5 / t.rate + 1e-9
    assert front(quiet).shape[-1] == 49 and front(pad(quiet)).shape[-1] == t(quiet).shape[1] == 50


@pytest.mark.parametrize("kind", ["whisper", "audio-spectrogram-transformer"])
def test_a_click_moves_the_other_fronts_where_their_times_say(teacher, kind):
    t, n = teacher(kind), 32_000
    quiet = 0.01 * noise(n, 1)
    def patches(x):
        seen = []
        layer = t.model.conv2 if kind == "whisper" else t.model.embeddings.patch_embeddings
        hook = layer.register_forward_hook(lambda m, i, o: seen.append(o))
        t(x)
        hook.remove()
        bands = (t.config.num_mel_bins - 16) // 10 + 1 if kind != "whisper" else 0
        return seen[0][0].T if kind == "whisper" else seen[0][0].unflatten(0, (bands, -1)).transpose(0, 1).flatten(1)  # (T, F)
    for at in (0.4, 1.2):
        clicked = quiet.clone()
        clicked[0, round(at * n / 2)] += 1.0
        moved = (patches(clicked) - patches(quiet)).square().sum(1)
        # Whisper scales a clip by its loudest moment, which moves every frame a little; AST's patches overlap
        centre = float(moved.argmax()) if kind == "whisper" else float((moved * torch.arange(len(moved))).sum() / moved.sum())
        assert abs(t.first + centre / t.rate - at) < 0.6 / t.rate


@pytest.mark.parametrize("kind", ["audio-spectrogram-transformer", "clap"])
def test_long_clips_are_heard_in_windows_and_short_ones_alone(teacher, kind):
    t = teacher(kind)
    long = noise(13 * data.RATE, 1)
    phi, whole = t(long), round(10 * t.rate)
    assert phi.shape[1] == np.ceil(round(13 * t.rate, 6)) and torch.equal(phi[:, whole:], t(long[:, 10 * data.RATE:])) and torch.equal(phi, t(long))


def test_a_model_at_another_rate_hears_resampled_sound(teacher, monkeypatch):
    t, seen = teacher("clap"), []
    assert t.rate_in == 48_000
    resample = TAF.resample
    monkeypatch.setattr(TAF, "resample", lambda x, a, b: seen.append((a, b)) or resample(x, a, b))
    t(noise(16_000))
    assert seen == [(16_000, 48_000)]


def test_half_precision_features_agree_with_full_ones(teacher):
    t, x = teacher("hubert"), noise(16_000)
    full = t(x)
    t.model = t.model.to(torch.bfloat16)
    half = t(x)
    assert half.dtype == torch.float32 and torch.nn.functional.cosine_similarity(half, full, dim=-1).min() > 0.98
    t.model = t.model.to(torch.float32)


def test_code_from_elsewhere_runs_only_when_the_flag_says_so(tmp_path):
    folder = tiny_model("usad", tmp_path)
    flag = tmp_path / "ran"
    code = next(folder.glob("*.py"))
    code.write_text(f"open({str(flag)!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(data.UserError, match="--trust-remote-code"):
        P.PretrainedTeacher(str(folder))
    assert not flag.exists()
    assert P.PretrainedTeacher(str(folder), trust=True).rate == 50 and flag.exists()


def test_pickled_weights_are_read_only_when_the_flag_says_so(tmp_path):
    from safetensors.torch import load_file
    folder = tiny_model("hubert", tmp_path)
    right = P.PretrainedTeacher(str(folder))(noise(4_000))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(data.UserError, match="--allow-pickle"):
        P.PretrainedTeacher(str(folder))
    assert torch.equal(P.PretrainedTeacher(str(folder), pickles=True)(noise(4_000)), right)


@pytest.mark.parametrize("name, message", [
    ("./nowhere", "--teacher ./nowhere: no such folder"),
    ("MIT-SLS/USAD-Base", "hf download MIT-SLS/USAD-Base --local-dir models/USAD-Base; then --teacher models/USAD-Base"),
])
def test_what_is_not_here_ends_in_one_line_that_says_where_to_get_it(name, message, monkeypatch):
    monkeypatch.setattr(P, "hub_in_reach", lambda: False)
    with pytest.raises(data.UserError, match=message.replace(".", r"\.")) as e:
        P.PretrainedTeacher(name)
    assert "\n" not in str(e.value)


def test_a_folder_that_is_no_audio_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(data.UserError, match="a bert model is no audio encoder known here"):
        P.PretrainedTeacher(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(data.UserError, match="can't be loaded"):
        P.PretrainedTeacher(str(tmp_path))


# --- judges

@pytest.mark.parametrize("kind", ["clap", "clap-fused"])
def test_clap_embeds_captions_and_sounds_on_one_sphere_whatever_the_batch(tmp_path, kind):
    clap = P.Clap(str(tiny_model(kind, tmp_path)))
    waves = noise(20_000, 3).numpy()
    long = noise(12 * data.RATE, 3).numpy()
    assert np.array_equal(clap.audio(long), clap.audio(long)) and np.allclose(clap.audio(long), clap.audio(long[:, : 10 * data.RATE]), atol=1e-2), "no random crops"
    a, t = clap.audio(waves), clap.text(["a dog", "rain and wind", "a dog"])
    assert a.shape[1] == t.shape[1] and np.allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5) and np.allclose(np.linalg.norm(t, axis=1), 1, atol=1e-5)
    assert np.allclose(t[0], t[2], atol=1e-6) and not np.allclose(t[0], t[1], atol=1e-3)
    assert np.allclose(clap.audio(waves, batch=1), a, atol=1e-5) and np.allclose(clap.text(["a dog"]), t[:1], atol=1e-5), "padding must not matter"
    with pytest.raises(data.UserError, match="a hubert model; a CLAP model"):
        P.Clap(str(tiny_model("hubert", tmp_path / "h")))


@pytest.mark.parametrize("kind", ["clap", "wavlm"])
def test_any_audio_model_gives_one_embedding_a_clip(tmp_path, kind):
    e = P.Embedder(str(tiny_model(kind, tmp_path))).audio(noise(9_000, 5).numpy(), batch=2)
    assert e.shape[0] == 5 and e.dtype == np.float32 and np.isfinite(e).all()


def test_the_clap_score_is_the_models_own_cosine_and_distances_grow_with_difference(tmp_path, waves):
    """Oracle: the model's joint forward pass. KID in a model's space: real clips are nearer to other real clips than noise is."""
    folder = str(tiny_model("clap", tmp_path / "clap"))
    clap, embedder = P.Clap(folder), P.Embedder(str(tiny_model("wavlm", tmp_path / "wavlm")))
    captions = ["a dog barking", "rain and wind", "low bell", "high bell then rain"]
    found = evaluate.foreign_scores(waves[:4], captions, waves[32:], clap, embedder)
    x = TAF.resample(torch.from_numpy(waves[:4]), data.RATE, 48_000)
    inputs = dict(clap.extractor([w.numpy() for w in x], sampling_rate=48_000, return_tensors="pt")) | dict(clap.tokenizer(captions, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    joint = clap.model(**inputs)
    own = (joint.logits_per_audio.diag() / clap.model.logit_scale_a.exp()).tolist()
    assert abs(found["clap_score"]["mean"] - np.mean(own)) < 1e-5 and found["clap_score"]["interval"][0] <= np.mean(own) <= found["clap_score"]["interval"][1]
    assert "frechet_model" not in found, "too few clips"
    real, hiss = (evaluate.foreign_scores(w, [], waves[32:], None, embedder)["kid_model"] for w in (waves[:32], noise(40_960, 32).numpy()))
    assert real < 0.2 * hiss


def test_a_run_is_scored_by_pretrained_models_and_the_protocol_names_them(t2a_run, tmp_path, capsys):
    clap, wavlm = tiny_model("clap", tmp_path / "clap"), tiny_model("wavlm", tmp_path / "wavlm")
    sys_argv = ["score", t2a_run, "--clips", 6, "--clap", clap, "--audio-model", wavlm, "--out", tmp_path / "s.json"]
    assert in_process(evaluate, *sys_argv, cwd=tmp_path).returncode == 0
    (result,) = json.loads((tmp_path / "s.json").read_text()).values()
    assert str(clap) in result["protocol"]["clap"] and "48000 Hz" in result["protocol"]["clap"] and str(wavlm) in result["protocol"]["embedder"] and result["protocol"]["candidates"] == 1
    assert all({"clap_score", "kid_model", "kid", "exact"} <= set(r) for r in result["rows"])
    done = in_process(evaluate, "score", t2a_run, "--clap", wavlm, cwd=tmp_path)
    assert done.returncode == 2 and "a CLAP model" in done.stderr
