"""Claims about pretrained teachers: each family gives frames for any length, and they are when they say."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from tiny_models import noise, tiny_model

from parts.audio import RATE
from parts.errors import UserError
from parts.pretrained_teacher import PretrainedTeacher
from parts.teacher import align_to_tokens

CONV = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")
RATES = {
    "hubert": 50.0,
    "wavlm": 50.0,
    "wav2vec2": 50.0,
    "data2vec-audio": 50.0,
    "whisper": 50.0,
    "audio-spectrogram-transformer": 10.0,
    "clap": 3.2,
    "usad": 50.0,
}
WITH_LAYERS = [kind for kind in RATES if kind not in ("clap", "usad")]


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory):
    """open_tiny(kind, layer=...) -> a tiny teacher of that family; each model is saved once."""
    folders = {}

    def get(kind, **options):
        if kind not in folders:
            folders[kind] = tiny_model(kind, tmp_path_factory.mktemp(kind))
        return PretrainedTeacher(str(folders[kind]), trust=kind == "usad", **options)
    return get


def with_click(wav, seconds):
    """A copy of (1, N) with a click at that time."""
    clicked = wav.clone()
    clicked[0, round(seconds * RATE)] += 1.0
    return clicked


@pytest.mark.parametrize("kind", RATES)
def test_a_teacher_of_each_family_gives_frames_for_any_length_and_is_frozen(open_tiny, kind):
    teacher = open_tiny(kind)
    assert teacher.rate == RATES[kind]
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    for n in (RATE, 40_960, 12_345, 700):
        phi = teacher(noise(n))
        assert phi.shape == (2, int(np.ceil(round(n / RATE * teacher.rate, 6))), teacher.features)
        assert phi.dtype == torch.float32 and phi.isfinite().all()
    assert torch.equal(teacher(noise(12_345)), teacher(noise(12_345)))
    assert not torch.allclose(teacher(noise(12_345)), teacher(noise(12_345, seed=1)), atol=1e-4)


@pytest.mark.parametrize("kind", WITH_LAYERS)
def test_layers_are_chosen_by_number_and_the_last_is_the_default(open_tiny, kind):
    x = noise(8_000)
    first = open_tiny(kind, layer=1)(x)
    second = open_tiny(kind, layer=2)(x)
    last = open_tiny(kind)(x)
    assert torch.equal(second, last) and not torch.allclose(first, last, atol=1e-3)
    with pytest.raises(UserError, match="layers 1 to 2"):
        open_tiny(kind, layer=3)


def test_the_last_layer_is_what_the_model_puts_out_where_it_is_normalised_once_more(open_tiny):
    """As in large models; negative control: there hidden_states ends before that."""
    x = noise(8_000)
    last = open_tiny("hubert-stable")(x)
    assert torch.equal(last, open_tiny("hubert-stable", layer=2)(x))
    assert last.mean(-1).abs().max() < 1e-4, "a LayerNorm at its initial weights leaves mean 0"
    assert open_tiny("hubert-stable", layer=1)(x).mean(-1).abs().max() > 1e-3


def test_a_layer_that_a_model_of_unknown_depth_lacks_is_refused(open_tiny):
    with pytest.raises(UserError, match="--teacher-layer 99: .* has fewer layers"):
        open_tiny("usad", layer=99)


@pytest.mark.parametrize("kind", CONV)
def test_a_click_moves_the_conv_front_most_in_the_frame_that_its_time_names(open_tiny, kind):
    """Frame j is said to be centred at first + j / rate. Negative control: without the padding the same click
    is found 40 samples off centre and the last cell has no frame."""
    teacher = open_tiny(kind)
    front = teacher.model.feature_extractor
    quiet = 0.01 * noise(16_000, 1)

    def pad(x):
        return F.pad(x, (teacher.pad // 2, teacher.pad - teacher.pad // 2))
    for at in (0.25, 0.505, 0.9):
        moved = (front(pad(with_click(quiet, at))) - front(pad(quiet))).square().sum(1)[0]
        found = teacher.first + float(moved.argmax()) / teacher.rate
        assert abs(found - at) <= 0.5 / teacher.rate + 1e-9
    assert front(quiet).shape[-1] == 49
    assert front(pad(quiet)).shape[-1] == teacher(quiet).shape[1] == 50


def front_end_frames(teacher, x):
    """What Whisper's last convolution or AST's patch embedding gives: (T, F)."""
    is_whisper = teacher.kind == "whisper"
    outputs = []

    def record(module, inputs, output):
        outputs.append(output)
    layer = teacher.model.conv2 if is_whisper else teacher.model.embeddings.patch_embeddings
    hook = layer.register_forward_hook(record)
    teacher(x)
    hook.remove()
    if is_whisper:
        return outputs[0][0].T                                             # (F, T) -> (T, F)
    bands = (teacher.config.num_mel_bins - 16) // 10 + 1
    return outputs[0][0].unflatten(0, (bands, -1)).transpose(0, 1).flatten(1)  # (bands T, W) -> (T, bands W)


@pytest.mark.parametrize("kind", ["whisper", "audio-spectrogram-transformer"])
def test_a_click_moves_the_other_fronts_where_their_times_say(open_tiny, kind):
    teacher = open_tiny(kind)
    quiet = 0.01 * noise(32_000, 1)
    for at in (0.4, 1.2):
        change = front_end_frames(teacher, with_click(quiet, at)) - front_end_frames(teacher, quiet)
        moved = change.square().sum(1)
        # Whisper scales a clip by its loudest moment, which moves every frame a little; AST's patches
        # overlap.
        if kind == "whisper":
            centre = float(moved.argmax())
        else:
            centre = float((moved * torch.arange(len(moved))).sum() / moved.sum())
        assert abs(teacher.first + centre / teacher.rate - at) < 0.6 / teacher.rate


@pytest.mark.parametrize("kind", ["audio-spectrogram-transformer", "clap"])
def test_long_clips_are_cut_into_windows_and_short_ones_are_not(open_tiny, kind):
    teacher = open_tiny(kind)
    long = noise(13 * RATE, 1)
    phi = teacher(long)
    whole = round(10 * teacher.rate)
    assert phi.shape[1] == np.ceil(round(13 * teacher.rate, 6))
    assert torch.equal(phi[:, whole:], teacher(long[:, 10 * RATE :])) and torch.equal(phi, teacher(long))


def test_a_model_at_another_rate_gets_resampled_sound(open_tiny, monkeypatch):
    teacher = open_tiny("clap")
    assert teacher.rate_in == 48_000
    calls = []
    resample = TAF.resample

    def recorded(x, rate, to):
        calls.append((rate, to))
        return resample(x, rate, to)
    monkeypatch.setattr(TAF, "resample", recorded)
    teacher(noise(16_000))
    assert calls == [(16_000, 48_000)]


def test_half_precision_features_agree_with_full_ones(open_tiny):
    """With torch's own kernels: on some CPUs oneDNN's bfloat16 rounds this random network down to 0.88.
    Another sound's features don't agree."""
    teacher = open_tiny("hubert")
    x = noise(16_000)
    full = teacher(x)
    other = teacher(x.flip(-1))
    teacher.model = teacher.model.to(torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        half = teacher(x)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, full, dim=-1).min() > 0.98
    assert F.cosine_similarity(other, full, dim=-1).mean() < 0.5


def test_a_folder_that_is_no_audio_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="a bert model is no audio encoder known here"):
        PretrainedTeacher(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="can't be loaded"):
        PretrainedTeacher(str(tmp_path))


# --- features at the times of tokens

@pytest.mark.parametrize("rate, first, token_rate", [
    (50, 0.01, 25),
    (50, 0.0, 25),
    (50, 0.01, 12.5),
    (50, 0.01, 75),
    (10, 0.0875, 25),
    (3.2, 0.15625, 50),
    (25, 0.02, 25),
])
def test_features_of_a_ramp_in_time_stay_a_ramp_at_the_tokens(rate, first, token_rate):
    """phi_j = its own time: at token i it must read that token's time (inside the clip; at the ends the
    nearest frame stands in)."""
    T = round(4 * token_rate)
    phi = (first + torch.arange(round(4 * rate)) / rate)[None, :, None].float()
    out = align_to_tokens(phi, rate, first, token_rate, T)[0, :, 0]
    centre = (torch.arange(T) + 0.5) / token_rate
    half_token = 0.5 / token_rate
    inside = (centre > 1 / rate + half_token) & (centre < 4 - 1.5 / rate - half_token)
    assert out.shape == (T,) and inside.sum() > T / 3
    assert (out - centre)[inside].abs().max() < 1e-3
    assert out.diff().min() >= -1e-6


def test_negative_control_truncating_instead_of_aligning_is_off_in_time():
    """A conv front without padding: one frame short, 40 samples late."""
    phi = (torch.arange(99) / 50 + 0.0125)[None, :, None]
    right = align_to_tokens(phi, 50, 0.0125, 25, 50)[0, :, 0]
    centre = (torch.arange(50) + 0.5) / 25
    naive = phi[0, :98, 0].reshape(49, 2).mean(1)
    assert (right - centre)[2:-2].abs().max() < 1e-3 and (naive - centre[:49]).abs().min() > 2e-3
