"""Counter-based random numbers: the published generator, uniform, independent of the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condzoo.data.counter_random import _mix, derived_seed, random_below, random_words

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """SplitMix64 in Python integers, after the published C code."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_first_output_of_seed_0_is_the_published_one() -> None:
    assert int(_mix(torch.tensor([0]))) & MASK == 0xE220A8397B1DCDAF


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_mix_equals_splitmix64(values: list[int]) -> None:
    assert [int(w) & MASK for w in _mix(torch.tensor(values))] == [splitmix64(v & MASK) for v in values]


@given(st.integers(0, 2**62), st.integers(0, 10**6), st.permutations(range(12)))
def test_a_draw_depends_on_its_own_index_alone(seed: int, epoch: int, order: list[int]) -> None:
    together = random_words(seed, epoch, torch.arange(12))
    assert torch.equal(random_words(seed, epoch, torch.tensor(order)), together[order])
    assert torch.equal(random_words(seed, epoch, torch.tensor([order[0]])), together[order[0]].view(1))


@pytest.mark.parametrize("field", [0, 1, 2])
@pytest.mark.parametrize("limit", [2, 9])
def test_draws_are_uniform(field: int, limit: int) -> None:
    n = 90_000
    draws = random_below(random_words(3, 5, torch.arange(n)), limit, field)
    expected = n / limit
    chi_squared = float(((draws.bincount(minlength=limit) - expected) ** 2 / expected).sum())
    assert draws.min() == 0
    assert draws.max() == limit - 1
    assert chi_squared < limit - 1 + 5 * (2 * (limit - 1)) ** 0.5


def test_fields_epochs_and_seeds_are_uncorrelated() -> None:
    index = torch.arange(50_000)
    words = random_words(1, 1, index)
    base = random_below(words, 9, 0).double()
    others = (
        random_below(words, 9, 1),
        random_below(words, 9, 2),
        random_below(random_words(1, 2, index), 9, 0),
        random_below(random_words(2, 1, index), 9, 0),
        random_below(random_words(1, 1, index + 1), 9, 0),
    )
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other.double()]))[0, 1]
        assert abs(correlation) < 5 / 50_000**0.5


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(ValueError, match="a word has the fields 0, 1 and 2, got 3"):
        random_below(torch.zeros(1, dtype=torch.int64), 2, 3)


@settings(max_examples=50)
@given(st.integers(0, 2**62), st.integers(0, 2**40))
def test_derived_seeds_fit_a_generator_and_differ(seed: int, counter: int) -> None:
    derived = {derived_seed(seed, counter), derived_seed(seed, counter + 1), derived_seed(seed + 1, counter)}
    assert len(derived) == 3
    for each in derived:
        torch.Generator().manual_seed(each)


def test_a_derived_seed_is_made_on_the_cpu_whatever_the_default_device() -> None:
    seed = derived_seed(3, 14)
    with torch.device("meta"):
        assert derived_seed(3, 14) == seed
