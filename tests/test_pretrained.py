"""Claims about pretrained parts, each family as a tiny random model of its real class, saved as a hub repository would hold it."""
import json
import shutil

import numpy as np
import pytest
import torch
import torchaudio.functional as TAF
from conftest import in_process, tiny_model

import data
import evaluate
import guidance
import model
import pretrained as P
import regime

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
    """With torch's own kernels: on some CPUs oneDNN's bfloat16 rounds this random network down to 0.88. Another sound's features don't agree."""
    t, x = teacher("hubert"), noise(16_000)
    full, other = t(x), t(x.flip(-1))
    t.model = t.model.to(torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        half = t(x)
    agree = lambda a: torch.nn.functional.cosine_similarity(a, full, dim=-1)
    assert half.dtype == torch.float32 and agree(half).min() > 0.98 and agree(other).mean() < 0.5
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


# --- codecs

CODECS = {"dac": 50.0, "encodec": 75.0, "mimi": 12.5, "vibevoice_acoustic_tokenizer": 7.5, "pocket_tts_audio_tokenizer": 12.5}


@pytest.fixture(scope="session")
def codec(tmp_path_factory):
    made = {}
    def get(kind, channels=8, **how):
        if kind not in made:
            made[kind] = tiny_model(kind, tmp_path_factory.mktemp(kind))
        return P.PretrainedCodec(str(made[kind]), channels, **how)
    return get


@pytest.mark.parametrize("kind", CODECS)
def test_a_codec_of_each_family_keeps_time_and_its_whole_latent_space(codec, kind, waves):
    """Any length gives ceil(N rate / 16000) tokens and comes back at least as long; with as many channels as the latents are wide the PCA
    loses nothing; with fewer it keeps the best part: more channels are never worse."""
    c = codec(kind, 512).fit(waves[:12])
    assert c.rate == CODECS[kind] and c.channels == c.mean.shape[0] and abs(c.explained - 1) < 1e-6
    for n in (16_000, 12_345, 40_960):
        z = c.encode(torch.from_numpy(waves[:2, :n]))
        assert z.shape == (2, int(np.ceil(n * c.rate / data.RATE)), c.channels) == (2, c.tokens(n), c.channels)
        y = c.decode(z)
        assert y.shape[1] >= n and y.shape[1] - n <= data.RATE / c.rate and y.isfinite().all()
    native = c.native(torch.from_numpy(waves[:2]))
    assert torch.allclose(c.restore(c.project(native)), native, atol=1e-3 * float(native.abs().max()))
    rows = torch.cat([c.project(c.native(torch.from_numpy(w)[None]))[0] for w in waves[:12]])
    assert abs(float(rows.var(0).mean()) - 1) < 0.02, "unit variance on average: the scale that the noise expects"
    small = codec(kind, 4).fit(waves[:12])
    assert small.channels == 4 and small.explained < 1 and small.key != c.key


@pytest.mark.parametrize("kind", ["dac", "encodec"])
def test_a_click_moves_the_latents_and_the_decoded_sound_where_it_is(codec, kind):
    c, n, at = codec(kind, 512), 16_000, 9_000
    quiet = 0.01 * noise(n, 1)
    clicked = quiet.clone()
    clicked[0, at] += 1.0
    moved = (c.native(clicked) - c.native(quiet)).square().sum(-1)[0]
    assert abs((float(moved.argmax()) + 0.5) / c.rate - at / n) < 1.6 / c.rate
    z = c.native(quiet)
    bump = z.clone()
    bump[0, 20] += 3.0
    heard = (c.wave(bump) - c.wave(z)).square()[0]
    # DAC hears as far to both sides; EnCodec is causal, and its LSTM has a long tail: the beginning counts
    place = torch.searchsorted(heard.cumsum(0) / heard.sum(), torch.tensor(0.5 if kind == "dac" else 0.05))
    assert abs(float(place) / data.RATE - 20.5 / c.rate) < 1.6 / c.rate


def test_a_codec_is_restored_from_the_few_numbers_in_a_checkpoint(codec, waves):
    a, b = codec("dac").fit(waves[:8]), codec("dac")
    assert set(a.state_dict()) == {"mean", "basis", "scale"}
    b.load_state_dict(a.state_dict())
    x = torch.from_numpy(waves[:2])
    assert torch.equal(a.encode(x), b.encode(x)) and a.key == b.key
    with pytest.raises(data.UserError, match="another codec"):
        evaluate.load_weights("run", codec("encodec"), a.state_dict())


def test_super_resolution_keeps_the_recordings_own_low_band(codec, waves):
    c = codec("dac").fit(waves[:8])
    x = waves[:2]
    muffled = torch.from_numpy(np.stack([data.band_limit(w, 2_000) for w in x]))
    y = c.decode(c.encode(muffled), muffled, 2_000)[:, : x.shape[1]].numpy()
    low = [data.band_limit(w, 1_500)[2_000:-2_000] for w in (*y, *muffled.numpy())]  # without the edges, where filters ring
    assert np.abs(low[0] - low[2]).max() < 0.02 * np.abs(low[2]).max() and np.abs(low[1] - low[3]).max() < 0.02 * np.abs(low[3]).max()


@pytest.mark.parametrize("kind", ["mel", "dac"])
def test_the_round_trip_of_a_latent_space_is_scored_before_anything_is_trained(recordings, tmp_path, kind):
    """Oracle: the same metrics of the codec itself, clip by clip. Wide latents also without the PCA."""
    name = "mel" if kind == "mel" else str(tiny_model("dac", tmp_path / "dac"))
    done = in_process(evaluate, "score", "--codec", name, "--data", recordings, "--val-fold", 3, "--channels", 16, "--out", tmp_path / "s.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "s.json").read_text())
    assert [r["row"] for r in result["rows"]] == (["16 channels"] if kind == "mel" else ["all 64", "16 channels"]) and result["protocol"]["tokens_per_s"] == {"mel": 25, "dac": 50}[kind]
    if kind == "mel":
        train, test = data.AudioFolder(recordings, "train", 3).prepare(0), data.AudioFolder(recordings, "test", 3).prepare(0)
        crop = lambda x: evaluate._first(x, data.CLIP_S)
        c = model.Codec(16).fit(crop(train.wave(i)) for i in range(len(train)))
        own = [evaluate.lsd(evaluate.log_power(x), evaluate.log_power(c.decode(c.encode(torch.from_numpy(x)[None]))[0, : len(x)].numpy()))["lsd"] for x in map(crop, map(test.wave, range(len(test))))]
        assert abs(result["rows"][0]["lsd"]["mean"] - np.mean(own)) < 1e-3
    assert in_process(evaluate, "score", cwd=tmp_path).returncode == 2


def test_codecs_that_rescale_chunks_and_models_that_are_none_are_refused(tmp_path):
    for config, message in ((dict(model_type="encodec", normalize=True, audio_channels=2), "use the mono model"), (dict(model_type="hubert"), "no codec known here")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(data.UserError, match=message):
            P.PretrainedCodec(str(tmp_path))


# --- text

@pytest.mark.parametrize("kind", ["t5", "bert", "clap"])
def test_a_text_encoder_of_each_family_ignores_padding_and_knows_the_empty_caption(tmp_path, kind, capsys):
    text = P.PretrainedText(str(tiny_model(kind, tmp_path)), max_tokens=8)
    alone, both = text.encode(["a dog"]), text.encode(["a dog", "low bell then rain and wind"])
    assert both.shape[2] == text.features == 16 and torch.allclose(both[0, : alone.shape[1]], alone[0], atol=1e-5) and both[0, alone.shape[1]:].abs().max() == 0
    assert not torch.allclose(both[0, 0], both[1, 0], atol=1e-5) and not any(p.requires_grad for p in text.parameters())
    assert text.encode([""]).abs().max() == 0 and text.encode(["", "a dog"])[0].abs().max() == 0
    if kind == "t5":
        assert torch.allclose(alone[0, 0], alone[0, 1:].mean(0), atol=1e-5), "pooled is the mean over tokens"
    captions = [["a dog", "rain"], ["", "dog " * 20], ["rain", "a dog"]]
    cached = text.cache(captions)
    assert "warning: 1 of 4 captions have more than 8 tokens" in capsys.readouterr().out
    assert torch.allclose(cached[0][0], alone[0], atol=2e-3) and torch.equal(cached[0][1], cached[2][0]) and cached[1][0].abs().max() == 0 and len(cached[1][1]) == 9


def test_frozen_text_reaches_the_velocity_and_dropping_it_equals_the_empty_caption():
    """Through model.TextAdapter: two captions give two velocities; padding rows change nothing; a dropped caption is the empty one. Negative
    control: with the mask ignored, padding would count."""
    torch.manual_seed(0)
    net = model.DiT(4, 32, 2, 2, text_features=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(2, 6, 4), torch.tensor([0.3, 0.8])
    e = torch.randn(2, 5, 16)
    v = net(x, t, net.encode_text(e))
    padded = torch.cat([e, torch.zeros(2, 3, 16)], 1)
    assert torch.allclose(net(x, t, net.encode_text(padded)), v, atol=1e-5)
    assert not torch.allclose(net(x, t, net.encode_text(e.flip(0))), v, atol=1e-3)
    text = net.encode_text(padded)
    assert not torch.allclose(net(x, t, text._replace(mask=torch.ones_like(text.mask))), v, atol=1e-4)
    gone = net(x, t, net.encode_text(e, torch.tensor([True, False])))
    empty = net(x, t, net.encode_text(torch.zeros_like(e)))
    assert torch.allclose(gone[0], empty[0], atol=1e-5) and torch.allclose(gone[1], v[1], atol=1e-5)


# --- features at the times of tokens

@pytest.mark.parametrize("rate, first, token_rate", [(50, 0.01, 25), (50, 0.0, 25), (50, 0.01, 12.5), (50, 0.01, 75), (10, 0.0875, 25), (3.2, 0.15625, 50), (25, 0.02, 25)])
def test_features_of_a_ramp_in_time_stay_a_ramp_at_the_tokens(rate, first, token_rate):
    """phi_j = its own time: at token i it must read that token's time (inside the clip; at the ends the nearest frame stands in)."""
    T = round(4 * token_rate)
    phi = (first + torch.arange(round(4 * rate)) / rate)[None, :, None].float()
    out, centre = guidance.at_tokens(phi, rate, first, token_rate, T)[0, :, 0], (torch.arange(T) + 0.5) / token_rate
    inside = (centre > 1 / rate + 0.5 / token_rate) & (centre < 4 - 1.5 / rate - 0.5 / token_rate)
    assert out.shape == (T,) and inside.sum() > T / 3 and (out - centre)[inside].abs().max() < 1e-3
    assert out.diff().min() >= -1e-6


def test_negative_control_truncating_instead_of_aligning_is_off_in_time():
    phi = (torch.arange(99) / 50 + 0.0125)[None, :, None]          # a conv front without padding: one frame short, 40 samples late
    right = guidance.at_tokens(phi, 50, 0.0125, 25, 50)[0, :, 0]
    centre = (torch.arange(50) + 0.5) / 25
    naive = phi[0, :98, 0].reshape(49, 2).mean(1)
    assert (right - centre)[2:-2].abs().max() < 1e-3 and (naive - centre[:49]).abs().min() > 2e-3


# --- everything at once

@pytest.fixture(scope="session")
def recordings(tmp_path_factory, waves):
    """Twelve captioned recordings of odd lengths, two rates."""
    import soundfile
    folder = tmp_path_factory.mktemp("recordings")
    rows = ["file_name,caption,fold"]
    for k in range(12):
        rate = (16_000, 44_100)[k % 2]
        soundfile.write(folder / f"{k}.wav", data.resample(waves[k][: 30_000 + 777 * k], data.RATE, rate), rate)
        rows.append(f"{k}.wav,{'a dog barking' if k % 2 else 'rain and wind'},{k % 3 + 1}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("task", ["t2a", "sr"])
def test_pretrained_parts_in_every_slot_train_score_and_are_used_from_their_run_folder(tiny, recordings, tmp_path, monkeypatch, task):
    """HuBERT as teacher, DAC as codec, T5 as text encoder: the same loop, resumed, then generate or upsample; the DAC model itself is not in
    the checkpoint."""
    import train
    hubert, dac, t5 = (tiny_model(kind, tmp_path / kind) for kind in ("hubert", "dac", "t5"))
    given = {**tiny, "task": task, "data": str(recordings), "val_fold": 3, "out": str(tmp_path / "run"), "teacher": str(hubert), "teacher_layer": 1, "codec": str(dac), "text": str(t5),
             "channels": 8, "steps": 6, "eval_every": 6, "seconds": 1.0, "score_clips": 4, "probe": "always", "recipe": "static"}
    monkeypatch.setattr(regime, "probe_steps", lambda K: [2, 4])
    monkeypatch.setattr(evaluate, "dashboard", lambda *a: None)    # drawn elsewhere, and slow
    out = train.train(given)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "D" in r] == [2, 4] and all(-1e-5 < r["D"] < 2 for r in rows if "D" in r) and any(r.get("loss_ssl", 0) > 0 for r in rows)
    train.train({"steps": 8}, str(out))
    assert (out / "checkpoint.pt").stat().st_size < 4e6
    if task == "t2a":
        done = in_process(evaluate, "generate", out, "--prompt", "a dog, never heard of", "--out", tmp_path / "x.wav", "--seconds", "1.0", cwd=tmp_path)
    else:
        import soundfile
        soundfile.write(tmp_path / "m.wav", data.band_limit(noise(20_000, 1)[0].numpy(), 2_000), data.RATE)
        done = in_process(evaluate, "upsample", out, "--input", tmp_path / "m.wav", "--cutoff", "2000", "--out", tmp_path / "x.wav", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(dac)
    done = in_process(evaluate, "sounds", out, cwd=tmp_path)
    assert done.returncode == 2 and f"--codec {dac}: no such folder" in done.stderr


def test_a_part_that_is_missing_is_named_before_anything_is_prepared(tmp_path):
    import train
    for flag in ("--teacher", "--codec", "--text"):
        done = in_process(train, flag, "./nowhere", "--out", tmp_path / "run", cwd=tmp_path)
        assert done.returncode == 2 and f"{flag} ./nowhere: no such folder" in done.stderr and not (tmp_path / "run").exists()


def test_a_run_folder_cannot_ask_for_its_own_code_to_be_run(tiny, recordings, tmp_path, monkeypatch):
    """trust_remote_code in a config.json counts for nothing: resuming needs the flag again."""
    import train
    for name in ("dashboard", "score"):
        monkeypatch.setattr(evaluate, name, lambda *a, **k: None)
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    usad = tiny_model("usad", tmp_path / "usad")
    given = {**tiny, "data": str(recordings), "val_fold": 3, "out": str(tmp_path / "run"), "teacher": str(usad), "steps": 2, "eval_every": 2, "score_clips": 2, "recipe": "static"}
    with pytest.raises(data.UserError, match="--trust-remote-code"):
        train.train(given)
    train.train({**given, "trust_remote_code": True})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trust_remote_code"] is True
    with pytest.raises(data.UserError, match="--trust-remote-code"):
        train.train({"steps": 3}, str(tmp_path / "run"))
    train.train({"steps": 3, "trust_remote_code": True}, str(tmp_path / "run"))


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
    found = evaluate.foreign_scores({"x": waves[:4]}, captions, waves[32:], clap, embedder)["x"]
    x = TAF.resample(torch.from_numpy(waves[:4]), data.RATE, 48_000)
    inputs = dict(clap.extractor([w.numpy() for w in x], sampling_rate=48_000, return_tensors="pt")) | dict(clap.tokenizer(captions, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    joint = clap.model(**inputs)
    own = (joint.logits_per_audio.diag() / clap.model.logit_scale_a.exp()).tolist()
    assert abs(found["clap_score"]["mean"] - np.mean(own)) < 1e-5 and found["clap_score"]["interval"][0] <= np.mean(own) <= found["clap_score"]["interval"][1]
    assert "frechet_model" not in found, "too few clips"
    real, hiss = (r["kid_model"] for r in evaluate.foreign_scores({"real": waves[:32], "hiss": noise(40_960, 32).numpy()}, [], waves[32:], None, embedder).values())
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
