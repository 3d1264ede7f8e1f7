"""Samples and held-out windows cut from one run of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import DataError
from sixfold.data.order import sample_indices
from sixfold.data.stream import (
    TURNS,
    Blend,
    TokenStream,
    document_numbers,
    document_positions,
    turns_of,
    windows,
)
from sixfold.plan.batch import share


def stream(num_tokens: int = 101, length: int = 4, seed: int = 3) -> TokenStream:
    return TokenStream(np.arange(num_tokens, dtype=np.uint16), length, seed)


def test_sample_i_is_its_place_in_the_tokens() -> None:
    samples = stream()
    batch = samples.batch(0, range(samples.num_samples))
    assert samples.num_samples == 25
    assert batch.dtype == np.int64
    assert type(batch) is np.ndarray
    for sample, row in zip(sample_indices(3, 0, len(batch), 25), batch, strict=True):
        start = sample * 4
        assert row.tolist() == list(range(start, start + 5))
    assert sorted(batch[:, 0].tolist()) == list(range(0, 100, 4))


@pytest.mark.parametrize(("num_tokens", "num_samples"), [(5, 1), (8, 1), (9, 2), (100, 24)])
def test_num_samples_counts_whole_samples(num_tokens: int, num_samples: int) -> None:
    samples = stream(num_tokens)
    assert samples.num_samples == num_samples
    assert samples.batch(0, range(num_samples)).max() < num_tokens


@given(ranks=st.integers(1, 40), first=st.integers(0, 100), global_batch=st.integers(1, 30))
def test_ranks_together_see_the_global_batch(ranks: int, first: int, global_batch: int) -> None:
    samples = stream()
    whole = samples.batch(first, range(global_batch))
    parts = [samples.batch(first, share(global_batch, rank, ranks)) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_going_on_from_a_counter_equals_going_straight() -> None:
    straight = stream().batch(0, range(60))
    resumed = [stream().batch(first, range(6)) for first in range(0, 60, 6)]
    assert np.array_equal(np.concatenate(resumed), straight)
    assert np.array_equal(stream().batch(10, [7, 0, 30]), straight[[17, 10, 40]])


def test_an_empty_share_keeps_its_width() -> None:
    assert stream().batch(5, range(0)).shape == (0, 5)


def test_too_few_tokens_are_refused_with_a_length_that_works() -> None:
    with pytest.raises(DataError) as caught:
        stream(num_tokens=4)
    assert "sequence_length = 3" in caught.value.fix
    assert stream(num_tokens=4, length=3).num_samples == 1


@given(num_tokens=st.integers(0, 60), length=st.integers(1, 20))
def test_windows_predict_every_token_once(num_tokens: int, length: int) -> None:
    cut = list(windows(np.arange(num_tokens, dtype=np.uint16), length))
    targets = [token for window in cut for token in window[1:].tolist()]
    assert targets == list(range(1, num_tokens))
    assert all(np.array_equal(window[:-1] + 1, window[1:]) for window in cut)
    assert all(len(window) == length + 1 for window in cut[:-1])
    assert all(window.dtype == np.int64 and len(window) >= 2 for window in cut)


def blend(weights: list[float] | None = None) -> Blend:
    streams = [
        TokenStream(np.arange(n, dtype=np.uint16) + 1000 * k, 4, 3) for k, n in enumerate((101, 41, 21))
    ]
    return Blend(streams, weights)


def test_one_source_is_a_blend_too() -> None:
    assert np.array_equal(Blend([stream()]).batch(7, range(60)), stream().batch(7, range(60)))


@pytest.mark.parametrize(("weights", "turns"), [([1, 1], (1, 1)), ([3, 1], (3, 1)), ([1, 10**6], (1, TURNS))])
def test_turns_follow_weights(weights: list[float], turns: tuple[int, ...]) -> None:
    assert turns_of(weights) == turns


def test_every_source_is_drawn_from_by_its_weight_and_in_its_own_order() -> None:
    samples = blend([6, 3, 1])
    sources, numbers = samples.origins(np.arange(500))
    assert np.bincount(sources).tolist() == [300, 150, 50]
    for index, stream_ in enumerate(samples.streams):
        own = numbers[sources == index]
        assert sorted(own) == list(range(len(own)))
        drawn = samples.batch(0, range(500))[sources == index]
        assert np.array_equal(drawn, stream_.samples(own))
    assert np.array_equal(samples.batch(13, range(40)), samples.batch(0, range(13, 53)))
    assert samples.batch(3, range(0)).shape == (0, 5)


def test_without_weights_sources_end_an_epoch_together() -> None:
    samples = blend()
    assert samples.turns == (5, 2, 1)  # 25, 10 and 5 samples, to a thousandth
    whole = samples.batch(0, range(40))
    assert len({tuple(row) for row in whole.tolist()}) == 40


def test_a_weight_too_many_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.weights has 2 numbers for 3 sources"):
        blend([1, 2])


def test_documents_are_numbered_within_a_sample() -> None:
    numbers = document_numbers(np.array([[5, 9, 5, 9, 9, 4], [9, 1, 2, 3, 4, 5]]), 9)
    assert numbers.tolist() == [[0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1]]
    places = document_positions(np.array([[5, 9, 5, 9, 9, 4], [9, 1, 2, 3, 4, 5]]), 9)
    assert places.tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
