"""The order of samples: a permutation per epoch, known from a counter alone, cut without loss over ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sixfold.data.order import indices_at, sample_indices
from sixfold.plan.batch import share

seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, epoch=st.integers(0, 1000), num_samples=st.integers(1, 3000))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, num_samples: int) -> None:
    indices = sample_indices(seed, epoch * num_samples, num_samples, num_samples)
    assert np.array_equal(np.sort(indices), np.arange(num_samples))


@given(seed=seeds, number=st.integers(0, 2**40), num_samples=st.integers(1, 2**40))
def test_one_number_needs_no_others(seed: int, number: int, num_samples: int) -> None:
    (index,) = sample_indices(seed, number, 1, num_samples)
    assert 0 <= index < num_samples
    around = sample_indices(seed, max(0, number - 3), 7, num_samples)
    assert around[number - max(0, number - 3)] == index


def test_numbers_of_several_epochs_in_any_sequence() -> None:
    numbers = np.array([25, 0, 9, 10, 3, 25])
    assert indices_at(4, numbers, 10).tolist() == [sample_indices(4, int(n), 1, 10)[0] for n in numbers]


def test_seed_and_epoch_change_the_order() -> None:
    n = 500
    orders = [tuple(sample_indices(seed, epoch * n, n, n)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    same = [np.mean(np.array(a) == np.array(b)) for a in orders for b in orders if a is not b]
    assert max(same) < 0.05


def test_the_order_is_well_mixed() -> None:
    """Where a sample lands, and what follows it, looks like chance."""
    n = 10_007
    order = sample_indices(7, 0, n, n)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert len(np.unique(np.diff(order))) > n / 2
    firsts = np.bincount([sample_indices(seed, 0, 1, 8)[0] for seed in range(4000)], minlength=8)
    assert firsts.min() > 400
    assert firsts.max() < 600


def test_small_epochs_reach_every_order() -> None:
    orders = {tuple(sample_indices(0, 3 * epoch, 3, 3).tolist()) for epoch in range(200)}
    assert len(orders) == 6


def test_the_order_is_written_down() -> None:
    """A run resumed by a later version goes on with the same samples."""
    assert sample_indices(0, 0, 10, 10).tolist() == GOLDEN


GOLDEN = [0, 6, 2, 3, 9, 4, 5, 8, 1, 7]


@given(global_batch=st.integers(0, 200), data_ranks=st.integers(1, 50))
def test_shares_make_up_the_batch(global_batch: int, data_ranks: int) -> None:
    parts = [share(global_batch, rank, data_ranks) for rank in range(data_ranks)]
    assert [number for part in parts for number in part] == list(range(global_batch))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
