"""Another text encoder: a pretrained one, frozen, in the place of the embedded vocabulary (parts/text.py).

Idea.  The encoder never changes, so every caption of a data set is encoded once and its embedding read from
disk from then on. parts.text.TextAdapter, trained with the DiT, projects the embeddings on the model's width.

    caption -> (1 + S, E): row 0 the pooled embedding, then one row a token

Encoders that fit (--text, a folder or hub id; * from memory or a third party: read the model's card):

    google-t5/t5-base, google/flan-t5-base  Apache-2.0  110 M*  768  the usual choice of audio models
    any BERT-like encoder                   see card            768
    laion/clap-htsat-unfused (text tower)   Apache-2.0          768

Public: PretrainedText, CachedText.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from parts.cache import cache_dir, digest, fill_array
from parts.pretrained import fingerprint, freeze, load

T5_ENCODERS = {  # model_type of a configuration -> the class that is its encoder alone
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}


class PretrainedText(nn.Module):
    """A frozen text encoder with the interface of text.Words: encode(captions) -> (B, 1 + S, E), row 0 the
    pooled embedding, then one row a token, all-zero rows behind the end; the empty caption is all zeros
    (text.TextAdapter has a learned vector for it).

    t5 family: pooled = mean over tokens. BERT-like and CLAP text towers: their own pooled output, or the mean
    where they have none, or where it was not saved (models that were pretrained to fill in words).

    flag: the setting that named the model, for messages. trust, pickles: see parts.pretrained.load. Raises
    UserError."""
    words: list[str] = []  # no vocabulary to list: any word may be asked for

    def __init__(self, name: str, flag: str = "text", trust: bool = False, pickles: bool = False,
                 device: str = "cpu", max_tokens: int = 64):
        super().__init__()
        how = dict(flag=flag, trust=trust, pickles=pickles)
        self.name = name
        config = load("AutoConfig", name, **how)
        self.model = freeze(_load_encoder(config, name, how), device)
        self.tokenizer = load("AutoTokenizer", name, **how)
        self.max_tokens = min(max_tokens, self.tokenizer.model_max_length)
        self.features = self.encode(["a"]).shape[2]  # E
        self.key = f"{config.model_type}-{self.max_tokens}-{fingerprint(self.model)}"
        self.eval()

    def lengths(self, captions: list[str]) -> list[int]:
        """Rows of each caption: 1 + its tokens; 0 for the empty one. Says how many were too long."""
        ids = [self.tokenizer(caption)["input_ids"] if caption.strip() else [] for caption in captions]
        cut = sum(len(row) > self.max_tokens for row in ids)
        if cut:
            print(f"warning: {cut} of {len(captions)} captions have more than {self.max_tokens} tokens; "
                  "the rest of each is left out")
        return [1 + min(len(row), self.max_tokens) if row else 0 for row in ids]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> (B, 1 + S, E) float32 on the CPU, S tokens in the longest one."""
        some = [k for k, caption in enumerate(captions) if caption.strip()]
        if not some:
            return torch.zeros(len(captions), 2, self.features)

        # Encode those that are not empty.
        x = self.tokenizer(
            [captions[k] for k in some], padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        out = self.model(input_ids=x["input_ids"].to(device), attention_mask=x["attention_mask"].to(device))
        hidden = out.last_hidden_state.float().cpu()                   # (B', S, E)
        mask = x["attention_mask"].bool()[..., None]                   # (B', S, 1)

        # The model's own summary of a caption, or the mean over its tokens.
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = (hidden * mask).sum(1) / mask.sum(1)              # (B', E)
        else:
            pooled = pooled.float().cpu()

        # All-zero rows mean padding, and are all that an empty caption has.
        rows = torch.zeros(len(captions), 1 + hidden.shape[1], hidden.shape[2])
        rows[some] = torch.cat([pooled[:, None], hidden * mask], 1)    # (B', 1 + S, E)
        return rows

    def cache(self, captions: list[list[str]]) -> CachedText:
        """Wordings of each clip -> their embeddings."""
        return CachedText(self, captions)

    def beyond(self, caption: str) -> str:
        """The end of a caption that is too long to be encoded; mostly none."""
        ids = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
        room = self.max_tokens - self.tokenizer.num_special_tokens_to_add()
        return self.tokenizer.decode(ids[room:]).strip()


def _load_encoder(config, name: str, how: dict) -> nn.Module:
    """The half of the model that encodes text."""
    if config.model_type in T5_ENCODERS:
        return load(T5_ENCODERS[config.model_type], name, **how)
    model = load("AutoModel", name, **how)
    encoder = model
    if config.model_type == "clap":
        encoder = model.text_model
    elif getattr(config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
    if any("pooler." in weight for weight in model.missing_weights):
        encoder.pooler = None                                  # it was not saved: its weights are random
    return encoder


class CachedText:
    """Encoded captions of a data set, in one float16 memory map: text[i][k] -> (1 + S, E) of wording k of
    clip i. Equal captions are encoded once."""

    def __init__(self, encoder: PretrainedText, captions: list[list[str]]):
        unique = sorted({caption for wordings in captions for caption in wordings})
        self.captions = captions
        self.index = {caption: k for k, caption in enumerate(unique)}
        # Unique caption k has rows offsets[k] to offsets[k + 1]; an empty one has two (see _encode_chunk).
        rows = [max(2, n) for n in encoder.lengths(unique)]
        self.offsets = np.concatenate([[0], np.cumsum(rows)])
        folder = cache_dir() / f"text-{digest(encoder.key, *unique)}"
        self.z = fill_array(
            folder, "z", (self.offsets[-1], encoder.features), np.float16, self._encode_chunk, len(unique),
            (encoder, unique), where=self.offsets, workers=0, desc="encoding captions",
        )

    @staticmethod
    def _encode_chunk(indices, encoder: PretrainedText, unique: list[str]) -> np.ndarray:
        """The rows of these unique captions one after another, without padding, float16."""
        rows = encoder.encode([unique[i] for i in indices])
        used = rows.abs().sum(-1) > 0
        used[:, :2] = True  # an empty caption has two empty rows
        return rows[used].clamp(-6e4, 6e4).numpy().astype(np.float16)  # float16 ends at 65504

    def __getitem__(self, i: int) -> list[Tensor]:
        return [self._embedding(self.index[caption]) for caption in self.captions[i]]

    def _embedding(self, k: int) -> Tensor:
        """(1 + S, E) float32 of unique caption k."""
        rows = self.z[self.offsets[k] : self.offsets[k + 1]]
        return torch.from_numpy(np.asarray(rows, np.float32))
