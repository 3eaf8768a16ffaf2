"""Claims about attention and rotary positions."""
import torch

from parts.attention import attention, rope_table, rotate


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    table = rope_table(20, 8, "cpu")
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 20, 8), table)[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    assert torch.allclose(scores[3, 7], scores[10, 14], atol=1e-5)
    assert not torch.allclose(scores[3, 7], scores[3, 8], atol=1e-3)


def test_rotation_is_multiplication_by_a_complex_number():
    """Channels i and i + d / 2 are its real and imaginary part; the angle grows by 100^(-2i / d) a token."""
    x = torch.randn(2, 3, 7, 8)
    angle = torch.arange(7)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    point = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(7, 4), angle)
    expected = torch.cat([point.real, point.imag], -1)
    assert torch.allclose(rotate(x, rope_table(7, 8, "cpu")), expected, atol=1e-5)


def test_attention_on_a_cpu_is_float32_under_autocast_and_the_formula():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = (torch.arange(5) < 4).expand(2, 1, 1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, mask)
    by_hand = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert out.dtype == torch.float32 and torch.allclose(out, by_hand, atol=1e-5)
    rounded = attention(*(x.bfloat16().float() for x in (q, k, v)), mask)
    assert float((out - rounded).abs().max()) > 1e-4, "negative control: bfloat16 would be seen"
