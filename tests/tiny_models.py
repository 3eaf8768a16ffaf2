"""Tiny random models of other people's families, each of its real class, saved as a hub repository holds it.

    tiny_model(kind, folder) saves the model and its front end and returns folder

Public: tiny_model, word_tokenizer, write_recordings, noise, USAD_STUB.
"""
import json

import torch

from parts.audio import RATE, resample

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
WAVE = dict(**SMALL, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
SPECIAL_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
WORDS = "a an the dog barking rain wind and then low high bell sound of while it is".split()

# A model that comes with its own code, with the interface of USAD.
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
        blocks = [torch.nn.Linear(config.dim, config.dim) for _ in range(config.layers)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.post_init()
    def forward(self, wav):
        h, hidden = self.front(wav[:, None]).mT, []
        for block in self.blocks:
            h = h + torch.tanh(block(h))
            hidden.append(h)
        return {"x": h, "mel": None, "hidden_states": hidden, "ffn": hidden}
'''


def tiny_model(kind, folder):
    """Save a tiny random model of this family (and its front end) to folder; returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[kind](kind)
    model.save_pretrained(folder)
    save_front_end(kind, folder)
    if kind == "usad":
        (folder / "usad_model.py").write_text(USAD_STUB)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "usad_model.UsadConfig", "AutoModel": "usad_model.UsadModel"}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_front_end(kind, folder):
    """The feature extractor or tokenizer that models of this family come with."""
    import transformers as tf
    if MAKERS[kind] in (conv_front, stable_hubert):
        tf.Wav2Vec2FeatureExtractor(do_normalize=kind != "wavlm").save_pretrained(folder)
    elif kind == "whisper":
        tf.WhisperFeatureExtractor().save_pretrained(folder)
    elif kind == "audio-spectrogram-transformer":
        tf.ASTFeatureExtractor().save_pretrained(folder)
    elif kind in ("clap", "clap-fused"):
        truncation = "fusion" if kind == "clap-fused" else "rand_trunc"
        tf.ClapFeatureExtractor(truncation=truncation).save_pretrained(folder)
        word_tokenizer(folder)
    elif kind in ("t5", "bert", "bert-words"):
        word_tokenizer(folder, kind)


def word_tokenizer(folder, kind="plain"):
    """A word-level tokenizer with a T5-like end token or BERT-like start and end tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if kind == "t5" else "<s> $A </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        model_max_length=40,
    ).save_pretrained(folder)


# --- teachers

def conv_front(kind):
    import transformers as tf
    if kind == "hubert":
        return tf.HubertModel(tf.HubertConfig(**WAVE))
    if kind == "wavlm":
        return tf.WavLMModel(tf.WavLMConfig(**WAVE))
    if kind == "wav2vec2":
        return tf.Wav2Vec2Model(tf.Wav2Vec2Config(**WAVE))
    own = {**WAVE, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}
    return tf.Data2VecAudioModel(tf.Data2VecAudioConfig(**own))


def whisper(kind):
    import transformers as tf
    return tf.WhisperModel(tf.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=40, decoder_start_token_id=1, **SPECIAL_IDS,
    ))


def ast(kind):
    import transformers as tf
    return tf.ASTModel(tf.ASTConfig(**SMALL))


def clap(kind):
    import transformers as tf
    fused = kind == "clap-fused"
    audio = dict(
        enable_fusion=fused, fusion_type="aff_2d" if fused else None, patch_embeds_hidden_size=8,
        hidden_size=64, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], projection_dim=12,
    )
    text = dict(**SMALL, vocab_size=40, projection_dim=12, **SPECIAL_IDS)
    return tf.ClapModel(tf.ClapConfig(audio_config=audio, text_config=text, projection_dim=12))


def usad(kind):
    names = {}
    exec(compile(USAD_STUB, "stub", "exec"), names)
    return names["UsadModel"](names["UsadConfig"]())


# --- codecs

def dac(kind):
    import transformers as tf
    return tf.DacModel(tf.DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=32, downsampling_ratios=[2, 4, 5, 8], codebook_size=16,
        n_codebooks=2,
    ))


def encodec(kind):
    import transformers as tf
    return tf.EncodecModel(tf.EncodecConfig(num_filters=4, hidden_size=24, codebook_size=16))


def mimi(kind):
    import transformers as tf
    return tf.MimiModel(tf.MimiConfig(
        num_filters=4, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, codebook_size=16, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_quantizers=4, upsample_groups=16,
    ))


def vibevoice(kind):
    import transformers as tf
    return tf.VibeVoiceAcousticTokenizerModel(tf.VibeVoiceAcousticTokenizerConfig(
        hidden_size=16, num_filters=2, depths=[1] * 7,
    ))


def pocket_tts(kind):
    import transformers as tf
    return tf.PocketTTSAudioTokenizerModel(tf.PocketTTSAudioTokenizerConfig(
        num_filters=4, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, upsample_groups=16, latent_dim=8,
    ))


# --- text encoders

def t5(kind):
    import transformers as tf
    return tf.T5EncoderModel(tf.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    ))


def bert(kind):
    import transformers as tf
    return tf.BertModel(tf.BertConfig(**SMALL, vocab_size=40, pad_token_id=0))


def bert_of_words(kind):
    """As models that fill in words are saved: without a pooler."""
    import transformers as tf
    return tf.BertForMaskedLM(tf.BertConfig(**SMALL, vocab_size=40, pad_token_id=0))


def stable_hubert(kind):
    """As large models are: normalised before each layer, and once more at the end."""
    import transformers as tf
    return tf.HubertModel(tf.HubertConfig(**WAVE, do_stable_layer_norm=True, feat_extract_norm="layer"))


MAKERS = {
    "hubert": conv_front,
    "hubert-stable": stable_hubert,
    "wavlm": conv_front,
    "wav2vec2": conv_front,
    "data2vec-audio": conv_front,
    "whisper": whisper,
    "audio-spectrogram-transformer": ast,
    "clap": clap,
    "clap-fused": clap,
    "usad": usad,
    "dac": dac,
    "encodec": encodec,
    "mimi": mimi,
    "vibevoice_acoustic_tokenizer": vibevoice,
    "pocket_tts_audio_tokenizer": pocket_tts,
    "t5": t5,
    "bert": bert,
    "bert-words": bert_of_words,
}


# --- sounds for them

def noise(n, batch=2, seed=0):
    """Quiet white noise (batch, n)."""
    return 0.1 * torch.randn(batch, n, generator=torch.Generator().manual_seed(seed))


def write_recordings(folder, waves):
    """Twelve captioned recordings of odd lengths, two rates, in three folds; returns folder."""
    import soundfile
    rows = ["file_name,caption,fold"]
    for k in range(12):
        rate = (16_000, 44_100)[k % 2]
        caption = "a dog barking" if k % 2 else "rain and wind"
        soundfile.write(folder / f"{k}.wav", resample(waves[k][: 30_000 + 777 * k], RATE, rate), rate)
        rows.append(f"{k}.wav,{caption},{k % 3 + 1}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder
