"""Another SSL teacher: a pretrained audio encoder in the place of the embedded one (parts/teacher.py).

Idea.  Any encoder will do whose frames have known times. This file gives every family one interface: a
waveform comes in, frames go out, and `rate` and `first` say when they are; parts.teacher.TeacherFeatures
aligns them with tokens.

    wav (B, N) at 16 kHz -> phi (B, T', F) float32; frame j is centred at first + j / rate seconds

Teachers that fit (--teacher, a folder or hub id; * from memory or a third party: read the model's card):

    MIT-SLS/USAD-Base (with --trust-remote-code)  BSD-3       94 M   50 Hz, 768
        speech, music and sound: the paper's kind of teacher
    MIT/ast-finetuned-audioset-10-10-0.4593       BSD-3*      87 M*  10 Hz, 768
        general audio, supervised, coarse in time
    laion/clap-htsat-unfused (audio tower)        Apache-2.0  28 M*  3.2 Hz, 768
        general audio, supervised by captions, very coarse
    facebook/hubert-base-ls960, facebook/wav2vec2-base, facebook/data2vec-audio-base
                                                  Apache-2.0  95 M*  50 Hz, 768
        trained on speech alone: weak on other sounds
    microsoft/wavlm-base-plus, openai/whisper-base  see card  95, 20 M*  50 Hz, 768 and 512
        trained on speech alone

Another family needs a line in `_set_times` (when its frames are) and a `_..._frames` function (how it is
called).

Public: PretrainedTeacher, nothing_longer, WAVE_MODELS.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from torch import Tensor, nn

from parts.audio import RATE
from parts.errors import UserError
from parts.pretrained import CLIPS_PER_CALL, fingerprint, freeze, has_own, load

# A convolutional front on the waveform, then a transformer.
WAVE_MODELS = ("hubert", "wavlm", "wav2vec2", "data2vec-audio", "unispeech", "unispeech-sat")
WHISPER = "whisper"
AST = "audio-spectrogram-transformer"
CLAP = ("clap", "clap_audio_model")  # the whole model, or its audio tower alone


class PretrainedTeacher(nn.Module):
    """phi of a pretrained audio encoder: wav (B, N) at 16 kHz -> (B, T', F) float32 on the input's device.

    Frame j is centred at `first + j / rate` seconds; T' = ceil(N rate / 16000), so the last frames reach the
    end of the clip. Long clips are cut into windows of the length that the model was made for.

    hubert, wavlm, wav2vec2, data2vec-audio: the conv front takes 400 samples and moves by 320, so it yields
    one frame less than there are 320-sample cells, each centred 40 samples late; the clip is therefore padded
    by 40 samples on each side, and frame j is cell j.
    whisper: encoder frames at 50 Hz, its 30 s window cut to the clip.
    AST: patches, mean over frequency, 10 Hz.
    CLAP: the audio tower's last map, mean over frequency, 3.2 Hz.
    Others (USAD): model(wav) -> dict with `x` and `hidden_states`, the rate measured.

    layer: hidden layer to read, from 1; 0: the last. flag: the setting that named the model, for messages.
    trust, pickles: see parts.pretrained.load. Raises UserError."""
    takes = "wave"

    def __init__(self, name: str, layer: int = 0, flag: str = "teacher", trust: bool = False,
                 pickles: bool = False, device: str = "cpu"):
        super().__init__()
        how = dict(flag=flag, trust=trust, pickles=pickles)
        self.name = name
        self.layer = layer
        self.config = load("AutoConfig", name, **how)
        self.kind = self.config.model_type
        known = self.kind in (*WAVE_MODELS, WHISPER, AST, *CLAP)
        if not known and not getattr(self.config, "auto_map", None):
            raise UserError(
                f"--{flag} {name}: a {self.kind} model is no audio encoder known here; "
                f"use {', '.join(WAVE_MODELS[:4])}, whisper, audio-spectrogram-transformer, clap or USAD"
            )
        self.model = freeze(self._load_encoder(how), device)
        # The model's own front end (normalization, log-mel); None: it takes waveforms at 16 kHz as they are.
        self.extractor = self._load_extractor(how) if known else None
        self.rate_in = self.extractor.sampling_rate if self.extractor else RATE
        self._check_layer(flag)

        self.window_s = 30.0  # s, the longest input
        self.rate = 50.0      # frames a second
        self.first = 0.01     # s, centre of frame 0
        self.stride = 0       # of a conv front: samples a frame,
        self.pad = 0          # and those by which its windows overlap
        try:
            self._set_times()
            self.features = self._frames(torch.zeros(1, RATE)).shape[2]
        except IndexError:  # a model with code of its own need not say how many it has
            raise UserError(f"--{flag}-layer {layer}: {name} has fewer layers") from None
        self.key = f"{self.kind}-{layer or 'last'}-{fingerprint(self.model)}"
        self.eval()

    def _load_encoder(self, how: dict) -> nn.Module:
        """The half of the model that encodes audio."""
        model = load("AutoModel", self.name, **how)
        if self.kind == WHISPER:
            return model.get_encoder()
        if self.kind == "clap":
            return model.audio_model
        return model

    def _load_extractor(self, how: dict):
        """The front end that came with the model; where only weights came, the family's usual one."""
        if has_own(self.name, "preprocessor_config.json") or has_own(self.name, "processor_config.json"):
            return load("AutoFeatureExtractor", self.name, **how)
        import transformers
        if self.kind == WHISPER:
            return transformers.WhisperFeatureExtractor(feature_size=self.config.num_mel_bins)
        if self.kind == AST:
            return transformers.ASTFeatureExtractor(
                num_mel_bins=self.config.num_mel_bins, max_length=self.config.max_length
            )
        if self.kind in CLAP:
            audio = getattr(self.config, "audio_config", self.config)
            return transformers.ClapFeatureExtractor(feature_size=audio.num_mel_bins, truncation="rand_trunc")
        return transformers.Wav2Vec2FeatureExtractor()

    def _check_layer(self, flag: str) -> None:
        """UserError where `layer` is none of the model's layers."""
        if not self.layer:
            return
        if self.kind in CLAP:
            raise UserError(f"--{flag}-layer {self.layer}: {self.name} has only its last map to offer; use 0")
        depth = getattr(self.config, "num_hidden_layers", None)
        depth = depth or getattr(self.config, "encoder_layers", None)
        if depth and not 1 <= self.layer <= depth:
            raise UserError(f"--{flag}-layer {self.layer}: {self.name} has layers 1 to {depth}")

    def _set_times(self) -> None:
        """Sets rate, first, window_s, and a conv front's stride and pad."""
        if self.kind in WAVE_MODELS:
            # Receptive field and stride of a stack of convolutions, in samples.
            field = 1
            stride = 1
            for kernel_size, layer_stride in zip(self.config.conv_kernel, self.config.conv_stride):
                field += (kernel_size - 1) * stride
                stride *= layer_stride
            self.stride = stride
            self.pad = field - stride
            self.rate = self.rate_in / stride
            self.first = 0.5 / self.rate
        elif self.kind == WHISPER:
            # Mel frames are centred on multiples of the hop, and so are every second of them.
            self.first = 0.0
        elif self.kind == AST:
            # 10 ms mel frames, each 25 ms long; a patch spans 16 of them.
            self.rate = 100 / self.config.time_stride
            self.first = 0.0125 + 0.005 * (self.config.patch_size - 1)
            self.window_s = 10.0
        elif self.kind in CLAP:
            # Measured: how many frames does a window give?
            self.window_s = float(self.extractor.max_length_s)
            self.rate = self._count_frames(self.window_s) / self.window_s
            self.first = 0.5 / self.rate
        else:
            # Measured on two seconds; a frame more or less at the ends must not count, so to whole Hz.
            self.rate = float(round(self._count_frames(2.0) / 2.0))
            self.first = 0.5 / self.rate

    def _count_frames(self, seconds: float) -> int:
        return self._frames(torch.zeros(1, round(seconds * RATE))).shape[1]

    @torch.no_grad()
    def forward(self, wav: Tensor) -> Tensor:
        """wav (B, N) at 16 kHz -> phi (B, ceil(N rate / 16000), F) float32 on the input's device."""
        window = round(self.window_s * RATE)
        phi = []
        for start in range(0, wav.shape[1], window):
            part = wav[:, start : start + window]
            # 100 ms at least, so that the front end has one frame to work on. A model with code of its own
            # may pad in ways unknown here and give a frame too few: two frames of silence make up for it.
            silence = max(0, RATE // 10 - part.shape[1])
            if self.extractor is None:
                silence = max(silence, round(2 * RATE / self.rate))
            padded = F.pad(part, (0, silence))
            frames = torch.cat([self._frames(clips) for clips in padded.split(CLIPS_PER_CALL)])

            # Cut to ceil(samples rate / 16000), in integers: a rate counts to hundredths of a Hz.
            n_frames = -(-part.shape[1] * round(self.rate * 100) // (RATE * 100))
            phi.append(frames[:, :n_frames])
        return torch.cat(phi, 1).float().to(wav.device)                # (B, T', F)

    # --- one window, all the frames that the model gives for it: (B, N) -> (B, T', F), one function a family

    def _frames(self, wav: Tensor) -> Tensor:
        """wav (B, N) at 16 kHz -> frames in the model's precision, on its device."""
        wav = wav.float()
        if self.rate_in != RATE:
            wav = TAF.resample(wav, RATE, self.rate_in)
        if self.kind in WAVE_MODELS:
            return self._conv_front_frames(wav)
        if self.kind == WHISPER:
            return self._whisper_frames(wav)
        if self.kind == AST:
            return self._ast_frames(wav)
        if self.kind in CLAP:
            return self._clap_frames(wav)
        return self._own_code_frames(wav)

    def _to_model(self, x: Tensor) -> Tensor:
        """x on the model's device, in its precision."""
        weight = next(self.model.parameters())
        return x.to(weight.device, weight.dtype)

    def _extract(self, wav: Tensor) -> dict:
        """What the model's front end makes of the clips."""
        clips = [clip.cpu().numpy() for clip in wav]
        return self.extractor(clips, sampling_rate=self.rate_in, return_tensors="pt")

    def _layer_of(self, out) -> Tensor:
        """The chosen layer of a model's output (B, T', F). The last one's is the normalised output, which in
        some families hidden_states does not hold."""
        last = len(out.hidden_states) - 1
        return out.last_hidden_state if self.layer in (0, last) else out.hidden_states[self.layer]

    def _conv_front_frames(self, wav: Tensor) -> Tensor:
        if self.extractor.do_normalize:
            deviation = (wav.var(1, keepdim=True, unbiased=False) + 1e-7).sqrt()
            wav = (wav - wav.mean(1, keepdim=True)) / deviation
        to_whole_cells = -(-wav.shape[1] // self.stride) * self.stride - wav.shape[1]
        wav = F.pad(wav, (self.pad // 2, to_whole_cells + self.pad - self.pad // 2))
        out = self.model(self._to_model(wav), output_hidden_states=True)
        return self._layer_of(out)

    def _whisper_frames(self, wav: Tensor) -> Tensor:
        mel = self._to_model(self._extract(wav)["input_features"])
        return self._layer_of(self.model(mel, output_hidden_states=True))

    def _ast_frames(self, wav: Tensor) -> Tensor:
        mel = self._to_model(self._extract(wav)["input_values"])
        hidden = self._layer_of(self.model(mel, output_hidden_states=True))
        # Two special tokens, then bands x times.
        bands = (self.config.num_mel_bins - self.config.patch_size) // self.config.frequency_stride + 1
        return hidden[:, 2:].unflatten(1, (bands, -1)).mean(1)          # (B, bands T', F) -> (B, T', F)

    def _clap_frames(self, wav: Tensor) -> Tensor:
        mel = self._to_model(self._extract(wav)["input_features"])
        last = self.model(mel, is_longer=nothing_longer(len(mel), mel.device)).last_hidden_state
        return last.mean(2).mT                                         # (B, F, frequencies, T') -> (B, T', F)

    def _own_code_frames(self, wav: Tensor) -> Tensor:
        """USAD and other models with code of their own: how many frames they give is up to them, forward()
        cuts."""
        out = self.model(self._to_model(wav))
        return out["hidden_states"][self.layer - 1] if self.layer else out["x"]


def nothing_longer(n: int, device) -> Tensor:
    """CLAP's input is_longer (n, 1), all False.

    Clips are cut to CLAP's window before they reach it. If its front end decided, that of a fusion model
    would declare a random clip too long, and scores would change from call to call."""
    return torch.zeros(n, 1, dtype=torch.bool, device=device)
