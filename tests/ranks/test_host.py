"""Exchange through shared memory: the bits of the network, whatever the order, the reuse and the delays; and
what users and dying ranks may do to it."""

from __future__ import annotations

import gc
import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sixfold
import sixfold.mesh.host.common as common_module
import sixfold.mesh.host.host as host_module
from sixfold.base.errors import LinkError, MeshError, PlanError
from sixfold.mesh import Group, HostGroup, Mesh
from sixfold.mesh.host.common import renew
from sixfold.plan import Geometry
from sixfold.testing import Pool, RankFailure
from tests.ranks import plain, rows

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def form(
    transport: str | None, shard: int | None = None, timeout_s: float = 15.0, exchange_bytes: int = 0
) -> Mesh:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    geometry = Geometry((("pipe", 1), ("data", ranks), ("context", 1), ("tensor", 1)), shard or ranks)
    mesh = Mesh(geometry, dist.get_rank() if ranks > 1 else 0, torch.device("cpu"))
    return mesh.sharing(transport, exchange_bytes=exchange_bytes, timeout_s=timeout_s)


def shared_group(mesh: Mesh) -> HostGroup:
    assert isinstance(mesh.replicas.shard, HostGroup)
    return mesh.replicas.shard


def numbers(seed: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return (100 * torch.randn(numel, generator=generator)).to(dtype)


# Numbers.


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("in_place", [True, False])
def test_every_exchange_gives_the_bits_of_the_network(in_place: bool, num_ranks: int) -> None:
    ours, theirs = form("host"), form("network")
    assert isinstance(theirs.replicas.shard, Group)
    assert not isinstance(theirs.replicas.shard, HostGroup)
    group = shared_group(ours)
    for seed, dtype in enumerate(TYPES):
        for numel in (num_ranks, 96 * num_ranks, 40_000 * num_ranks):
            start = numbers(seed, numel, dtype)
            for name in ("reduce_scatter", "all_gather", "all_reduce"):
                expected, found = start.clone(), start.clone()
                if in_place:
                    found = ours.exchangeable.take(numel, dtype).copy_(start)
                getattr(theirs.replicas.shard, name)(expected).wait()
                getattr(group, name)(found).wait()
                if name == "reduce_scatter":
                    expected, found = (group.slice_of(each, group.place) for each in (expected, found))
                assert torch.equal(expected, found), (name, dtype, numel)
                if in_place and name != "reduce_scatter":
                    ours.exchangeable.give(found)


@pytest.mark.ranks(2, 3, 4)
def test_a_sum_over_all_takes_any_size() -> None:
    mesh = form("host")
    for numel in (1, 2, 7, 32, 1001):
        mine = numbers(numel, numel, torch.float64).round()
        expected = mine.clone()
        dist.all_reduce(expected)
        mesh.replicas.all.all_reduce(mine).wait()
        assert torch.equal(mine, expected)
    assert mesh.total(1.0, mesh.rank) == [mesh.world_size, sum(range(mesh.world_size))]
    assert mesh.largest(5 - mesh.rank) == 5


@pytest.mark.ranks(1)
def test_alone_nothing_is_shared() -> None:
    assert form("host").host is None


@pytest.mark.ranks(4)
def test_exchanges_may_be_waited_for_in_any_order() -> None:
    group, rank = shared_group(form("host")), dist.get_rank()
    wholes = [torch.full((64,), float(10 * step + rank)) for step in range(4)]
    pending = [group.reduce_scatter(whole) for whole in wholes[:3]]
    pending.append(group.all_gather(wholes[3]))
    random.Random(rank).shuffle(pending)
    for each in [*pending, *pending]:  # waiting twice adds once
        each.wait()
    for step, whole in enumerate(wholes[:3]):
        assert group.slice_of(whole, rank).eq(40 * step + 6).all()
    assert wholes[3].tolist() == [30.0 + place for place in range(4) for _ in range(16)]


@pytest.mark.ranks(3)
def test_sums_and_gathers_need_no_order_between_them() -> None:
    """As on the network: a rank that serves others may sum before it gathers where they do it after."""
    group = shared_group(form("host"))
    summed, gathered = torch.full((6,), 1.0), torch.full((6,), float(group.place))
    if group.place:
        pending = [group.all_gather(gathered), group.reduce_scatter(summed)]
    else:
        pending = [group.reduce_scatter(summed), group.all_gather(gathered)]
    for each in pending:
        each.wait()
    assert group.slice_of(summed, group.place).eq(3).all()
    assert gathered.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.ranks(2)
def test_a_buffer_that_others_still_read_is_not_handed_out() -> None:
    mesh = form("host")
    group, memory = shared_group(mesh), mesh.exchangeable
    first = memory.take(64, torch.float32).fill_(mesh.rank + 1)
    if mesh.rank == 0:
        dist.barrier()  # rank 1 comes first, so it does not read on the way
    pending = group.reduce_scatter(first)
    if mesh.rank == 0:
        pending.wait()
        memory.give(first)
        second = memory.take(64, torch.float32)  # at once, though rank 1 has not read yet
        assert second.data_ptr() != first.data_ptr()
        second.fill_(100)
        dist.barrier()
        memory.reclaim(first)
        assert memory.take(64, torch.float32).data_ptr() == first.data_ptr()
    else:
        dist.barrier()
        dist.barrier()
        pending.wait()
        assert group.slice_of(first, 1).eq(3).all()


@pytest.mark.ranks(2, 3)
def test_delays_and_reuse_never_mix_numbers() -> None:
    """Ranks are late at random and use buffers again at once, each in an order of its own."""
    mesh = form("host")
    group, memory = shared_group(mesh), mesh.exchangeable
    rank, size = mesh.rank, mesh.world_size
    own, common = random.Random(rank), random.Random(99)
    kept = memory.take(4096 * size, torch.float32)
    working = torch.empty(4096 * size)
    under_way: list[tuple[int, Tensor, Any]] = []
    for step in range(150):
        if own.random() < 0.1:
            time.sleep(own.random() * 0.004)
        kind = common.choice(("borrowed", "kept", "gathered", "reduced"))
        if kind == "borrowed":
            whole = memory.take(4096 * size, torch.float32).fill_(step + rank)
            under_way.append((step, whole, group.reduce_scatter(whole)))
        elif kind == "kept":
            memory.reclaim(kept)
            kept.fill_(step * rank)
            group.reduce_scatter(kept).wait()
            assert group.slice_of(kept, rank).eq(step * sum(range(size))).all()
        elif kind == "gathered":
            group.slice_of(working, rank).fill_(step - rank)
            group.all_gather(working).wait()
            assert [float(group.slice_of(working, place).mean()) for place in range(size)] == [
                step - place for place in range(size)
            ]
            working.zero_()
        else:
            memory.reclaim(kept)
            kept.fill_(step + rank)
            mesh.replicas.all.all_reduce(kept).wait()
            assert kept.eq(step * size + sum(range(size))).all()
            kept.fill_(-1)
        while len(under_way) > own.randrange(1, 5):  # so that buffers come back in another order
            posted, whole, pending = under_way.pop(own.randrange(len(under_way)))
            pending.wait()
            assert group.slice_of(whole, rank).eq(posted * size + sum(range(size))).all()
            memory.give(whole)


@pytest.mark.ranks(2, 4)
def test_more_exchanges_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sixfold.mesh.host.lane.NUM_OFFERS", 3)
    monkeypatch.setattr("sixfold.mesh.host.signals.NUM_OFFERS", 3)
    group = shared_group(form("host"))
    wholes = [torch.full((8,), float(step)) for step in range(20)]
    for each in [group.reduce_scatter(whole) for whole in wholes]:
        each.wait()
    for step, whole in enumerate(wholes):
        assert group.slice_of(whole, group.place).eq(step * group.num_ranks).all()


@pytest.mark.ranks(2, 4)
def test_common_memory_is_whole_for_everyone_without_a_copy() -> None:
    replicas = form("host").replicas
    group = replicas.shard
    assert isinstance(group, HostGroup)
    for each in (group.common(96 * group.num_ranks, torch.float32), group.common(1000, torch.bfloat16)):
        size = each.whole.numel() // group.num_ranks
        assert each.whole.eq(0).all()
        meeting, published = group.prepare_meeting(), replicas.prepare_publish([each], ("shard",), ("shard",))
        meeting.start().wait()
        for step in range(20):
            each.part.fill_(step + group.place)
            published.start().wait()
            for place in range(group.num_ranks):
                assert each.whole[place * size : (place + 1) * size].eq(step + place).all()
            meeting.start().wait()
        assert each.part.untyped_storage().nbytes() == size * each.part.itemsize


@pytest.mark.ranks(3)
def test_sums_of_fewer_numbers_than_ranks_take_no_memory() -> None:
    mesh = form("host")
    mesh.total(1.0)
    reserved = mesh.exchangeable.memory._reserved  # type: ignore[attr-defined]
    for _ in range(20):
        assert mesh.total(1.0) == [3.0]
    # A gather may need a second buffer while the first is still read: one page more, once.
    assert mesh.exchangeable.memory._reserved <= reserved + mmap.PAGESIZE  # type: ignore[attr-defined]


@pytest.mark.ranks(3)
def test_an_edit_of_the_whole_is_seen_by_its_rank_alone_until_it_is_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replicas = form("host").replicas
    group = replicas.shard
    assert isinstance(group, HostGroup)
    common = group.common(3 * 2048, torch.float64)
    common.part.fill_(group.place)
    meeting, published = group.prepare_meeting(), replicas.prepare_publish([common], ("shard",), ("shard",))
    for table in (common_module.PAGE_TABLE, os.devnull):
        monkeypatch.setattr(common_module, "PAGE_TABLE", table)
        common.part.fill_(group.place)
        published.start().wait()
        assert renew([common]) == (table == os.devnull)  # where it cannot look it takes it for granted
        if group.place == 1:
            common.whole.data[:-1].mul_(-10)
            assert renew([common]) == 1
            common.whole.data[:-1].mul_(-10)
        meeting.start().wait()
        seen = common.whole.view(3, -1)[:, 0].tolist()
        meeting.start().wait()  # nobody writes while another reads
        assert seen == ([0, -10, -20] if group.place == 1 else [0, 1, 2])
        common.part.add_(5)
        published.start().wait()
        assert common.whole.view(3, -1).eq(torch.tensor([[5.0], [6.0], [7.0]])).all()
        meeting.start().wait()


# Who shares with whom.


def on_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 1 on one host, the others on another."""
    monkeypatch.setattr(host_module, "_place", lambda: f"host {dist.get_rank() // 2}")


@pytest.mark.ranks(4)
def test_groups_within_a_host_share_and_others_use_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    on_two_hosts(monkeypatch)
    mesh = form("host", shard=2)
    assert [isinstance(group, HostGroup) for group in (mesh.replicas.shard, mesh.replicas.copies)] == [
        True,
        False,
    ]
    whole = mesh.exchangeable.take(64, torch.float64).fill_(2.0**mesh.rank)
    mesh.replicas.sum_up(whole, ("shard",)).wait()
    assert mesh.replicas.shard.slice_of(whole, mesh.replicas.shard.place).eq(15).all()
    mesh.replicas.spread_out(whole, ("shard",), ()).wait()
    assert whole.eq(15).all()
    whole.fill_(2.0**mesh.rank)
    mesh.replicas.sum_up(whole, ()).wait()
    assert whole.eq(15).all()


@pytest.mark.ranks(4)
def test_what_was_asked_for_is_done_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(host_module._log, "warning", lambda text, *words: told.append(text % words))
    on_two_hosts(monkeypatch)
    with pytest.raises(PlanError, match="ranks 0, 1, 2, 3 exchange most and are on different hosts"):
        form("host")
    assert form(None).host is None  # nobody asked, so the reason is told and the network used
    assert len(told) == (dist.get_rank() == 0), told
    with pytest.raises(PlanError, match=r"\+ 8\.0 EiB|= .* GiB, and .* are free"):
        form("host", shard=2, exchange_bytes=2**60)
    monkeypatch.setattr(host_module, "PeerMemory", not_allowed)
    with pytest.raises(PlanError, match="rank 0 cannot open another's memory: Permission denied"):
        form("host", shard=2)


def not_allowed(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.ranks(2)
def test_memory_that_is_not_there_is_refused_before_it_is_touched() -> None:
    mesh = form("host")
    with pytest.raises(MeshError, match=r"4096\.0 GiB more of shared memory beside .*: .* are free"):
        mesh.exchangeable.take(2**40, torch.float32)
    assert mesh.exchangeable.take(2**10, torch.float32).eq(0).all()


@pytest.mark.ranks(2)
def test_shared_memory_is_the_choice_where_nobody_chose() -> None:
    assert form(None).host is not None
    assert form("network").host is None


# When a rank is lost.


def named_memory() -> set[str]:
    """Shared memory of this process that has a name, and would outlive it."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line}


def lost(folder: Path, how: str) -> None:
    before = named_memory()
    mesh = form("host")
    group = shared_group(mesh)
    whole = mesh.exchangeable.take(1 << 20, torch.float32).fill_(1)
    group.all_reduce(whole).wait()
    assert named_memory() == before
    if mesh.rank == 1:
        pending = group.reduce_scatter(whole)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while not (folder / "told").exists():
            time.sleep(0.01)
        pending.wait()
        return
    group.reduce_scatter(whole).wait()  # what was offered before the end is still there
    assert group.slice_of(whole, 0).eq(4).all()
    if how == "late":
        group._gather_lane._timeout_s = 0.5
    began = time.monotonic()
    with pytest.raises(LinkError) as caught:
        group.all_gather(whole).wait()
    (folder / "told").write_text(f"{time.monotonic() - began}\n{caught.value}")


@pytest.mark.parametrize(
    ("how", "words"), [("killed", "rank 1 ended"), ("late", "rank 1 did not come within 0.")]
)
def test_a_lost_rank_is_named_in_time_and_leaves_nothing(
    how: str, words: str, tmp_path: Path, rank_pool: Pool
) -> None:
    if how == "killed":
        with pytest.raises(RankFailure, match="SIGKILL"):
            rank_pool.run(lost, tmp_path, how, ranks=2, fresh=True)
    else:
        rank_pool.run(lost, tmp_path, how, ranks=2, fresh=True)
    seconds, told = (tmp_path / "told").read_text().split("\n", 1)
    assert told.startswith(words)
    assert float(seconds) < 5.0


@pytest.mark.ranks(2)
def test_ranks_that_do_different_things_are_told() -> None:
    group = shared_group(form("host"))
    whole = torch.zeros(64 + 64 * group.place)
    with pytest.raises(LinkError, match="offers"):
        group.reduce_scatter(whole).wait()
    group = shared_group(form("host"))
    with pytest.raises(LinkError, match="another kind"):
        group.common(64, torch.float32) if group.place else group.all_gather(whole).wait()


@pytest.mark.ranks(2)
def test_engines_that_are_gone_leave_no_memory() -> None:
    def is_mapped() -> bool:
        return "memfd:sixfold" in Path("/proc/self/maps").read_text()

    def use() -> None:
        config = {"layout": {"zero": 2, "transport": "host"}}
        engine = sixfold.initialize(nn.Linear(4, 4), config=config, loss_fn=lambda out, batch: out.mean())
        engine.train_step((torch.ones(2, 4),))
        assert is_mapped()

    gc.collect()  # what other tests have left in circles
    assert not is_mapped()
    use()
    gc.collect()
    assert not is_mapped()


# Users.


def clamp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.2, 0.2)


def scale(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def scale_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def start_anew(model: nn.Module) -> None:
    nn.init.constant_(model.get_parameter("0.weight"), 0.05)


EDITS: dict[str, Callable[[nn.Module], None]] = {
    each.__name__: each for each in (clamp, scale, scale_data, start_anew)
}


# With preset 3, edits are made inside engine.gathered().
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("preset", "num_ranks", "transport"), [case for case in rows.carried(2, 3) if case[0] in "012"]
)
def test_edits_in_place_on_every_rank_act_once(preset: str, transport: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    x = torch.arange(72, dtype=torch.float64).view(12, 6).sin()
    for name, edit in EDITS.items():
        reference = model()
        optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05)
        engine = sixfold.initialize(
            model(),
            config={"layout": {"zero": int(preset), "transport": transport}, "optimizer": {"lr": 0.05}},
            loss_fn=lambda output, batch: output.square().mean(),
        )
        places = plain.cuts(12, engine.data_ranks, "even", 0)[engine.data_rank]
        for _ in range(4):
            for each in (reference, engine.module):
                with torch.no_grad():
                    edit(each)
            optimizer.zero_grad()
            reference(x).square().mean().backward()
            optimizer.step()
            engine.train_step((x[places.start : places.stop],))
            for parameter in engine.module.parameters():  # gradients are this rank's own to spoil
                if parameter.grad is not None:
                    parameter.grad.fill_(1e9)
        found = engine.full_state_dict()
        for key, expected in reference.state_dict().items():
            assert torch.allclose(found[key], expected, rtol=0, atol=1e-12), (name, key)
