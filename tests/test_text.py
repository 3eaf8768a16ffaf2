"""Claims about captions: the vocabulary, the text encoder, the adapter of a frozen one."""
import re
import unicodedata

import pytest
import torch
from conftest import ROOT

from parts.checkpoints import load_checkpoint
from parts.errors import printable
from parts.soundworld import SoundWorld
from parts.text import MAX_WORDS, TextAdapter, TextEncoder, TextLayer, Words

# --- words

def ascii_words(caption: str) -> list[str]:
    """Oracle for English without digits: runs of the letters a to z."""
    return re.findall("[a-z]+", caption.lower())


def oracle_ids(vocabulary: list[str], captions: list[str]) -> torch.Tensor:
    rows = [[vocabulary.index(word) + 2 for word in ascii_words(text) if word in vocabulary]
            for text in captions]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def test_soundworld_has_the_vocabulary_and_ids_of_lower_case_ascii_words():
    captions = [SoundWorld("train", 300).caption(i, i % 4) for i in range(300)]
    vocabulary = sorted({word for caption in captions for word in ascii_words(caption)})
    words = Words.fit(captions)
    assert words.words == vocabulary and len(vocabulary) > 100
    assert torch.equal(words.encode(captions), oracle_ids(vocabulary, captions))
    cached = words.cache([captions[:2]])[0]
    assert all(torch.equal(ids, words.encode([text])[0]) for ids, text in zip(cached, captions))


def test_the_shipped_model_gives_soundworld_the_ids_of_its_vocabulary():
    vocabulary = load_checkpoint(ROOT / "assets/demo")[1]["words"]
    captions = [SoundWorld("test", 300).caption(i) for i in range(300)]
    assert torch.equal(Words(vocabulary).encode(captions), oracle_ids(vocabulary, captions))


@pytest.mark.parametrize("caption, expected", [
    ("Un café À Zürich", ["un", "café", "à", "zürich"]),
    ("ΣΚΥΛΟΣ лает ЁЖ", ["σκυλος", "лает", "ёж"]),
    ("कुत्ता भौंक रहा है", ["कुत्ता", "भौंक", "रहा", "है"]),
    ("இசை நாய்", ["இசை", "நாய்"]),
    ("كَلْبٌ ينبح", ["كَلْبٌ", "ينبح"]),
    ("한국어 개", ["한국어", "개"]),
    ("狗叫，然后下雨。", list("狗叫然后下雨")),
    ("CD播放2次", ["cd", "播", "放", "two", "次"]),
    ("犬がワンワン", list("犬がワンワン")),
    ("หมาเห่า", ["ห", "ม", "า", "เ", "ห่", "า"]),
    ("ខ្លា ស", ["ខ្", "លា", "ស"]),
    ("a dog’s bark, 'loud' rock'n'roll", ["a", "dog's", "bark", "loud", "rock'n'roll"]),
    ("a_b-c d/e 3 42", ["a", "b", "c", "d", "e", "three", "42"]),
    ("🐕\ufe0f 1\ufe0f\u20e3 👩\u200d🚒 ' \u0301", ["one"]),
    ("می\u200cخواهم", ["میخواهم"]),
])
def test_words_are_letters_with_marks_and_characters_where_a_script_has_no_spaces(caption, expected):
    assert Words.split(caption) == expected
    assert Words.split(printable(caption)) == expected, "as captions of recordings are read"
    for form in ("NFC", "NFD"):
        assert Words.split(unicodedata.normalize(form, caption)) == expected


def test_words_that_differ_in_a_vowel_sign_or_an_accent_have_ids_of_their_own():
    words = Words.fit(["दिन", "दीन", "दून", "pêche", "péché"])
    assert len(words.words) == 5
    assert torch.equal(words.encode(["pe\u0302che"]), words.encode(["pêche"]))


def test_an_unknown_sentence_without_spaces_keeps_the_characters_that_are_known():
    words = Words.fit(["狗叫", "下雨"])
    assert torch.equal(words.encode(["雨下狗"]), words.encode(["雨 下 狗"]))


def test_training_says_how_many_captions_are_cut_or_without_a_known_word(capsys):
    words = Words.fit(["a dog", "rain"])
    cached = words.cache([["a dog", "dog " * (MAX_WORDS + 1)], ["🐕", "rain " * MAX_WORDS]])
    assert capsys.readouterr().out.splitlines() == [
        "warning: 1 of 4 captions have more than 40 words; the rest of each is left out",
        "warning: 1 of 4 captions have no known word and count as empty"]
    assert len(cached[0][1]) == MAX_WORDS and cached[1][0].tolist() == [1]
    assert words.beyond("rain " * MAX_WORDS + "zzzz a dog") == "a dog" and words.beyond("a dog") == ""
    words.cache([["a dog"]])
    assert capsys.readouterr().out == ""


def test_unknown_words_are_left_out():
    words = Words.fit(["a low bell", "heavy rain, then two dogs"])
    assert torch.equal(words.encode(["a zzzz low bell"]), words.encode(["A LOW bell!"]))
    assert words.encode(["zzzz"]).tolist() == [[1]] and words.encode([""]).tolist() == [[1]]


def test_digits_are_read_as_words():
    words = Words.fit(["two bells"])
    assert torch.equal(words.encode(["2 bells"]), words.encode(["two bells"]))


def test_batches_of_captions_are_padded_with_zero():
    ids = Words.fit(["a b c"]).encode(["a", "a b c"])
    assert ids.shape == (2, 3) and ids[0].tolist()[1:] == [0, 0] and (ids[1] > 1).all()


# --- text encoder

@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TextEncoder(vocab=20, width=32).eval()


def test_text_layer_is_torchs_transformer_layer():
    ours = TextLayer(64, 2)
    ref = torch.nn.TransformerEncoderLayer(
        64, 2, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = [(ref.norm1, ours.norm1), (ref.norm2, ours.norm2), (ref.self_attn.out_proj, ours.out),
             (ref.linear1, ours.mlp[0]), (ref.linear2, ours.mlp[2])]
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.load_state_dict(mine.state_dict())
        ref.self_attn.in_proj_weight.copy_(ours.qkv.weight)
        ref.self_attn.in_proj_bias.copy_(ours.qkv.bias)
    h = torch.randn(3, 7, 64)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    expected = ref(h, src_key_padding_mask=~mask)[mask]
    assert torch.allclose(ours(h, mask)[mask], expected, atol=1e-5)
    unmasked = ours(h, torch.ones_like(mask))[mask]
    assert not torch.allclose(unmasked, expected, atol=1e-3), "negative control: the mask matters"


@pytest.mark.parametrize("width", [96, 200, 208])
def test_any_width_that_the_transformer_may_have_has_words(width):
    """Heads of about 64 channels must divide it: 200 and 208 are no multiples of three."""
    assert TextEncoder(5, width)(torch.tensor([[1, 2]])).pooled.shape == (1, width)


def test_word_order_matters(encoder):
    a = encoder(torch.tensor([[2, 3, 4]]))
    b = encoder(torch.tensor([[4, 3, 2]]))
    assert (a.pooled - b.pooled).abs().max() > 1e-3


def test_a_longer_neighbour_in_the_batch_changes_no_caption(encoder):
    alone = encoder(torch.tensor([[2, 3]]))
    padded = encoder(torch.tensor([[2, 3, 0, 0], [4, 5, 6, 7]])).rows(torch.tensor([0]))
    assert torch.allclose(alone.pooled, padded.pooled, atol=1e-5)
    assert torch.allclose(alone.tokens[0], padded.tokens[0, :2], atol=1e-5)
    assert padded.mask.tolist() == [[True, True, False, False]]


def test_a_dropped_caption_is_the_empty_caption(encoder):
    ids = torch.tensor([[2, 3], [4, 5]])
    half = encoder(ids, torch.tensor([True, False]))
    assert torch.allclose(half.pooled, encoder(torch.tensor([[1, 0], [4, 5]])).pooled)
    assert (half.pooled[0] - encoder(ids).pooled[0]).abs().max() > 1e-3, "negative control"


# --- adapter of a frozen text encoder

def test_the_adapter_ignores_padding_and_gives_one_vector_to_empty_and_dropped_captions():
    torch.manual_seed(0)
    adapter = TextAdapter(features=16, width=32)
    embeddings = torch.randn(3, 5, 16)
    embeddings[1, 3:] = 0  # two tokens
    embeddings[2] = 0      # none
    text = adapter(embeddings, torch.tensor([True, False, False]))
    assert text.tokens.shape == (3, 4, 32) and text.pooled.shape == (3, 32)
    assert text.mask.tolist() == [[True, False, False, False], [True, True, False, False],
                                  [True, False, False, False]]
    assert torch.equal(text.pooled[0], text.pooled[2]) and torch.equal(text.tokens[0], text.tokens[2])
    assert not torch.allclose(text.pooled[0], adapter(embeddings).pooled[0], atol=1e-3), "negative control"
