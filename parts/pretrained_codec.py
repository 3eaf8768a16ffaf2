"""Another latent space: a pretrained neural codec in the place of the embedded one (parts/codec.py).

Idea.  A neural codec's latents before quantization are a latent space as good as any. Where they are wider
than a small DiT can model, a PCA keeps their first principal components.

    wav (B, N) at 16 kHz  <->  latents (B, T, D)  <->  z (B, T, C), C <= D

Codecs that fit (--codec, a folder or hub id; * from memory or a third party: read the model's card):

    descript/dac_16khz                 MIT         74 M   50 Hz, 1024
        decoder made for quantized latents
    facebook/encodec_24khz             see card    15 M*  75 Hz, 128
        the same
    kyutai/mimi                        CC BY 4.0*  96 M*  12.5 Hz, 512
        speech; partly trained without quantization*
    VibeVoice's acoustic tokenizer     see card           7.5 Hz, 64
        continuous latents, speech
    eustlb/pocket-tts-audio-tokenizer  see card           12.5 Hz, 32
        continuous latents, speech

Another family needs a class with three functions, named in CODECS.

Public: PretrainedCodec, CODECS.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from torch import Tensor
from tqdm import tqdm

from parts.audio import RATE
from parts.codec import PCA, keep_low_band, limit_peak
from parts.errors import UserError
from parts.pretrained import CLIPS_PER_CALL, fingerprint, has_own, load
from parts.spectra import log_mel


class Family(NamedTuple):
    """How codecs of a family are called: samples a latent frame, of a configuration; wav (B, 1, n) -> latents
    (B, D, T) before quantization; latents -> wav (B, 1, n), both of a model."""
    hop: Callable
    encode: Callable
    decode: Callable


CODECS = {  # model_type of a configuration -> its family
    "dac": Family(lambda config: math.prod(config.downsampling_ratios),
                  lambda model, wav: model.encoder(wav),
                  lambda model, latents: model.decoder(latents)),
    "encodec": Family(lambda config: math.prod(config.upsampling_ratios),
                      lambda model, wav: model.encoder(wav),
                      lambda model, latents: model.decoder(latents)),
    "mimi": Family(lambda config: round(config.sampling_rate / config.frame_rate),
                   lambda model, wav: model.encoder(wav).latents,
                   lambda model, latents: model.decoder(latents).audio_values),
    "vibevoice_acoustic_tokenizer": Family(lambda config: config.hop_length,
                                           lambda model, wav: model.encode(wav, sample=False).latents.mT,
                                           lambda model, latents: model.decode(latents.mT).audio),
    "pocket_tts_audio_tokenizer": Family(lambda config: config.frame_size,
                                         lambda model, wav: model.encode(wav).latents.mT,
                                         lambda model, latents: model.decode(latents.mT).audio_values),
}


class PretrainedCodec(PCA):
    """A neural codec's latents before quantization, projected on `channels` principal components where they
    are wider, as a latent space with the interface of codec.Codec: fit, encode (B, N) -> (B, T, C), decode,
    tokens, rate (tokens a second), key.

    DAC's and EnCodec's decoders were trained on quantized latents, and PCA drops what the decoder might need:
    read the round trip (`python -m lab.score_codec MODEL`) before a model is trained in such a space. Only
    the PCA goes into a checkpoint, not the codec.

    flag: the setting that named the model, for messages. trust, pickles: see parts.pretrained.load. Raises
    UserError."""

    def __init__(self, name: str, channels: int = 64, flag: str = "codec", trust: bool = False,
                 pickles: bool = False, device: str = "cpu"):
        how = dict(flag=flag, trust=trust, pickles=pickles)
        config = load("AutoConfig", name, **how)
        _check_config(config, name, flag)
        family = CODECS[config.model_type]
        # float32 on every device: what bfloat16 rounds off would be audible.
        model = load("AutoModel", name, **how).to(device).eval().requires_grad_(False)
        rate_in = _sampling_rate(config, name, how)
        hop = family.hop(config)
        with torch.no_grad():
            width = family.encode(model, torch.zeros(1, 1, 8 * hop, device=device)).shape[1]  # D

        super().__init__(width, min(channels, width))
        self.name = name
        self.family = family
        self.model = model
        self.rate_in = rate_in          # Hz, the codec's own sampling rate
        self.hop = hop                  # samples a token, at rate_in
        self.rate = rate_in / hop       # tokens a second
        self._model_key = fingerprint(model)
        self.to(device)

    def state_dict(self, *args, **kwargs) -> dict:
        """The PCA alone."""
        return {name: getattr(self, name) for name in ("mean", "basis", "scale")}

    def load_state_dict(self, state: dict, strict: bool = True):
        """RuntimeError where the PCA is that of another codec."""
        for name, value in self.state_dict().items():
            if state[name].shape != value.shape:
                raise RuntimeError(
                    f"codec\n{name}: {tuple(state[name].shape)} in the file, {tuple(value.shape)} here: "
                    f"another codec than {self.name}"
                )
            value.copy_(state[name])

    @property
    def key(self) -> str:
        """Changes when the latent space changes: part of the name of a latent cache."""
        return self.fingerprint(1, self._model_key)

    def tokens(self, n: int) -> int:
        """Tokens of n samples at 16 kHz (the last one may be padded)."""
        return max(1, -(-int(n) * self.rate_in // (RATE * self.hop)))

    @torch.no_grad()
    def native(self, wav: Tensor) -> Tensor:
        """(B, N) at 16 kHz -> the codec's own latents (B, T, D)."""
        tokens = self.tokens(wav.shape[-1])
        samples = tokens * self.hop
        x = TAF.resample(wav.to(self.mean.device), RATE, self.rate_in)
        x = F.pad(x, (0, max(0, samples - x.shape[-1])))[:, None, :samples]                # (B, 1, T hop)
        latents = torch.cat([self.family.encode(self.model, clips) for clips in x.split(CLIPS_PER_CALL)])
        return latents[..., :tokens].mT                                                    # (B, T, D)

    def fit(self, waves) -> PretrainedCodec:
        """PCA of the latents of an iterable of waveforms (N,)."""
        progress = tqdm(list(waves), desc="fitting PCA", unit="clip", dynamic_ncols=True)
        self.fit_rows(torch.cat([self.native(torch.as_tensor(wave)[None])[0] for wave in progress]))
        return self

    def encode(self, wav: Tensor) -> Tensor:
        """(B, N) -> z (B, T, C) on the input's device."""
        return self.project(self.native(wav)).to(wav.device)

    @torch.no_grad()
    def wave(self, native: Tensor) -> Tensor:
        """The codec's own latents (B, T, D) -> wav (B, T 16000 / rate)."""
        latents = native.mT.contiguous()                                                   # (B, D, T)
        y = torch.cat([self.family.decode(self.model, clips) for clips in latents.split(CLIPS_PER_CALL)])
        y = y[:, 0]                                                                        # (B, about T hop)
        # DAC's odd strides lose a few samples at each end.
        samples = native.shape[1] * self.hop
        lost = samples - y.shape[-1]
        y = F.pad(y, (max(0, lost // 2), max(0, lost - lost // 2)))[:, :samples]
        return TAF.resample(y, self.rate_in, RATE)

    def decode(self, z: Tensor, muffled: Tensor | None = None, cutoff: float | None = None,
               seeds: list[int] | None = None) -> Tensor:
        """z (B, T, C) -> wav; with muffled (B, N) and cutoff (Hz) the band under the cutoff is the
        recording's own. seeds: for nothing, these decoders draw no noise."""
        y = self.wave(self.restore(z.to(self.mean.device))).to(z.device)
        return limit_peak(y) if muffled is None else keep_low_band(y, muffled, cutoff)

    def decode_mel(self, z: Tensor) -> Tensor:
        """z (B, T, C) -> log-mel (B, F, 64) of what it decodes to: the embedded teacher takes mel frames."""
        return log_mel(self.decode(z))


def _check_config(config, name: str, flag: str) -> None:
    """UserError where this is no codec, or one whose latents alone don't say how to decode them."""
    if config.model_type not in CODECS:
        raise UserError(
            f"--{flag} {name}: a {config.model_type} model is no codec known here; use {', '.join(CODECS)}"
        )
    if getattr(config, "normalize", False) or getattr(config, "audio_channels", 1) > 1:
        raise UserError(
            f"--{flag} {name}: normalizes each chunk (or is stereo), which latents alone can't undo; "
            "use the mono model, for example facebook/encodec_24khz"
        )


def _sampling_rate(config, name: str, how: dict) -> int:
    """Hz: the configuration's, else the front end's, else 24 kHz, which most of these codecs have."""
    rate = getattr(config, "sampling_rate", None)
    if rate:
        return rate
    if has_own(name, "preprocessor_config.json"):
        return load("AutoFeatureExtractor", name, **how).sampling_rate
    return 24_000
