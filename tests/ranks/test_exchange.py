"""What groups of ranks exchange: slices, sums and parts, point-to-point and by a backend's collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sixfold.base.errors import LinkError
from sixfold.mesh import Group, HostGroup, Mesh, Scratch
from sixfold.plan import Geometry

SIZE = 96


def group_of(ranks: list[int], *, native: bool) -> Group:
    handle = dist.group.WORLD if native else None
    return Group(ranks, dist.get_rank(), Scratch(torch.device("cpu")), handle)


def numbers(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(numel) % 7 + 3 * rank).to(dtype)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_are_summed_and_gathered(dtype: torch.dtype, native: bool, num_ranks: int) -> None:
    ranks = list(range(num_ranks))
    numel = num_ranks * SIZE
    total = sum((numbers(rank, numel, dtype) for rank in ranks), torch.zeros(numel, dtype=dtype))
    group = group_of(ranks, native=native)
    whole = numbers(dist.get_rank(), numel, dtype)
    group.reduce_scatter(whole).wait()
    assert torch.equal(group.slice_of(whole, group.place), group.slice_of(total, group.place))
    others = [place for place in ranks if place != group.place]
    for place in others:
        group.slice_of(whole, place).fill_(-1)
    group.all_gather(whole).wait()
    assert torch.equal(whole, total)
    whole = numbers(dist.get_rank(), numel, dtype)
    group.all_reduce(whole).wait()
    assert torch.equal(whole, total)


@pytest.mark.ranks(4)
def test_several_exchanges_may_be_under_way_and_end_in_any_order() -> None:
    group = group_of([0, 1, 2, 3], native=False)
    wholes = [numbers(dist.get_rank() + step, 4 * SIZE, torch.float32) for step in range(3)]
    gathered = numbers(dist.get_rank(), 4 * SIZE, torch.float32)
    pending = [group.reduce_scatter(whole) for whole in wholes]
    pending.insert(1 + dist.get_rank() % 2, group.all_gather(gathered))
    for each in reversed(pending):
        each.wait()
        each.wait()  # waiting twice adds once
    for step, whole in enumerate(wholes):
        total = sum(
            (numbers(rank + step, 4 * SIZE, torch.float32) for rank in range(4)), torch.zeros(4 * SIZE)
        )
        assert torch.equal(group.slice_of(whole, group.place), group.slice_of(total, group.place))
    expected = torch.cat([group.slice_of(numbers(rank, 4 * SIZE, torch.float32), rank) for rank in range(4)])
    assert torch.equal(gathered, expected)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("shard", [1, 2, 4])
def test_a_sum_ends_where_its_spread_says(shard: int) -> None:
    geometry = Geometry((("pipe", 1), ("data", 4), ("context", 1), ("tensor", 1)), shard)
    rank = dist.get_rank()
    mesh = Mesh(geometry, rank, torch.device("cpu"))
    assert (mesh.replicas.shard.num_ranks, mesh.replicas.copies.num_ranks) == (shard, 4 // shard)
    assert (mesh.replicas.shard.place, mesh.replicas.copies.place) == (rank % shard, rank // shard)
    total = sum((numbers(each, 4 * SIZE, torch.float64) for each in range(4)), torch.zeros(4 * SIZE))
    whole = numbers(rank, 4 * SIZE, torch.float64)
    mesh.replicas.sum_up(whole, ()).wait()
    assert torch.equal(whole, total)
    cut = numbers(rank, 4 * SIZE, torch.float64)
    mesh.replicas.sum_up(cut, ("shard",)).wait()
    mine = mesh.replicas.shard.slice_of(cut, mesh.replicas.shard.place)
    assert torch.equal(mine, mesh.replicas.shard.slice_of(total, mesh.replicas.shard.place))
    mesh.replicas.spread_out(cut, ("shard",), ("shard",)).wait()  # as cut as it shall be: nothing is sent
    mesh.replicas.spread_out(cut, ("shard",), ()).wait()
    assert torch.equal(cut, total)


@pytest.mark.ranks(1, 3)
def test_numbers_and_texts_of_all_ranks(num_ranks: int) -> None:
    mesh = Mesh(Geometry((("data", num_ranks),), num_ranks), num_ranks and _rank(), torch.device("cpu"))
    assert mesh.largest(10 * mesh.rank) == 10 * (num_ranks - 1)
    texts = ["", "ä" * 5, "two  "][:num_ranks]
    assert mesh.texts(texts[mesh.rank]) == texts
    assert mesh.texts("") == [""] * num_ranks


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@pytest.mark.ranks(1)
def test_scratch_is_used_again() -> None:
    scratch = Scratch(torch.device("cpu"))
    first, second = (scratch.take(100, torch.float32) for _ in range(2))
    begins = first.data_ptr()
    scratch.give(first)
    assert scratch.take(100, torch.bfloat16).data_ptr() != begins
    assert scratch.take(50, torch.float32).data_ptr() != begins  # half of it would be idle
    again = scratch.take(90, torch.float32)
    assert (again.data_ptr(), again.shape) == (begins, (90,))
    scratch.give(again)
    assert scratch.take(101, torch.float32).data_ptr() not in (begins, second.data_ptr())
    assert scratch.take(100, torch.float32).data_ptr() == begins


def parts_of(sender: int, receiver: int, num_ranks: int, dtype: torch.dtype) -> Tensor:
    """What one rank sends another: sizes differ, and some are empty."""
    numel = 0 if (sender + receiver) % 3 == 1 else 5 + 3 * sender + num_ranks * receiver
    return numbers(sender + 10 * receiver, numel, dtype)


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("carrier", ["point-to-point", "native", "host"])
def test_every_member_gets_its_part_from_every_other(carrier: str, num_ranks: int) -> None:
    rank, ranks = _rank(), range(num_ranks)
    if carrier == "host":
        geometry = Geometry((("pipe", 1), ("data", num_ranks), ("context", 1), ("tensor", 1)), num_ranks)
        mesh = Mesh(geometry, rank, torch.device("cpu")).sharing("host", exchange_bytes=0, timeout_s=15)
        group = mesh.replicas.shard
        assert isinstance(group, HostGroup) == (num_ranks > 1)
    elif num_ranks == 1:
        group = Group([0], 0, Scratch(torch.device("cpu")), None)
    else:
        group = group_of(list(ranks), native=carrier == "native")
    dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.uint8)
    sent = [[parts_of(rank, other, num_ranks, dtype) for other in ranks] for dtype in dtypes]
    expected = [[parts_of(other, rank, num_ranks, dtype) for other in ranks] for dtype in dtypes]
    arriving = [[torch.empty_like(part) for part in parts] for parts in expected]
    pending = [group.all_to_all(*each) for each in zip(sent, arriving, strict=True)]
    for each in reversed(pending):
        each.wait()
    for found, parts in zip(arriving, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
    for turn in range(3):  # from memory that is written again once it is given back, into several pieces
        lent = group.scratch.take(sum(part.numel() for part in sent[0]), dtypes[0])
        leaving = torch.split(lent, [part.numel() for part in sent[0]])
        for part, own in zip(leaving, sent[0], strict=True):
            part.copy_(own + turn)
        group.deal(leaving, [[part[:2], part[2:]] for part in arriving[0]]).wait()
        group.scratch.give(lent)
        assert all(torch.equal(one, own + turn) for one, own in zip(arriving[0], expected[0], strict=True))


@pytest.mark.ranks(3)
@pytest.mark.parametrize("transport", ["host", "network"])
def test_passing_on_in_a_ring_is_the_case_of_one_receiver(transport: str) -> None:
    rank, geometry = _rank(), Geometry((("pipe", 1), ("data", 3), ("context", 1), ("tensor", 1)), 3)
    mesh = Mesh(geometry, rank, torch.device("cpu")).sharing(transport, exchange_bytes=0, timeout_s=15)
    nothing = torch.empty(0)
    held = torch.full((4, 2), float(rank))
    for _ in range(3):
        sent, arriving, coming = [nothing] * 3, [nothing] * 3, torch.empty(4, 2)
        sent[(rank + 1) % 3], arriving[(rank - 1) % 3] = held, coming
        pending = mesh.replicas.shard.all_to_all(sent, arriving)
        before = held.sum()  # what is sent may be read meanwhile
        pending.wait()
        assert before == held.sum()
        held = coming
    assert torch.equal(held, torch.full((4, 2), float(rank)))
    counted = [each for each in mesh.dispatcher.ring.position().exchanges if each.op == "all-to-all"]
    assert [each.num_bytes for each in counted] == [4 * 8] * 3


@pytest.mark.ranks(2)
def test_a_part_of_another_size_than_expected_is_told() -> None:
    geometry = Geometry((("pipe", 1), ("data", 2), ("context", 1), ("tensor", 1)), 2)
    rank = _rank()
    mesh = Mesh(geometry, rank, torch.device("cpu")).sharing("host", exchange_bytes=0, timeout_s=15)
    sent, arriving = [torch.ones(3)] * 2, [torch.ones(3), torch.ones(3)]
    if rank == 0:
        arriving[1] = torch.ones(4)
        with pytest.raises(LinkError, match="12 bytes where this rank has 16"):
            mesh.replicas.shard.all_to_all(sent, arriving).wait()
    else:
        mesh.replicas.shard.all_to_all(sent, arriving).wait()
