"""Shared fixtures: a private cache, and one tiny run a task that many tests use."""
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["STAGE_AUDIO_CACHE"] = tempfile.mkdtemp(prefix="stage-audio-test-")  # before data.py is used; workers inherit it
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes side by side: their threads would fight over the cores
    os.environ["OMP_NUM_THREADS"] = "1"

TINY = dict(clips=100, width=32, depth=2, heads=2, batch=8, steps=12, eval_every=6, warmup=4, score_clips=8, sample_steps=3,
            precision="fp32", device="cpu", workers=0, variants=1, channels=16)


def in_process(module, *argv, cwd):
    """`python MODULE.py ARGV` in this process (starting Python and torch takes seconds): -> returncode, stdout, stderr."""
    import contextlib
    import io
    import types

    import data
    out, err, old_argv, old_cwd, code = io.StringIO(), io.StringIO(), sys.argv, os.getcwd(), 0
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            data.run_cli(module.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = old_argv
        os.chdir(old_cwd)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(autouse=True)
def nothing_kept():
    """What one test's judges heard is not what another's would: see evaluate.kept."""
    if "evaluate" in sys.modules:
        sys.modules["evaluate"]._KEPT.clear()


@pytest.fixture(scope="session")
def tiny():
    return dict(TINY)


@pytest.fixture(scope="session")
def t2a_run(tmp_path_factory):
    """A finished tiny caption run."""
    import train
    return train.train({**TINY, "task": "t2a", "out": str(tmp_path_factory.mktemp("runs") / "t2a")})


@pytest.fixture(scope="session")
def sr_run(tmp_path_factory):
    """A finished tiny super-resolution run."""
    import train
    return train.train({**TINY, "task": "sr", "out": str(tmp_path_factory.mktemp("runs") / "sr")})


@pytest.fixture
def bare(monkeypatch):
    """Training alone: no previews, no pictures, no final table."""
    import evaluate
    monkeypatch.setattr(evaluate, "preview", lambda *a: {})
    monkeypatch.setattr(evaluate, "dashboard", lambda *a: None)
    monkeypatch.setattr(evaluate, "score", lambda *a, **k: None)


@pytest.fixture(scope="session")
def waves():
    """64 SoundWorld clips (64, N)."""
    import numpy as np

    import data
    world = data.SoundWorld("val", 64)
    return np.stack([world.wave(i) for i in range(64)])


# --- tiny random models of other people's families, in the format of a hub repository

USAD_STUB = '''
import torch
from transformers import PreTrainedModel, PretrainedConfig

class UsadConfig(PretrainedConfig):
    model_type = "usad_stub"
    def __init__(self, dim=12, layers=2, **more):
        super().__init__(**more)
        self.dim, self.layers = dim, layers

class UsadModel(PreTrainedModel):
    config_class = UsadConfig
    def __init__(self, config):
        super().__init__(config)
        self.front = torch.nn.Conv1d(1, config.dim, 400, 320, padding=40)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(config.dim, config.dim) for _ in range(config.layers))
        self.post_init()
    def forward(self, wav):
        h, hidden = self.front(wav[:, None]).mT, []
        for block in self.blocks:
            h = h + torch.tanh(block(h))
            hidden.append(h)
        return {"x": h, "mel": None, "hidden_states": hidden, "ffn": hidden}
'''


def word_tokenizer(folder, kind="plain"):
    """A word-level tokenizer with a T5-like end token or BERT-like start and end tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<unk>", *["a", "an", "the", "dog", "barking", "rain", "wind", "and", "then", "low", "high", "bell", "sound", "of", "while", "it", "is"]]
    tok = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single="$A </s>" if kind == "t5" else "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>", model_max_length=40).save_pretrained(folder)


def tiny_model(kind, folder):
    """Save a tiny random model of this family (and its front end) to folder; returns folder."""
    import json

    import torch
    import transformers as tf
    folder.mkdir(parents=True, exist_ok=True)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    wave = dict(**small, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in ("hubert", "wavlm", "wav2vec2", "data2vec-audio"):
            name = {"hubert": "Hubert", "wavlm": "WavLM", "wav2vec2": "Wav2Vec2", "data2vec-audio": "Data2VecAudio"}[kind]
            if kind == "data2vec-audio":
                wave |= dict(num_conv_pos_embeddings=2, conv_pos_kernel_size=5)
            model = getattr(tf, name + "Model")(getattr(tf, name + "Config")(**wave))
            tf.Wav2Vec2FeatureExtractor(do_normalize=kind != "wavlm").save_pretrained(folder)
        elif kind == "whisper":
            model = tf.WhisperModel(tf.WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                                                     decoder_ffn_dim=32, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1))
            tf.WhisperFeatureExtractor().save_pretrained(folder)
        elif kind == "audio-spectrogram-transformer":
            model = tf.ASTModel(tf.ASTConfig(**small))
            tf.ASTFeatureExtractor().save_pretrained(folder)
        elif kind in ("clap", "clap-fused"):
            audio = dict(enable_fusion=kind == "clap-fused", fusion_type="aff_2d" if kind == "clap-fused" else None, patch_embeds_hidden_size=8, hidden_size=64, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], projection_dim=12)
            text = dict(**small, vocab_size=40, projection_dim=12, pad_token_id=0, bos_token_id=1, eos_token_id=2)
            model = tf.ClapModel(tf.ClapConfig(audio_config=audio, text_config=text, projection_dim=12))
            tf.ClapFeatureExtractor(truncation="fusion" if kind == "clap-fused" else "rand_trunc").save_pretrained(folder)
            word_tokenizer(folder)
        elif kind == "usad":
            space = {}
            exec(compile(USAD_STUB, "stub", "exec"), space)
            config = space["UsadConfig"]()
            space["UsadModel"](config).save_pretrained(folder)
            (folder / "usad_model.py").write_text(USAD_STUB)
            saved = json.loads((folder / "config.json").read_text())
            saved["auto_map"] = {"AutoConfig": "usad_model.UsadConfig", "AutoModel": "usad_model.UsadModel"}
            (folder / "config.json").write_text(json.dumps(saved))
            return folder
        elif kind == "dac":
            model = tf.DacModel(tf.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, downsampling_ratios=[2, 4, 5, 8], codebook_size=16, n_codebooks=2))
        elif kind == "encodec":
            model = tf.EncodecModel(tf.EncodecConfig(num_filters=4, hidden_size=24, codebook_size=16))
        elif kind == "mimi":
            model = tf.MimiModel(tf.MimiConfig(num_filters=4, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8, codebook_size=16,
                                               codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=4, upsample_groups=16))
        elif kind == "vibevoice_acoustic_tokenizer":
            model = tf.VibeVoiceAcousticTokenizerModel(tf.VibeVoiceAcousticTokenizerConfig(hidden_size=16, num_filters=2, depths=[1] * 7))
        elif kind == "pocket_tts_audio_tokenizer":
            model = tf.PocketTTSAudioTokenizerModel(tf.PocketTTSAudioTokenizerConfig(num_filters=4, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
                                                                                     num_key_value_heads=2, upsample_groups=16, latent_dim=8))
        elif kind == "t5":
            model = tf.T5EncoderModel(tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))
            word_tokenizer(folder, "t5")
        elif kind == "bert":
            model = tf.BertModel(tf.BertConfig(**small, vocab_size=40, pad_token_id=0))
            word_tokenizer(folder)
        else:
            raise ValueError(kind)
    model.save_pretrained(folder)
    return folder
