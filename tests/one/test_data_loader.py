"""The loader: the same batches for any number of ranks and workers, from any counter."""

import random
from collections import Counter, UserDict, namedtuple
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from sixfold.base.errors import DataError
from sixfold.data.loader import Loader
from sixfold.data.order import sample_indices


class Noisy(Dataset[Any]):
    """Samples that say who they are and draw from every random stream a dataset may use."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"index": index, "drawn": torch.tensor(drawn, dtype=torch.float64)}


def loader(num_samples: int = 23, **settings: Any) -> Loader:
    return Loader(Noisy(num_samples), **{"global_batch": 5, "seed": 9, **settings})


def rows(batches: Any) -> list[tuple[Any, ...]]:
    return [
        (int(index), *drawn.tolist())
        for batch in batches
        for index, drawn in zip(batch["index"], batch["drawn"], strict=True)
    ]


def epochs(made: Loader, count: int) -> list[dict[str, Any]]:
    return list(chain.from_iterable(list(made) for _ in range(count)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_sample_once(shuffle: bool) -> None:
    made = loader(shuffle=shuffle)
    for epoch in range(2):
        assert len(made) == 5
        batches = list(made)
        assert [len(batch["index"]) for batch in batches] == [5, 5, 5, 5, 3]
        seen = [row[0] for row in rows(batches)]
        order = sample_indices(9, 23 * epoch, 23, 23).tolist() if shuffle else list(range(23))
        assert seen == order
        assert made.state == 23 * (epoch + 1)


@pytest.mark.parametrize("data_ranks", [1, 2, 3, 7])
def test_ranks_together_give_the_global_batches(data_ranks: int) -> None:
    whole = epochs(loader(), 2)
    parts = [epochs(loader(data_rank=rank, data_ranks=data_ranks), 2) for rank in range(data_ranks)]
    assert all(len(part) == len(whole) for part in parts)
    for number, batch in enumerate(whole):
        assert rows([batch]) == rows(part[number] for part in parts)


@pytest.mark.parametrize(("data_rank", "data_ranks"), [(0, 1), (1, 2), (0, 6)])
def test_workers_change_nothing(data_rank: int, data_ranks: int) -> None:
    settings = {"data_rank": data_rank, "data_ranks": data_ranks}
    here, away = loader(**settings), loader(**settings, num_workers=2)
    for expected, met in zip(epochs(here, 2), epochs(away, 2), strict=True):
        assert torch.equal(expected["index"], met["index"])
        assert torch.equal(expected["drawn"], met["drawn"])
    assert here.state == away.state == 46


@pytest.mark.parametrize("num_workers", [0, 2])
def test_going_on_from_a_counter_equals_going_straight(num_workers: int) -> None:
    straight = epochs(loader(), 2)
    first = loader(num_workers=num_workers)
    begun = []
    for batch in first:
        begun.append(batch)
        if len(begun) == 3:
            break
    assert first.state == 15
    second = loader(start=first.state)
    assert len(second) == 2
    assert rows(begun + epochs(second, 2)) == rows(straight)
    first.state = 0
    assert rows(epochs(first, 2)) == rows(straight)


def test_an_abandoned_iteration_is_taken_up_where_it_stopped() -> None:
    made = loader()
    begun = [next(iter(made)), next(iter(made))]
    assert rows(begun + list(made)) == rows(epochs(loader(), 1))


def test_another_batch_size_goes_on_with_the_same_samples() -> None:
    straight = rows(epochs(loader(), 1))
    made = loader(global_batch=4, start=10)
    assert len(made) == 4
    assert rows(made) == straight[10:]


def test_drop_last_skips_to_the_next_epoch() -> None:
    made = loader(drop_last=True)
    assert [len(batch["index"]) for batch in made] == [5, 5, 5, 5]
    assert made.state == 23
    assert rows(made) == rows(epochs(loader(), 2))[23:43]
    late = loader(drop_last=True, start=20)
    assert len(late) == 4
    assert rows(late) == rows(epochs(loader(), 2))[23:43]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(row[0] for row in rows(epochs(loader(seed=seed), 2))) for seed in range(3)}
    assert len(orders) == 3
    both = rows(epochs(loader(), 2))
    drawn = Counter(row[1:] for row in both)
    assert len(drawn) == 46


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_streams_are_left_alone(num_workers: int) -> None:
    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    before = state()
    for _ in loader(num_workers=num_workers):
        assert state() == before
    assert state() == before


Pair = namedtuple("Pair", "left right")


def nested(samples: list[dict[str, Any]]) -> Any:
    index = torch.tensor([sample["index"] for sample in samples])
    words = [f"sample {sample['index']}" for sample in samples]
    return UserDict(
        pair=Pair(index, words),
        many=[index[:, None].repeat(1, 3), index.numpy()],
        words=words,
        name="batch",
        total=4,
    )


def test_a_rank_without_samples_gets_no_rows() -> None:
    batches = list(loader(num_samples=4, global_batch=2, data_rank=0, data_ranks=3, collate=nested))
    assert len(batches) == 2
    for batch in batches:
        assert type(batch) is UserDict
        assert type(batch["pair"]) is Pair
        assert batch["pair"].left.shape == (0,)
        assert batch["pair"].left.dtype == torch.int64
        assert batch["pair"].right == batch["words"] == []
        assert [part.shape for part in batch["many"]] == [(0, 3), (0,)]
        assert (batch["name"], batch["total"]) == ("batch", 4)


def test_a_batch_that_cannot_be_emptied_is_refused() -> None:
    made = loader(data_rank=0, data_ranks=6, collate=lambda samples: object())
    with pytest.raises(DataError, match="cannot be emptied"):
        next(iter(made))


def test_tuples_of_tensors() -> None:
    dataset = TensorDataset(torch.arange(8), torch.arange(8.0)[:, None])
    (batch,) = Loader(dataset, global_batch=8, seed=0, shuffle=False)
    assert torch.equal(batch[0], torch.arange(8))
    assert batch[1].shape == (8, 1)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Endless(), iter([1, 2]), {1, 2}, []])
def test_what_cannot_be_indexed_is_refused(dataset: Any) -> None:
    with pytest.raises(DataError) as caught:
        Loader(dataset, global_batch=2, seed=0)
    assert type(dataset).__name__ in caught.value.given


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"global_batch": 0}, "global_batch = 1"),
        ({"global_batch": 24, "drop_last": True}, "global_batch = 23"),
        ({"data_rank": 2, "data_ranks": 2}, "data_rank = 1"),
        ({"data_rank": -1}, "data_rank = 0"),
        ({"data_ranks": 0}, "data_ranks = 1"),
        ({"start": -1}, "state = 0"),
        ({"num_workers": -1}, "num_workers = 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], fix: str) -> None:
    with pytest.raises(DataError) as caught:
        loader(**settings)
    assert caught.value.fix == fix
