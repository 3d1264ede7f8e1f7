"""The way between two ranks: in order, in both directions at once, over both transports."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sixfold.mesh import Mesh
from sixfold.plan import Geometry


def form(num_ranks: int, transport: str) -> Mesh:
    geometry = Geometry((("pipe", num_ranks), ("data", 1), ("context", 1), ("tensor", 1)), 1)
    mesh = Mesh(geometry, dist.get_rank(), torch.device("cpu"))
    return mesh.sharing(transport, exchange_bytes=1 << 20, timeout_s=20)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("transport", ["host", "network"])
def test_what_is_sent_arrives_in_order(transport: str, num_ranks: int) -> None:
    mesh = form(num_ranks, transport)
    assert (mesh.host is not None) == (transport == "host")
    shapes = ((1,), (300, 40), (0,), (7,), (2, 3, 5))
    around = [(mesh.pipe_rank + step) % num_ranks for step in (1, -1)]
    links = {place: mesh.link(place) for place in around}
    sent, arriving = [], {}
    for number, shape in enumerate(shapes):
        for link in links.values():
            value = torch.full(shape, float(10 * mesh.pipe_rank + number), dtype=torch.float64)
            sent.append(link.send(value))
            if transport == "host":
                value.zero_()  # it is on its way
    for number, shape in enumerate(shapes):
        for place, link in links.items():
            found = torch.full(shape, -1.0, dtype=torch.float64)
            arriving[place, number] = found, link.receive(found)
    for place, number in reversed(arriving):
        found, pending = arriving[place, number]
        pending.wait()
        assert bool((found == 10 * place + number).all())
    for pending in sent:
        pending.wait()
    found_ops = {each.op for each in mesh.dispatcher.ring.position().exchanges if ">" in each.group}
    assert found_ops == {"transfer"}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("transport", ["host", "network"])
def test_axes_have_sums_of_their_own(transport: str) -> None:
    geometry = Geometry((("pipe", 2), ("data", 2), ("context", 1), ("tensor", 1)), 2)
    rank = dist.get_rank()
    mesh = Mesh(geometry, rank, torch.device("cpu")).sharing(transport, exchange_bytes=1 << 20, timeout_s=20)
    assert (mesh.pipe_rank, mesh.data_rank) == (rank // 2, rank % 2)
    assert [mesh.rank_at(place) for place in range(2)] == [rank % 2, 2 + rank % 2]
    assert [mesh.geometry.first_rank(place) for place in range(2)] == [0, 2]
    mine = torch.full((5,), float(rank))
    mesh.replicas.all.all_reduce(mine).wait()
    assert mine.tolist() == [4 * (rank // 2) + 1] * 5
    assert mesh.total(float(rank)) == [6.0]
    assert mesh.everyones(rank, 0.5) == [[2 * (rank // 2), 0.5], [2 * (rank // 2) + 1, 0.5]]
    first = torch.full((3,), float(rank))
    mesh.replicas.align(first).wait()
    assert first.tolist() == [2 * (rank // 2)] * 3
    from_last = torch.full((3,), float(rank))
    mesh.broadcast(from_last, source=3).wait()
    assert from_last.tolist() == [3.0] * 3
    tied = torch.full((5,), float(rank))
    mesh.holders([0, 1], 0).all_reduce(tied).wait()
    assert tied.tolist() == [2 * (rank % 2) + 2] * 5
