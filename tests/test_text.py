"""Claims about captions: the vocabulary, the text encoder, the adapter of a frozen one."""
import pytest
import torch

from parts.text import TextAdapter, TextEncoder, TextLayer, Words

# --- words

def test_unknown_words_are_reported_with_their_neighbours_and_left_out():
    words = Words.fit(["a low bell", "heavy rain, then two dogs"])
    assert words.unknown("a low bel zzzz") == {"bel": ["bell"], "zzzz": []}
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
