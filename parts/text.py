"""Captions: a vocabulary, the text encoder that is trained with the model, and the adapter of a frozen one.

Idea.  Words, not sub-words: 125 of them describe SoundWorld, and a student can read the vocabulary. A small
transformer turns them into one vector a word and one a caption; the diffusion transformer attends to the
former and adds the latter to its time embedding.

    captions --Words--> ids (B, S) --TextEncoder--> Text: tokens (B, S, W), mask (B, S), pooled (B, W)
    captions --parts/pretrained_text.py--> embeddings (B, 1 + S, E) --TextAdapter--> Text

Either way a caption that is dropped, for classifier-free guidance, becomes the empty caption.

B batch, S words, W width of the diffusion transformer, E width of a frozen text encoder.

Public: MAX_WORDS, Words, Text, TextLayer, TextEncoder, TextAdapter.
"""
from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from parts.attention import attention

MAX_WORDS = 40  # of a caption; the rest is left out, and said to be

# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, Japanese kana, Chinese characters.
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
            "\u4e00-\u9fff\uff66-\uff9f\U00020000-\U0003ffff")
# A typographic apostrophe is an apostrophe; joiners and variation selectors choose glyphs, not letters.
SAME_WORD = {0x2019: "'", 0x200C: None, 0x200D: None, **dict.fromkeys(range(0xFE00, 0xFE10))}


class Words:
    """Vocabulary: id 0 pads, id 1 is the empty caption (unconditional), known words follow. Unknown words are
    left out."""

    NUMERALS = {"1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven",
                "8": "eight", "9": "nine"}

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.ids = {word: i + 2 for i, word in enumerate(self.words)}

    @staticmethod
    def split(caption: str) -> list[str]:
        """Words of any language in lower case, composed (Unicode NFC); an apostrophe may stand inside a
        word, digits from 1 to 9 are words. In scripts without spaces each character is one, with its
        marks."""
        text = unicodedata.normalize("NFC", caption.lower().translate(SAME_WORD))

        # Letters, numbers and the marks on them (vowel signs, accents) stay; all else parts words.
        parted = []
        for c in text:
            in_word = c.isalnum() or c == "'" or unicodedata.category(c) in ("Mn", "Mc")
            parted.append(c if in_word else " ")

        # What is left beside letters, numbers (\w), spaces and apostrophes are marks.
        spaced = re.sub(rf"[{UNSPACED}][^\w\s']*", r" \g<0> ", "".join(parted))
        found = [word.strip("'") for word in spaced.split()]
        return [Words.NUMERALS.get(word, word) for word in found if any(c.isalnum() for c in word)]

    @classmethod
    def fit(cls, captions) -> Words:
        """All words of an iterable of captions."""
        return cls(sorted({word for caption in captions for word in cls.split(caption)}))

    def __len__(self) -> int:
        return len(self.words) + 2

    def known(self, caption: str) -> list[str]:
        """The known words of a caption, in its order, however many."""
        return [word for word in self.split(caption) if word in self.ids]

    def beyond(self, caption: str) -> str:
        """The known words of a caption that are too many to be encoded; mostly none."""
        return " ".join(self.known(caption)[MAX_WORDS:])

    def cache(self, captions: list[list[str]]) -> list[list[Tensor]]:
        """Wordings of each clip -> their ids; pretrained text encoders store embeddings on disk behind the
        same call. Says how many are cut, or have no known word."""
        known = [[self.known(wording) for wording in wordings] for wordings in captions]
        lengths = [len(words) for of_clip in known for words in of_clip]
        cut = sum(n > MAX_WORDS for n in lengths)
        if cut:
            print(f"warning: {cut} of {len(lengths)} captions have more than {MAX_WORDS} words; the rest "
                  "of each is left out")
        empty = sum(n == 0 for n in lengths)
        if empty:
            print(f"warning: {empty} of {len(lengths)} captions have no known word and count as empty")
        return [[self._row(words) for words in of_clip] for of_clip in known]

    def _row(self, known: list[str]) -> Tensor:
        """Known words -> ids (S,), those of the empty caption where there are none."""
        return torch.tensor([self.ids[word] for word in known[:MAX_WORDS]] or [1])

    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> ids (B, S) int64, padded with 0; a caption without a known word becomes the empty
        caption. Of longer ones the first MAX_WORDS known words count."""
        return pad_sequence([self._row(self.known(caption)) for caption in captions], batch_first=True)


class Text(NamedTuple):
    """Encoded captions: tokens (B, S, W), mask (B, S) True at words, pooled (B, W)."""
    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def rows(self, index: Tensor) -> Text:
        """Some of the captions."""
        return Text(*(x[index] for x in self))

    def followed_by(self, other: Text) -> Text:
        """These captions and others in one batch, the shorter ones padded."""
        tokens = pad_sequence([*self.tokens, *other.tokens], batch_first=True)
        mask = pad_sequence([*self.mask, *other.mask], batch_first=True)
        return Text(tokens, mask, torch.cat([self.pooled, other.pooled]))


class TextLayer(nn.Module):
    """A pre-norm transformer layer: h (B, S, W), mask (B, S) -> (B, S, W). (nn.TransformerEncoderLayer is the
    same, and half as fast in bfloat16 on a CPU.)"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(h))                              # (B, S, 3 W)
        q, k, v = rearrange(qkv, "b s (n h d) -> n b h s d", n=3, h=self.heads)
        attended = attention(q, k, v, mask[:, None, None])         # (B, H, S, d)
        h = h + self.out(rearrange(attended, "b h s d -> b s (h d)"))
        return h + self.mlp(self.norm2(h))


class TextEncoder(nn.Module):
    """Word embeddings and a small transformer, trained jointly with the diffusion transformer: ids (B, S) ->
    Text."""

    def __init__(self, vocab: int, width: int, layers: int = 2, max_words: int = MAX_WORDS):
        super().__init__()
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.pos = nn.Parameter(0.02 * torch.randn(max_words, width))
        heads = max(n for n in range(1, max(1, width // 64) + 1) if width % n == 0)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width)

    def forward(self, ids: Tensor, drop: Tensor | None = None) -> Text:
        """Rows where drop (B,) is True become the empty caption."""
        if drop is not None:
            empty = torch.zeros_like(ids)
            empty[:, 0] = 1
            ids = torch.where(drop[:, None], empty, ids)
        mask = ids > 0
        h = self.embed(ids) + self.pos[: ids.shape[1]]             # (B, S, W)
        for layer in self.layers:
            h = layer(h, mask)
        h = self.norm(h)
        mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)    # (B, W): over real words
        return Text(h, mask, self.pool(mean))


class TextAdapter(nn.Module):
    """Embeddings of a frozen text encoder (parts/pretrained_text.py) -> Text.

    Embeddings (B, 1 + S, E): row 0 is pooled, all-zero rows are padding. A caption without a token, or
    dropped, becomes a learned vector."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(features)  # T5's features have outliers
        self.project = nn.Linear(features, width)
        self.pool = nn.Linear(features, width)
        self.null = nn.Parameter(0.02 * torch.randn(features))

    def forward(self, embeddings: Tensor, drop: Tensor | None = None) -> Text:
        """Rows where drop (B,) is True become the empty caption."""
        mask = embeddings[:, 1:].abs().sum(-1) > 0                 # (B, S)
        empty = ~mask.any(1)                                       # (B,)
        if drop is not None:
            empty = drop | empty

        # An empty caption is the learned vector in every row, of which the first alone is attended to.
        embeddings = torch.where(empty[:, None, None], self.null, embeddings)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(empty[:, None], first, mask)

        h = self.norm(embeddings)                                  # (B, 1 + S, E)
        return Text(self.project(h[:, 1:]), mask, self.pool(h[:, 0]))
