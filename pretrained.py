"""Other people's components behind the interfaces of the embedded ones, through `transformers`: teachers, codecs, text encoders, judges.

Idea.  Research runs replace the toy parts by pretrained ones. Each slot has one loader that takes a hub id or a local folder, and the
rest of the project does not know which part it got.

    wav (B, N) at 16 kHz --PretrainedTeacher--> phi (B, T', F), T' frames a clip whose times are known    (guidance.Ear aligns them with tokens)
    wav (B, N) <--PretrainedCodec--> z (B, T, C), caption --PretrainedText--> (1 + S, E)
    wav, caption         --Clap--> embeddings (B, E) of unit length: CLAP score, KID
    wav                  --Embedder--> embeddings (B, E) of any audio model: KID, Frechet distance

Nothing here runs code that came with a download, or reads pickled weights, unless a flag asked for it. `transformers` is imported
only when a pretrained part is used: the default path needs none of this file.

Conventions: B batch, N samples, T frames, F features. Times in s, rates in Hz.

Parts that fit (folder or hub id; * from memory or a third party: read the model's card):

    --teacher  MIT-SLS/USAD-Base (with --trust-remote-code)    BSD-3       94 M    50 Hz, 768   speech, music and sound: the paper's kind of teacher
               MIT/ast-finetuned-audioset-10-10-0.4593         BSD-3*      87 M*   10 Hz, 768   general audio, supervised, coarse in time
               laion/clap-htsat-unfused (audio tower)          Apache-2.0  28 M*   3.2 Hz, 768  general audio, supervised by captions, very coarse
               facebook/hubert-base-ls960, facebook/wav2vec2-base, facebook/data2vec-audio-base
                                                               Apache-2.0  95 M*   50 Hz, 768   trained on speech alone: weak on other sounds
               microsoft/wavlm-base-plus, openai/whisper-base  see card    95, 20 M*  50 Hz, 768 and 512   trained on speech alone
    --codec    descript/dac_16khz                              MIT         74 M    50 Hz, 1024  decoder made for quantized latents
               facebook/encodec_24khz                          see card    15 M*   75 Hz, 128   the same
               kyutai/mimi                                     CC BY 4.0*  96 M*   12.5 Hz, 512 speech; partly trained without quantization*
               VibeVoice's acoustic tokenizer, eustlb/pocket-tts-audio-tokenizer  see card   7.5 Hz, 64; 12.5 Hz, 32   continuous latents, speech
    --text     google-t5/t5-base, google/flan-t5-base          Apache-2.0  110 M*  768          the usual choice of audio models
               any BERT-like encoder, laion/clap-htsat-unfused (text tower)       see card, Apache-2.0   768
    --clap     laion/larger_clap_general, laion/clap-htsat-unfused   Apache-2.0   194, 153 M*   48 kHz; scores of different checkpoints can't be compared
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from torch import Tensor, nn
from tqdm import tqdm

from data import RATE, UserError, cache_dir, digest, fill_array
from model import PCA, keep_low_band, log_mel, tame

AT_ONCE = 8  # clips in one call of a pretrained encoder or decoder: their activations are the size of the waveform times channels
WAVE_MODELS = ("hubert", "wavlm", "wav2vec2", "data2vec-audio", "unispeech", "unispeech-sat")  # conv front, then a transformer


# --- loading ------------------------------------------------------------------------------------------------------------------

def load(kind: str, name: str, flag: str, trust: bool = False, pickles: bool = False, **options):
    """transformers.KIND.from_pretrained(name), its many failures each turned into one line that says what to do.

    name: a folder, or a hub id (looked up among what is on this machine first). Weights are read from safetensors; `pickles` also admits
    pytorch_model.bin, `trust` the repository's own Python code."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"--{flag} {name}: needs the package transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = Path(name).expanduser().is_dir()
    if not local and (name.count("/") > 1 or name.startswith((".", "/", "~")) or not name):
        raise UserError(f"--{flag} {name}: no such folder")
    if kind not in ("AutoConfig", "AutoFeatureExtractor", "AutoTokenizer"):
        options |= {"use_safetensors": None if pickles else True}
    where = str(Path(name).expanduser()) if local else name
    for only_here in (True, False):
        if not only_here and not hub_in_reach():
            break
        try:
            return getattr(transformers, kind).from_pretrained(where, trust_remote_code=trust, local_files_only=only_here, **options)
        except Exception as e:  # OSError, ValueError, KeyError, hub and safetensors errors: the text is all they have in common
            why = str(e)
            if "trust_remote_code" in why or "custom code" in why:
                raise UserError(f"--{flag} {name}: comes with Python code of its own, which would run on this machine; read it, then add --trust-remote-code") from None
            if local:
                if not pickles and any(Path(where).glob("*.bin")) and not any(Path(where).glob("*.safetensors")):
                    raise UserError(f"--{flag} {name}: its weights are pickled (.bin), a format that can carry code; convert them to safetensors, or add --allow-pickle") from None
                raise UserError(f"--{flag} {name}: can't be loaded ({type(e).__name__}: {(why.splitlines() or [''])[0][:160]})") from None
    folder = "models/" + name.split("/")[-1]
    raise UserError(f"--{flag} {name}: not on this machine, and the hub can't be reached or has no such model. With a network: hf download {name} --local-dir {folder}; then --{flag} {folder}")


def hub_in_reach() -> bool:
    """Can the hub's name be looked up (or is there a proxy that may)? Its client would retry for half a minute to find out."""
    import os
    import socket

    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE or any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return not constants.HF_HUB_OFFLINE
    try:
        return bool(socket.getaddrinfo(constants.ENDPOINT.split("//")[-1].split("/")[0].split(":")[0], 443))
    except OSError:
        return False


def has_own(name: str, file: str) -> bool:
    """Does a model folder or cached repository hold this file?"""
    if Path(name).expanduser().is_dir():
        return (Path(name).expanduser() / file).is_file()
    from huggingface_hub import try_to_load_from_cache
    return isinstance(try_to_load_from_cache(name, file), str)


def fingerprint(model: nn.Module) -> str:
    """Of the weights: what a cache of features or latents is keyed by."""
    h = hashlib.sha256()
    for name, v in model.state_dict().items():
        h.update(name.encode())
        h.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def settle(model: nn.Module, device: str) -> nn.Module:
    """Frozen, eval mode, on the device; bfloat16 on a GPU (a teacher's features need no more, and float16 overflows in some)."""
    return model.to(device, torch.bfloat16 if device.startswith("cuda") else torch.float32).eval().requires_grad_(False)


# --- teachers -----------------------------------------------------------------------------------------------------------------

class PretrainedTeacher(nn.Module):
    """phi of a pretrained audio encoder: __call__(wav (B, N) at 16 kHz) -> (B, T', F) float32 on the input's device.

    Frame j is centred at `first + j / rate` seconds; T' = ceil(N rate / 16000), so the last frames reach the end of the clip. Long clips
    are heard in windows of the length that the model was made for.

    hubert, wavlm, wav2vec2, data2vec-audio: the conv front eats 400 samples and moves by 320, so it yields one frame less than there are
    320-sample cells, each centred 40 samples late; the clip is therefore padded by 40 samples on each side, and frame j is cell j.
    whisper: encoder frames at 50 Hz, its 30 s window cut to the clip. AST: patches, mean over frequency, 10 Hz. CLAP: the audio tower's last
    map, mean over frequency, 3.2 Hz. Others (USAD): model(wav) -> dict with `x` and `hidden_states`, the rate measured.

    layer: hidden layer to listen to, from 1; 0: the last."""
    takes = "wave"

    def __init__(self, name: str, layer: int = 0, flag: str = "teacher", trust: bool = False, pickles: bool = False, device: str = "cpu"):
        super().__init__()
        how = dict(flag=flag, trust=trust, pickles=pickles)
        self.name, self.layer = name, layer
        self.config = load("AutoConfig", name, **how)
        self.kind = self.config.model_type
        known = self.kind in (*WAVE_MODELS, "whisper", "audio-spectrogram-transformer", "clap", "clap_audio_model")
        if not known and not getattr(self.config, "auto_map", None):
            raise UserError(f"--{flag} {name}: a {self.kind} model is no audio encoder known here; use {', '.join(WAVE_MODELS[:4])}, whisper, audio-spectrogram-transformer, clap or USAD")
        model = load("AutoModel", name, **how)
        model = model.get_encoder() if self.kind == "whisper" else model.audio_model if self.kind == "clap" else model
        self.model = settle(model, device)
        self.extractor = self._extractor(how) if known else None
        self.rate_in = self.extractor.sampling_rate if self.extractor else RATE
        depth = getattr(self.config, "num_hidden_layers", None) or getattr(self.config, "encoder_layers", None)
        if layer and (self.kind.startswith("clap") or depth and not 1 <= layer <= depth):
            raise UserError(f"--{flag}-layer {layer}: {name} has " + ("only its last map to offer; use 0" if self.kind.startswith("clap") else f"layers 1 to {depth}"))
        self.window_s, self.rate, self.first = 30.0, 50.0, 0.01
        if self.kind in WAVE_MODELS:
            field, stride = 1, 1
            for k, s in zip(self.config.conv_kernel, self.config.conv_stride):
                field, stride = field + (k - 1) * stride, stride * s
            self.stride, self.pad, self.rate = stride, field - stride, self.rate_in / stride
            self.first = 0.5 / self.rate
        elif self.kind == "whisper":
            self.first = 0.0                                       # mel frames are centred on multiples of the hop, and so are every second of them
        elif self.kind == "audio-spectrogram-transformer":         # 10 ms frames of 25 ms; a patch spans 16 of them
            self.rate, self.first, self.window_s = 100 / self.config.time_stride, 0.0125 + 0.005 * (self.config.patch_size - 1), 10.0
        elif self.kind.startswith("clap"):
            self.window_s = float(self.extractor.max_length_s)
        if not known or self.kind.startswith("clap"):              # measured: how many frames does a window (or two seconds) give?
            seconds = self.window_s if known else 2.0
            frames = self._frames(torch.zeros(1, round(seconds * RATE))).shape[1]
            self.rate = frames / seconds if known else float(round(frames / seconds))
            self.first = 0.5 / self.rate
        self.features = self._frames(torch.zeros(1, RATE)).shape[2]
        self.key = f"{self.kind}-{layer}-{fingerprint(self.model)}"
        self.eval()

    def _extractor(self, how: dict):
        if has_own(self.name, "preprocessor_config.json") or has_own(self.name, "processor_config.json"):
            return load("AutoFeatureExtractor", self.name, **how)
        import transformers  # weights alone: the family's usual front end
        audio = getattr(self.config, "audio_config", self.config)
        return {"whisper": lambda: transformers.WhisperFeatureExtractor(feature_size=self.config.num_mel_bins),
                "audio-spectrogram-transformer": lambda: transformers.ASTFeatureExtractor(num_mel_bins=self.config.num_mel_bins, max_length=self.config.max_length),
                "clap": lambda: transformers.ClapFeatureExtractor(feature_size=audio.num_mel_bins, truncation="rand_trunc"),
                }.get(self.kind.removesuffix("_audio_model"), transformers.Wav2Vec2FeatureExtractor)()

    def _frames(self, wav: Tensor) -> Tensor:
        """One window: (B, N) at 16 kHz -> all frames the model gives, (B, T', F)."""
        p = next(self.model.parameters())
        wav = TAF.resample(wav.float(), RATE, self.rate_in) if self.rate_in != RATE else wav.float()
        if self.kind in WAVE_MODELS:
            if self.extractor.do_normalize:
                wav = (wav - wav.mean(1, keepdim=True)) / (wav.var(1, keepdim=True, unbiased=False) + 1e-7).sqrt()
            n = -(-wav.shape[1] // self.stride) * self.stride - wav.shape[1]
            wav = F.pad(wav, (self.pad // 2, n + self.pad - self.pad // 2))
            out = self.model(wav.to(p.device, p.dtype), output_hidden_states=True)
            return out.hidden_states[self.layer or -1]
        if self.extractor is None:                                 # USAD and other models that bring their own code
            out = self.model(wav.to(p.device, p.dtype))            # what frames it gives is its own affair; forward() cuts
            return out["hidden_states"][self.layer - 1] if self.layer else out["x"]
        x = self.extractor([w.cpu().numpy() for w in wav], sampling_rate=self.rate_in, return_tensors="pt")
        if self.kind.startswith("clap"):
            last = self.model(x["input_features"].to(p.device, p.dtype), is_longer=nothing_longer(len(x["input_features"]), p.device)).last_hidden_state
            return last.mean(2).mT                                 # (B, F, frequencies, times) -> (B, times, F)
        if self.kind == "whisper":
            return self.model(x["input_features"].to(p.device, p.dtype), output_hidden_states=True).hidden_states[self.layer or -1]
        h = self.model(x["input_values"].to(p.device, p.dtype), output_hidden_states=True).hidden_states[self.layer or -1]
        bands = (self.config.num_mel_bins - self.config.patch_size) // self.config.frequency_stride + 1
        return h[:, 2:].unflatten(1, (bands, -1)).mean(1)          # two special tokens, then bands x times

    @torch.no_grad()
    def forward(self, wav: Tensor) -> Tensor:
        window, out = round(self.window_s * RATE), []
        for start in range(0, wav.shape[1], window):
            part = wav[:, start : start + window]
            silence = max(0, RATE // 10 - part.shape[1])           # 100 ms at least: the front must have something to stand on
            if self.extractor is None:                             # a front of unknown padding may owe the last frame
                silence = max(silence, round(2 * RATE / self.rate))
            full = F.pad(part, (0, silence))
            frames = torch.cat([self._frames(some) for some in full.split(AT_ONCE)])
            out.append(frames[:, : -(-part.shape[1] * round(self.rate * 100) // (RATE * 100))])
        return torch.cat(out, 1).float().to(wav.device)


# --- codecs -------------------------------------------------------------------------------------------------------------------

CODECS = {  # model_type -> (samples a latent frame, of a config; wav (B, 1, n) -> z (B, D, T); z -> wav)
    "dac": (lambda c: int(np.prod(c.downsampling_ratios)), lambda m, x: m.encoder(x), lambda m, z: m.decoder(z)),
    "encodec": (lambda c: int(np.prod(c.upsampling_ratios)), lambda m, x: m.encoder(x), lambda m, z: m.decoder(z)),
    "mimi": (lambda c: round(c.sampling_rate / c.frame_rate), lambda m, x: m.encoder(x).latents, lambda m, z: m.decoder(z).audio_values),
    "vibevoice_acoustic_tokenizer": (lambda c: c.hop_length, lambda m, x: m.encode(x, sample=False).latents.mT, lambda m, z: m.decode(z.mT).audio),
    "pocket_tts_audio_tokenizer": (lambda c: c.frame_size, lambda m, x: m.encode(x).latents.mT, lambda m, z: m.decode(z.mT).audio_values),
}


class PretrainedCodec(PCA):
    """A neural codec's latents before quantization, projected on `channels` principal components where they are wider, as a latent space
    with the interface of model.Codec: fit, encode (B, N) -> (B, T, C), decode, tokens, rate (tokens a second), key.

    DAC's and EnCodec's decoders were trained on quantized latents, and PCA drops what the decoder might need: read the round trip
    (`evaluate.py score --codec`) before a model is trained in such a space. Only the PCA is kept in a checkpoint, not the codec."""

    def __init__(self, name: str, channels: int = 64, flag: str = "codec", trust: bool = False, pickles: bool = False, device: str = "cpu"):
        how = dict(flag=flag, trust=trust, pickles=pickles)
        config = load("AutoConfig", name, **how)
        if config.model_type not in CODECS:
            raise UserError(f"--{flag} {name}: a {config.model_type} model is no codec known here; use {', '.join(CODECS)}")
        if getattr(config, "normalize", False) or getattr(config, "audio_channels", 1) > 1:
            raise UserError(f"--{flag} {name}: normalizes each chunk (or is stereo), which latents alone can't undo; use the mono model, for example facebook/encodec_24khz")
        hop, encode, _ = CODECS[config.model_type]
        model = load("AutoModel", name, **how).to(device).eval().requires_grad_(False)  # float32: what it rounds off is heard
        rate_in = getattr(config, "sampling_rate", None) or (load("AutoFeatureExtractor", name, **how).sampling_rate if has_own(name, "preprocessor_config.json") else 24_000)
        with torch.no_grad():
            d = encode(model, torch.zeros(1, 1, 8 * hop(config), device=device)).shape[1]
        super().__init__(d, min(channels, d))
        self.model, self.name, self.kind, self.rate_in, self.hop = model, name, config.model_type, rate_in, hop(config)
        self.rate, self._model_key = rate_in / self.hop, fingerprint(model)
        self.to(device)

    def state_dict(self, *args, **kwargs) -> dict:
        return {name: getattr(self, name) for name in ("mean", "basis", "scale")}

    def load_state_dict(self, state: dict, strict: bool = True):
        for name, v in self.state_dict().items():
            if state[name].shape != v.shape:
                raise RuntimeError(f"codec\n{name}: {tuple(state[name].shape)} in the file, {tuple(v.shape)} here: another codec than {self.name}")
            v.copy_(state[name])

    @property
    def key(self) -> str:
        return self.fingerprint(1, self._model_key)

    def tokens(self, n: int) -> int:
        """Tokens of n samples at 16 kHz (the last one may be padded)."""
        return max(1, -(-int(n) * self.rate_in // (RATE * self.hop)))

    @torch.no_grad()
    def native(self, wav: Tensor) -> Tensor:
        """(B, N) at 16 kHz -> the codec's own latents (B, T, D)."""
        device, T = self.mean.device, self.tokens(wav.shape[-1])
        x = TAF.resample(wav.to(device), RATE, self.rate_in)
        x = F.pad(x, (0, max(0, T * self.hop - x.shape[-1])))[:, None, : T * self.hop]
        return torch.cat([CODECS[self.kind][1](self.model, part) for part in x.split(AT_ONCE)])[..., :T].mT

    def fit(self, waves) -> PretrainedCodec:
        """PCA of the latents of an iterable of waveforms (N,)."""
        self.fit_rows(torch.cat([self.native(torch.as_tensor(w)[None])[0] for w in tqdm(list(waves), desc="fitting PCA", unit="clip", dynamic_ncols=True)]))
        return self

    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> z (B, T, C) on the input's device."""
        return self.project(self.native(wav)).to(wav.device)

    @torch.no_grad()
    def wave(self, native: Tensor) -> Tensor:
        """The codec's own latents (B, T, D) -> wav (B, T 16000 / rate)."""
        y = torch.cat([CODECS[self.kind][2](self.model, part) for part in native.mT.contiguous().split(AT_ONCE)])[:, 0]
        lost = native.shape[1] * self.hop - y.shape[-1]            # DAC's odd strides lose a few samples at each end
        y = F.pad(y, (max(0, lost // 2), max(0, lost - lost // 2)))[:, : native.shape[1] * self.hop]
        return TAF.resample(y, self.rate_in, RATE)

    def decode(self, z: Tensor, muffled: Tensor | None = None, cutoff: float | None = None) -> Tensor:
        """z (B, T, C) -> wav; with muffled (B, N) and cutoff (Hz) the band under the cutoff is the recording's own."""
        y = self.wave(self.restore(z.to(self.mean.device))).to(z.device)
        return tame(y) if muffled is None else keep_low_band(y, muffled, cutoff)

    def decode_mel(self, z: Tensor) -> Tensor:
        """z (B, T, C) -> log-mel (B, F, 64) of what it decodes to: the embedded teacher hears mel frames."""
        return log_mel(self.decode(z))


# --- text ---------------------------------------------------------------------------------------------------------------------

class PretrainedText(nn.Module):
    """A frozen text encoder with the interface of model.Words: encode(captions) -> (B, 1 + S, E), row 0 the pooled embedding, then one row a
    token, all-zero rows behind the end; the empty caption is all zeros (model.TextAdapter has a learned vector for it).

    t5 family: pooled = mean over tokens. BERT-like and CLAP text towers: their own pooled output, or the mean where they have none."""
    words: list[str] = []                                          # any word may be asked for

    def __init__(self, name: str, flag: str = "text", trust: bool = False, pickles: bool = False, device: str = "cpu", max_tokens: int = 64):
        super().__init__()
        how = dict(flag=flag, trust=trust, pickles=pickles)
        self.name, config = name, load("AutoConfig", name, **how)
        if config.model_type in ("t5", "mt5", "umt5", "longt5"):
            model = load({"t5": "T5", "mt5": "MT5", "umt5": "UMT5", "longt5": "LongT5"}[config.model_type] + "EncoderModel", name, **how)
        else:
            model = load("AutoModel", name, **how)
            model = model.text_model if config.model_type == "clap" else model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model
        self.model, self.tokenizer = settle(model, device), load("AutoTokenizer", name, **how)
        self.max_tokens = min(max_tokens, self.tokenizer.model_max_length)
        self.features = self.encode(["a"]).shape[2]
        self.key = f"{config.model_type}-{self.max_tokens}-{fingerprint(self.model)}"
        self.eval()

    def lengths(self, captions: list[str]) -> list[int]:
        """Rows of each caption: 1 + its tokens; 0 for the empty one. Says how many were too long."""
        ids = [self.tokenizer(c)["input_ids"] if c.strip() else [] for c in captions]
        cut = sum(len(i) > self.max_tokens for i in ids)
        if cut:
            print(f"warning: {cut} of {len(captions)} captions have more than {self.max_tokens} tokens; the rest of each is left out")
        return [1 + min(len(i), self.max_tokens) if i else 0 for i in ids]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        some = [k for k, c in enumerate(captions) if c.strip()]
        if not some:
            return torch.zeros(len(captions), 2, getattr(self, "features", 1))
        x = self.tokenizer([captions[k] for k in some], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        device = next(self.model.parameters()).device
        out = self.model(input_ids=x["input_ids"].to(device), attention_mask=x["attention_mask"].to(device))
        h, mask = out.last_hidden_state.float().cpu(), x["attention_mask"].bool()[..., None]
        pooled = getattr(out, "pooler_output", None)
        pooled = (h * mask).sum(1) / mask.sum(1) if pooled is None else pooled.float().cpu()
        rows = torch.zeros(len(captions), 1 + h.shape[1], h.shape[2])
        rows[some] = torch.cat([pooled[:, None], h * mask], 1)
        return rows

    def cache(self, captions: list[list[str]]) -> CachedText:
        """Wordings of each clip -> their embeddings."""
        return CachedText(self, captions)

    def unknown(self, caption: str) -> dict:
        return {}

    def split(self, caption: str) -> list[str]:
        return caption.split()


class CachedText:
    """Encoded captions of a data set, in one float16 memory map: text[i][k] -> (1 + S, E) of wording k of clip i. Equal captions are
    encoded once."""

    def __init__(self, encoder: PretrainedText, captions: list[list[str]]):
        self.captions, unique = captions, sorted({c for cs in captions for c in cs})
        self.row = {c: k for k, c in enumerate(unique)}
        self.where = np.concatenate([[0], np.cumsum([max(2, n) for n in encoder.lengths(unique)])])
        self.z = fill_array(cache_dir() / f"text-{digest(encoder.key, *unique)}", "z", (self.where[-1], encoder.features), np.float16, self._chunk, len(unique),
                            (encoder, unique), where=self.where, workers=0, desc="encoding captions")

    @staticmethod
    def _chunk(indices, encoder, unique):
        rows = encoder.encode([unique[i] for i in indices])
        keep = rows.abs().sum(-1) > 0
        keep[:, :2] = True                                         # an empty caption keeps two empty rows
        return rows[keep].clamp(-6e4, 6e4).numpy().astype(np.float16)

    def __getitem__(self, i: int) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(self.z[self.where[r] : self.where[r + 1]], np.float32)) for r in (self.row[c] for c in self.captions[i])]


# --- models that judge ----------------------------------------------------------------------------------------------------------

def nothing_longer(n: int, device) -> Tensor:
    """CLAP's is_longer (n, 1). Clips are cut to its window before it sees them; left to itself the front end of a fusion model declares a
    random one too long, and scores would change from call to call."""
    return torch.zeros(n, 1, dtype=torch.bool, device=device)


def _pooled(out) -> Tensor:
    """get_text_features and get_audio_features: a tensor in transformers 4, an output with pooler_output in 5."""
    return F.normalize((out if isinstance(out, Tensor) else out.pooler_output).float(), dim=-1)


class Clap(nn.Module):
    """A CLAP model: text and audio in one space. CLAP score = mean cosine of each clip with its caption; scores of different
    checkpoints can't be compared."""

    def __init__(self, name: str, flag: str = "clap", trust: bool = False, pickles: bool = False, device: str = "cpu"):
        super().__init__()
        how = dict(flag=flag, trust=trust, pickles=pickles)
        self.name, config = name, load("AutoConfig", name, **how)
        if config.model_type != "clap":
            raise UserError(f"--{flag} {name}: a {config.model_type} model; a CLAP model (text and audio towers) is needed")
        self.model = load("ClapModel", name, **how).to(device).eval().requires_grad_(False)  # float32: a metric should not depend on the device
        self.extractor, self.tokenizer = load("AutoFeatureExtractor", name, **how), load("AutoTokenizer", name, **how)
        self.rate_in, self.key = self.extractor.sampling_rate, f"clap-{fingerprint(self.model)}"
        self.eval()

    @torch.no_grad()
    def text(self, captions: list[str], batch: int = 64) -> np.ndarray:
        """Captions -> (n, E)."""
        device, out = next(self.model.parameters()).device, []
        for k in range(0, len(captions), batch):
            x = self.tokenizer(captions[k : k + batch], padding=True, truncation=True, return_tensors="pt")
            out.append(_pooled(self.model.get_text_features(input_ids=x["input_ids"].to(device), attention_mask=x["attention_mask"].to(device))).cpu())
        return torch.cat(out).numpy()

    @torch.no_grad()
    def audio(self, waves, batch: int = 16) -> np.ndarray:
        """Waveforms (n, N) at 16 kHz -> (n, E). Of clips longer than the model's window the first part is heard, always the same."""
        device, out = next(self.model.parameters()).device, []
        for k in range(0, len(waves), batch):
            x = TAF.resample(torch.as_tensor(np.ascontiguousarray(waves[k : k + batch])).float(), RATE, self.rate_in)[:, : self.extractor.nb_max_samples]
            x = self.extractor([w.numpy() for w in x], sampling_rate=self.rate_in, return_tensors="pt")
            out.append(_pooled(self.model.get_audio_features(input_features=x["input_features"].to(device), is_longer=nothing_longer(len(x["input_features"]), device))).cpu())
        return torch.cat(out).numpy()


class Embedder:
    """Any audio model as the space of KID and Frechet distances: clip embeddings (n, E), a CLAP's projected ones, else the last
    layer's mean over time."""

    def __init__(self, name: str, flag: str = "audio-model", trust: bool = False, pickles: bool = False, device: str = "cpu"):
        clap = load("AutoConfig", name, flag, trust, pickles).model_type == "clap"
        self.net = (Clap if clap else PretrainedTeacher)(name, flag=flag, trust=trust, pickles=pickles, device=device)
        self.name, self.key, self.rate_in = name, self.net.key, self.net.rate_in

    def audio(self, waves, batch: int = 16) -> np.ndarray:
        if isinstance(self.net, Clap):
            return self.net.audio(waves, batch)
        return torch.cat([self.net(torch.as_tensor(np.ascontiguousarray(waves[k : k + batch]))).mean(1) for k in range(0, len(waves), batch)]).numpy()
