"""Claims about pretrained text encoders: padding is ignored, the empty caption known, the DiT reached."""
import pytest
import torch
from tiny_models import tiny_model

import model
from parts.pretrained_text import PretrainedText


@pytest.mark.parametrize("kind", ["t5", "bert", "bert-words", "clap"])
def test_a_text_encoder_of_each_family_ignores_padding_and_knows_the_empty_caption(tmp_path, kind, capsys):
    text = PretrainedText(str(tiny_model(kind, tmp_path)), max_tokens=8)
    alone = text.encode(["a dog"])
    both = text.encode(["a dog", "low bell then rain and wind"])
    assert both.shape[2] == text.features == 16
    assert torch.allclose(both[0, : alone.shape[1]], alone[0], atol=1e-5)
    assert both[0, alone.shape[1] :].abs().max() == 0
    assert not torch.allclose(both[0, 0], both[1, 0], atol=1e-5)
    assert not any(p.requires_grad for p in text.parameters())
    assert text.encode([""]).abs().max() == 0 and text.encode(["", "a dog"])[0].abs().max() == 0
    if kind in ("t5", "bert-words"):       # the latter was saved without a pooler
        assert torch.allclose(alone[0, 0], alone[0, 1:].mean(0), atol=1e-5), "pooled is the mean over tokens"

    cached = text.cache([["a dog", "rain"], ["", "dog " * 20], ["rain", "a dog"]])
    assert "warning: 1 of 4 captions have more than 8 tokens" in capsys.readouterr().out
    assert torch.allclose(cached[0][0], alone[0], atol=2e-3) and torch.equal(cached[0][1], cached[2][0])
    assert cached[1][0].abs().max() == 0 and len(cached[1][1]) == 9


def test_frozen_text_reaches_the_velocity_and_dropping_it_equals_the_empty_caption():
    """Through text.TextAdapter: two captions give two velocities; padding rows change nothing; a dropped
    caption is the empty one. Negative control: with the mask ignored, padding would count."""
    torch.manual_seed(0)
    net = model.DiT(4, 32, 2, 2, text_features=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 6, 4)
    t = torch.tensor([0.3, 0.8])
    captions = torch.randn(2, 5, 16)
    v = net(x, t, net.encode_text(captions))

    padded = torch.cat([captions, torch.zeros(2, 3, 16)], 1)
    assert torch.allclose(net(x, t, net.encode_text(padded)), v, atol=1e-5)
    assert not torch.allclose(net(x, t, net.encode_text(captions.flip(0))), v, atol=1e-3)
    text = net.encode_text(padded)
    unmasked = text._replace(mask=torch.ones_like(text.mask))
    assert not torch.allclose(net(x, t, unmasked), v, atol=1e-4)

    dropped = net(x, t, net.encode_text(captions, torch.tensor([True, False])))
    empty = net(x, t, net.encode_text(torch.zeros_like(captions)))
    assert torch.allclose(dropped[0], empty[0], atol=1e-5) and torch.allclose(dropped[1], v[1], atol=1e-5)
