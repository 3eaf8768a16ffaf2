"""Claims about sequences that are longer than what a function was made for."""
import pytest
import torch

from parts.windows import ROWS_AT_ONCE, cut, over_windows


@pytest.mark.parametrize("window", [16, 17, 49])
def test_a_function_of_single_tokens_is_the_same_with_and_without_windows(window):
    x, offset = torch.randn(2, 50, 3), torch.randn(2, 1, 1)
    whole = 2 * x + offset
    parts = over_windows(lambda y, starts, rows: 2 * y + offset[rows], x, window)
    assert torch.allclose(parts, whole, atol=1e-5)


def test_what_depends_on_the_place_is_cut_at_the_same_places():
    x, cond = torch.randn(2, 40, 3), torch.randn(2, 40, 3)
    parts = over_windows(lambda y, starts, rows: y + cut(cond, starts, 16), x, 16)
    assert torch.allclose(parts, x + cond, atol=1e-5)
    wrong = over_windows(lambda y, starts, rows: y + cut(cond, [0] * len(starts), 16), x, 16)
    assert not torch.allclose(wrong, x + cond, atol=0.1), "negative control"


def test_windows_are_averaged_with_triangular_weights():
    """Against the slow definition: each window gives its own number; a token gets the weighted mean of those
    over it."""
    window, length = 4, 10

    def numbered(y, starts, rows):
        return torch.cat([torch.full((1, window, 1), float(start)) for start in starts])

    made = over_windows(numbered, torch.zeros(1, length, 1), window)
    starts, weight = [0, 2, 4, 6], [0.4, 0.8, 0.8, 0.4]
    for token in range(length):
        over = [(s, weight[token - s]) for s in starts if 0 <= token - s < window]
        expected = sum(s * w for s, w in over) / sum(w for _, w in over)
        assert abs(float(made[0, token, 0]) - expected) < 1e-5


def test_memory_does_not_grow_with_the_length():
    sizes = []

    def watched(y, starts, rows):
        sizes.append(len(y))
        return y

    over_windows(watched, torch.randn(3, 4_000, 2), 16)
    assert max(sizes) <= ROWS_AT_ONCE and sum(sizes) > 1_000
