"""Judges from outside: other people's embeddings of sounds and captions, for scores alone.

Idea.  The embedded judges (parts/judges.py) know synthetic events only. Recordings are judged in the space
of a pretrained model, where distances between sets (KID, Frechet) and between a clip and its caption mean
something.

    wav (n, N) at 16 kHz, captions --Clap--> embeddings (n, E) of unit length: CLAP score, KID
    wav (n, N) at 16 kHz --Embedder--> embeddings (n, E) of any audio model: KID, Frechet distance

Models that fit (a folder or hub id; * from memory or a third party: read the model's card):

    --clap         laion/larger_clap_general, laion/clap-htsat-unfused  Apache-2.0  194, 153 M*
                   48 kHz; scores of different checkpoints can't be compared
    --audio-model  these, or any teacher of parts/pretrained_teacher.py

Public: Clap, Embedder, open_judges.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as TAF
from torch import Tensor, nn

from parts.audio import RATE
from parts.errors import UserError
from parts.pretrained import fingerprint, load
from parts.pretrained_teacher import PretrainedTeacher, nothing_longer


class Clap(nn.Module):
    """A CLAP model: text and audio in one space. CLAP score = mean cosine of each clip with its caption;
    scores of different checkpoints can't be compared.

    flag: the setting that named the model, for messages. trust, pickles: see parts.pretrained.load. Raises
    UserError."""

    def __init__(self, name: str, flag: str = "clap", trust: bool = False, pickles: bool = False,
                 device: str = "cpu"):
        super().__init__()
        how = dict(flag=flag, trust=trust, pickles=pickles)
        self.name, self.flag = name, flag
        config = load("AutoConfig", name, **how)
        if config.model_type != "clap":
            raise UserError(
                f"--{flag} {name}: a {config.model_type} model; "
                "a CLAP model (text and audio towers) is needed"
            )
        # float32 on every device: a metric should not depend on it.
        self.model = load("ClapModel", name, **how).to(device).eval().requires_grad_(False)
        self.extractor = load("AutoFeatureExtractor", name, **how)
        self.tokenizer = load("AutoTokenizer", name, **how)
        self.rate_in = self.extractor.sampling_rate
        self.max_tokens = _most_tokens(self.tokenizer, self.model.config.text_config)
        self.key = f"clap-{fingerprint(self.model)}"
        self.eval()

    @torch.no_grad()
    def text(self, captions: list[str], batch: int = 64) -> np.ndarray:
        """Captions -> (n, E) of unit length; `batch` of them in one call. Says how many were too long."""
        device = next(self.model.parameters()).device
        cut = sum(len(self.tokenizer(caption)["input_ids"]) > self.max_tokens for caption in captions)
        if cut:
            print(f"warning: --{self.flag} {self.name}: {cut} of {len(captions)} captions have more than the "
                  f"{self.max_tokens} tokens that it reads; the rest of each counts for nothing in its score")
        rows = []
        for k in range(0, len(captions), batch):
            x = self.tokenizer(captions[k : k + batch], padding=True, truncation=True,
                               max_length=self.max_tokens, return_tensors="pt")
            out = self.model.get_text_features(
                input_ids=x["input_ids"].to(device), attention_mask=x["attention_mask"].to(device)
            )
            rows.append(_unit_length(out).cpu())
        return torch.cat(rows).numpy()

    @torch.no_grad()
    def audio(self, waves, batch: int = 16) -> np.ndarray:
        """Waveforms (n, N) at 16 kHz -> (n, E) of unit length; `batch` of them in one call. Of clips longer
        than the model's window the first part counts, always the same."""
        device = next(self.model.parameters()).device
        rows = []
        for k in range(0, len(waves), batch):
            clips = torch.as_tensor(np.ascontiguousarray(waves[k : k + batch])).float()
            clips = TAF.resample(clips, RATE, self.rate_in)[:, : self.extractor.nb_max_samples]
            clips = [clip.numpy() for clip in clips]
            x = self.extractor(clips, sampling_rate=self.rate_in, return_tensors="pt")
            mel = x["input_features"].to(device)
            is_longer = nothing_longer(len(mel), device)
            out = self.model.get_audio_features(input_features=mel, is_longer=is_longer)
            rows.append(_unit_length(out).cpu())
        return torch.cat(rows).numpy()


def _most_tokens(tokenizer, config) -> int:
    """Tokens of a caption that the text tower (of this config) reads. Not every tokenizer says it; then the
    table of positions does, whose first rows are not used: RoBERTa counts from the padding's id + 1."""
    return min(tokenizer.model_max_length, config.max_position_embeddings - (config.pad_token_id or 0) - 1)


def _unit_length(out) -> Tensor:
    """What get_text_features or get_audio_features gave -> (n, E) of unit length. It is a tensor in
    transformers 4, an output with pooler_output in 5."""
    embedding = out if isinstance(out, Tensor) else out.pooler_output
    return F.normalize(embedding.float(), dim=-1)


class Embedder:
    """Any audio model as the space of KID and Frechet distances: clip embeddings (n, E), a CLAP's projected
    ones, else the last layer's mean over time.

    flag: the setting that named the model, for messages. trust, pickles: see parts.pretrained.load. Raises
    UserError."""

    def __init__(self, name: str, flag: str = "audio-model", trust: bool = False, pickles: bool = False,
                 device: str = "cpu"):
        is_clap = load("AutoConfig", name, flag, trust, pickles).model_type == "clap"
        kind = Clap if is_clap else PretrainedTeacher
        # float32 on every device, as in Clap.
        self.net = kind(name, flag=flag, trust=trust, pickles=pickles).to(device)
        self.name = name
        self.key = self.net.key
        self.rate_in = self.net.rate_in

    def audio(self, waves, batch: int = 16) -> np.ndarray:
        """Waveforms (n, N) at 16 kHz -> (n, E); `batch` of them in one call."""
        if isinstance(self.net, Clap):
            return self.net.audio(waves, batch)
        rows = []
        for k in range(0, len(waves), batch):
            clips = torch.as_tensor(np.ascontiguousarray(waves[k : k + batch]))
            rows.append(self.net(clips).mean(1))                       # (n, T', F) -> (n, F)
        return torch.cat(rows).numpy()


def open_judges(clap: str, audio_model: str, trust: bool = False, pickles: bool = False,
                device: str = "cpu") -> dict:
    """{"clap": Clap, "embedder": Embedder} of the models that are named (hub id or folder; "" for none)."""
    judges = {}
    if clap:
        judges["clap"] = Clap(clap, trust=trust, pickles=pickles, device=device)
    if audio_model:
        judges["embedder"] = Embedder(audio_model, trust=trust, pickles=pickles, device=device)
    return judges
