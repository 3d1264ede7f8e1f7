"""This rank's part of every global batch of any map-style dataset.

Called through `engine.loader(dataset)`, or directly. Which samples a batch holds, and the random numbers
a dataset draws for them, follow from (seed, global sample number): not from the rank count, not from
the worker count, not from where a run was resumed. Never touches the training's random streams.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, MutableMapping, Sized
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from sixfold.base.errors import DataError
from sixfold.data.order import sample_indices
from sixfold.plan.batch import share

Collate = Callable[[list[Any]], Any]
_Scalar = str | bytes | int | float | None
_Key = tuple[int, int]
"""(global sample number, index in the dataset)"""


class Loader:
    """Iterates over what is left of the current epoch; the next iteration is the next epoch.

    A batch never mixes epochs: the last one of an epoch holds what is left. A rank without a sample in
    a batch gets the batch with zero rows, of the same structure, types and other sizes.

    Args:
        dataset: has `__len__` and `__getitem__`, the same on every rank.
        global_batch: samples per batch over all ranks.
        seed: root of the order and of the dataset's own random numbers.
        data_rank, data_ranks: which part of each batch to give, see `plan.batch.share`.
        start: global sample number to begin at, the `state` of an earlier loader.
        shuffle: another permutation every epoch; False gives the dataset's own order.
        collate: makes a batch of a list of samples; torch's default unless given.
        num_workers: processes that fetch ahead; 0 fetches in this one. They change no data.
        drop_last: leave out the last batch of an epoch where it is not full.

    Raises:
        DataError: the dataset cannot be indexed or is too small, or a number is out of its range.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        global_batch: int,
        seed: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        start: int = 0,
        shuffle: bool = True,
        collate: Collate | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.num_samples = _num_samples(dataset)
        _check("global_batch", global_batch, 1, self.num_samples if drop_last else None)
        _check("data_ranks", data_ranks, 1)
        _check("data_rank", data_rank, 0, data_ranks - 1)
        _check("num_workers", num_workers, 0)
        self.global_batch, self.seed = global_batch, seed
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.shuffle, self.num_workers, self.drop_last = shuffle, num_workers, drop_last
        self.state = start
        self._shares = _Shares(dataset, seed, collate or default_collate)

    @property
    def state(self) -> int:
        """Global sample number up to which batches were handed out; set it to go on from there.

        A running iteration is not redirected: the next one begins at the new place.
        """
        return self._state

    @state.setter
    def state(self, number: int) -> None:
        _check("state", number, 0)
        self._state = number

    def __len__(self) -> int:
        """Batches left in the current epoch."""
        return len(self._plan().starts)

    def __iter__(self) -> Iterator[Any]:
        plan = self._plan()
        loader = DataLoader(
            self._shares,
            sampler=(self._keys(batch) for batch in plan.batches()),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            # Without a generator of its own it would draw from training's random stream.
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch, data in zip(plan.batches(), loader, strict=True):
            self._state = plan.next_epoch if batch.stop == plan.stop else batch.stop
            yield data

    def _plan(self) -> _EpochPlan:
        start = self._state
        next_epoch = (start // self.num_samples + 1) * self.num_samples
        if self.drop_last and next_epoch - start < self.global_batch:
            start, next_epoch = next_epoch, next_epoch + self.num_samples
        left_over = (next_epoch - start) % self.global_batch if self.drop_last else 0
        return _EpochPlan(range(start, next_epoch - left_over, self.global_batch), next_epoch)

    def _keys(self, batch: range) -> list[_Key]:
        """This rank's part of a batch."""
        part = share(len(batch), self.data_rank, self.data_ranks)
        numbers = batch[part.start : part.stop]
        if not self.shuffle:
            return [(number, number % self.num_samples) for number in numbers]
        indices = sample_indices(self.seed, numbers.start, len(numbers), self.num_samples)
        return list(zip(numbers, indices.tolist(), strict=True))


@dataclass(frozen=True)
class _EpochPlan:
    """What is left of an epoch, as global sample numbers.

    Args:
        starts: first number of each batch; its stop is where the last batch ends.
        next_epoch: where the next epoch begins, later than that stop when samples are left out.
    """

    starts: range
    next_epoch: int

    @property
    def stop(self) -> int:
        return self.starts.stop

    def batches(self) -> Iterator[range]:
        return (range(first, min(first + self.starts.step, self.stop)) for first in self.starts)


class _Shares(Dataset[Any]):
    """The dataset as workers see it: indexed by the keys of one rank's part of one batch."""

    def __init__(self, dataset: Any, seed: int, collate: Collate) -> None:
        self.dataset, self.seed, self.collate = dataset, seed, collate

    def __getitem__(self, keys: list[_Key]) -> Any:
        with _random_streams_restored():
            if not keys:
                return _without_rows(self.collate([self.dataset[0]]))
            return self.collate([self._sample(*key) for key in keys])

    def _sample(self, number: int, index: int) -> Any:
        digest = hashlib.blake2b(f"sample:{self.seed}:{number}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        random.seed(key)
        np.random.seed(key % 2**32)
        # The CPU stream alone: torch.manual_seed would reset the device's streams too.
        torch.default_generator.manual_seed(key)
        return self.dataset[index]


@contextmanager
def _random_streams_restored() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)


def _as_is(batch: Any) -> Any:
    return batch


def _without_rows(batch: Any) -> Any:
    """A batch of the same structure with no samples in it."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return batch[:0] if batch.ndim else batch
    if isinstance(batch, MutableMapping):
        empty = copy(batch)
        for name, value in batch.items():
            empty[name] = _without_rows(value)
        return empty
    if isinstance(batch, list | tuple):
        if hasattr(batch, "_fields"):  # a named tuple has fields, not rows
            return type(batch)(*map(_without_rows, batch))
        is_rows = all(isinstance(part, _Scalar) for part in batch)
        return type(batch)() if is_rows else type(batch)(map(_without_rows, batch))
    if isinstance(batch, _Scalar):
        return batch
    raise DataError(
        f"a rank has no sample in a batch, and a {type(batch).__name__} cannot be emptied for it",
        rule="collate returns tensors in mappings, lists or tuples, or every rank has samples in every batch",
        fix="return a dict of tensors from collate, or set drop_last=True and global_batch >= data_ranks",
    )


def _num_samples(dataset: Any) -> int:
    kind = type(dataset).__name__
    if (
        isinstance(dataset, IterableDataset)
        or not isinstance(dataset, Sized)
        or not hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"the dataset is a {kind}, which cannot be asked for sample i",
            rule="the order of samples is computed, so a dataset needs __len__ and __getitem__",
            fix="pass a map-style dataset, or draw the samples into a list first: list(dataset)",
        )
    if len(dataset) == 0:
        raise DataError(
            f"the dataset, a {kind}, is empty", rule="one sample at least", fix="pass a dataset with samples"
        )
    return len(dataset)


def _check(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        fix = f"{name} = {low if value < low else high}"
        raise DataError(f"{name} = {value}", rule=f"{name} is {bounds}", fix=fix)
