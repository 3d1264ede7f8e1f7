"""Hangs of real ranks: the verdict names the guilty one, whatever it did, and nobody is left waiting."""

from __future__ import annotations

import inspect
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import MeshError
from sixfold.base.ring import ranks_of
from sixfold.mesh import Mesh, agree
from sixfold.monitor.verdict import Verdict
from sixfold.monitor.watcher import Watcher
from sixfold.plan import Geometry
from sixfold.testing import Pool, RankFailure

TIMEOUT_S = 1.0
LATEST_S = TIMEOUT_S + 5.0
EXIT = 4


def mesh_of(num_ranks: int) -> Mesh:
    return Mesh(Geometry((("data", num_ranks),), num_ranks), dist.get_rank(), torch.device("cpu"))


def watched(
    mesh: Mesh, folder: Path, tell: Callable[[Verdict | None], None], *, far: bool = False
) -> Watcher:
    """A watcher with little patience; `far` puts every ring where the others do not see it."""
    store = dist.FileStore(str(folder / "side"), mesh.world_size)
    rings = folder / f"host-{mesh.rank if far else 0}"
    rings.mkdir(exist_ok=True)
    return Watcher(
        mesh.dispatcher,
        store,
        rank=mesh.rank,
        world_size=mesh.world_size,
        timeouts={"step": TIMEOUT_S, "save": 600.0},
        tell=tell,
        folder=rings,
    )


def skips(mesh: Mesh, watcher: Watcher) -> None:
    if mesh.rank != 2:
        mesh.replicas.all.all_reduce(torch.ones(1000)).wait()
    mesh.total(1.0)


def calls_another_shape(mesh: Mesh, watcher: Watcher) -> None:
    mesh.replicas.all.all_reduce(torch.ones(2000 if mesh.rank == 1 else 1000)).wait()


def calls_a_smaller_shape_in_a_slice_exchange(mesh: Mesh, watcher: Watcher) -> None:
    mesh.replicas.shard.reduce_scatter(torch.ones(400 if mesh.rank == 1 else 800)).wait()


def calls_another_operation(mesh: Mesh, watcher: Watcher) -> None:
    call = mesh.broadcast if mesh.rank == 1 else mesh.replicas.all.all_reduce
    call(torch.ones(1000)).wait()


def raises(mesh: Mesh, watcher: Watcher) -> None:
    if mesh.rank == 3:
        watcher.close("ended with ValueError: boom")  # as the session of the rank does it
        os._exit(EXIT)
    mesh.total(1.0)


def is_killed(mesh: Mesh, watcher: Watcher) -> None:
    if mesh.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.total(1.0)


def sleeps(mesh: Mesh, watcher: Watcher) -> None:
    if mesh.rank == 0:
        time.sleep(60)
    mesh.total(1.0)


def is_stopped(mesh: Mesh, watcher: Watcher) -> None:
    if mesh.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    mesh.total(1.0)


def hang(case: Callable[[Mesh, Watcher], None], folder: Path, far: bool) -> None:
    """Three good steps, then the case; a verdict is written down and ends the process."""
    mesh = mesh_of(dist.get_world_size())

    def tell(verdict: Verdict | None) -> None:
        if verdict is not None:
            took = time.monotonic() - began
            (folder / "verdict").write_text(f"{took}\n{verdict.kind} {verdict.guilty}\n{verdict}")
            time.sleep(0.3)
        os._exit(EXIT)

    watcher = watched(mesh, folder, tell, far=far)
    if not far:
        deadline = time.monotonic() + 10
        while len(mesh.dispatcher.neighbours) < mesh.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    for _ in range(3):
        mesh.replicas.all.all_reduce(torch.ones(1000)).wait()
        mesh.total(1.0)
    began = time.monotonic()
    case(mesh, watcher)
    time.sleep(LATEST_S)
    raise AssertionError("the hang was not noticed")


CASES = {
    skips: ("skipped", 2, "skipped all-reduce #7 (3.9 KiB, {}); ranks 0, 1, 3 waited in it", "ones(1000)"),
    calls_another_shape: ("mismatched", 1, "called all-reduce #7 (7.8 KiB, {}) where others", "ones("),
    calls_a_smaller_shape_in_a_slice_exchange: (
        *("mismatched", 1),
        *("called reduce-scatter #1 (1.6 KiB, {}) where others", "ones("),
    ),
    calls_another_operation: (
        *("mismatched", 1),
        *("called broadcast #7 (1000 x torch.float32, {}) where others", "call("),
    ),
    raises: ("died", 3, "died before the end of all-reduce #7 (8 B, {}): ended with ValueError", "total"),
    is_killed: ("died", 3, "died before the end of all-reduce #7 (8 B, {}); ranks 0, 1, 2 waited", "total"),
    sleeps: ("slow", 0, "is slow and has not come to all-reduce #7 (8 B, {}); ranks 1, 2, 3 waited", "total"),
    is_stopped: ("slow", 0, "is slow and has not come to all-reduce #7 (8 B, {}); ranks 1, 2, 3", "total"),
}
"""Kind, guilty rank, the beginning of the verdict after the rank, and a piece of the line it names."""

FAR = (raises, is_killed, sleeps)
"""What does not make gloo abort the innocent: ranks of other hosts cannot be asked before an exchange."""


def line_of(case: Callable[..., None], piece: str) -> str:
    """Where a piece of text stands in the body of a function."""
    lines, start = inspect.getsourcelines(case)
    offset = next(offset for offset, line in enumerate(lines) if offset and piece in line)
    return f"{os.path.relpath(__file__)}:{start + offset}"


@pytest.mark.parametrize(
    ("case", "far"),
    [*((case, False) for case in CASES), *((case, True) for case in FAR)],
    ids=lambda value: getattr(value, "__name__", "far" if value else "near"),
)
def test_the_verdict_names_the_guilty(
    case: Callable[[Mesh, Watcher], None],
    far: bool,
    rank_pool: Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The pool would be faster than a verdict; who is stopped never ends by itself, though all others do, nor
    # shows its stack.
    monkeypatch.setattr("sixfold.testing.pool._GRACE_S", 1.0 if case is is_stopped else LATEST_S)
    if case is is_stopped:
        monkeypatch.setattr("sixfold.testing.pool._DUMP_LIMIT_S", 0.1)
    kind, guilty, words, piece = CASES[case]
    with pytest.raises(RankFailure):
        rank_pool.run(hang, case, tmp_path, far, ranks=4, fresh=True)
    took, verdict, first, *_ = (tmp_path / "verdict").read_text().splitlines()
    assert verdict == f"{kind} ({guilty},)"
    assert first.startswith(f"hang: rank {guilty} {words.format(line_of(case, piece))}"), first
    if case is sleeps:
        assert f"rank 0 is at {line_of(case, 'sleep(60)')}, phase start" in first
    assert float(took) < LATEST_S
    assert len(list(tmp_path.glob("host-*/*.ring"))) <= 1  # a stopped process removes nothing


@pytest.mark.ranks(2)
@pytest.mark.parametrize("phase", ["save", None])
def test_a_phase_has_its_own_patience(phase: str | None, num_ranks: int, tmp_path: Path) -> None:
    """Rank 1 waits longer than a step may take; told, or not, while both live on."""
    told: list[Verdict | None] = []
    mesh = mesh_of(num_ranks)
    watcher = watched(mesh, tmp_path, told.append)
    around: AbstractContextManager[None] = mesh.phase(phase) if phase else nullcontext()
    with around:
        if mesh.rank == 0:
            time.sleep(2 * TIMEOUT_S)
        mesh.barrier()
    watcher.close()
    mesh.barrier()
    assert bool(told) == (phase is None)
    assert mesh.dispatcher.phase_name == "start"


@pytest.mark.ranks(2)
def test_exchanges_are_recorded(num_ranks: int) -> None:
    mesh = mesh_of(num_ranks)
    mesh.replicas.sum_up(torch.ones(8, dtype=torch.float64), ("shard",)).wait()
    pending = mesh.broadcast(torch.ones(3))
    line = line_of(test_exchanges_are_recorded, "pending = mesh")
    found = mesh.dispatcher.ring.position()
    assert [(each.number, each.op, each.num_bytes, each.is_over) for each in found.exchanges] == [
        (1, "reduce-scatter", 64, True),
        (1, "broadcast", 12, False),
    ]
    assert [each.group for each in found.exchanges] == ["0,1:sums", "0,1"]
    assert found.exchanges[-1].place == line
    assert found.blocked is None  # nobody waits for it yet
    pending.wait()
    pending.wait()
    mesh.replicas.all.all_reduce(torch.ones(2)).wait()
    agree(mesh, {"name": "text"})
    assert mesh.everyones(mesh.rank, 0.5) == [[0.0, 0.5], [1.0, 0.5]]
    found = mesh.dispatcher.ring.position()
    assert all(each.is_over for each in found.exchanges)
    assert [each.op for each in found.exchanges[2:]] == [
        "all-reduce",
        "all-gather",
        "all-gather",
        "all-reduce",
    ]


@pytest.mark.ranks(2)
def test_what_differs_from_a_neighbour_is_not_sent(num_ranks: int) -> None:
    """Here by rings that are handed over, without a watcher: the error names line and rank."""
    mesh, numel = mesh_of(num_ranks), 3
    other = mesh_of(num_ranks)
    pending = other.replicas.all.all_reduce(torch.ones(numel))
    mesh.dispatcher.neighbours[1 - mesh.rank] = other.dispatcher.ring.snapshot()
    broken: list[RuntimeError] = []
    mesh.dispatcher.on_broken = broken.append
    with pytest.raises(MeshError, match=r"all-reduce #1 of 4 x torch.float32 at .*:\d+, where rank\(s\) \["):
        mesh.replicas.all.all_reduce(torch.ones(4))
    assert len(broken) == 1
    pending.wait()


@pytest.mark.ranks(1)
def test_one_rank_records_nothing() -> None:
    mesh = Mesh(Geometry((("data", 1),), 1), 0, torch.device("cpu"))
    mesh.replicas.all.all_reduce(torch.ones(3)).wait()
    mesh.replicas.shard.all_reduce(torch.ones(3)).wait()
    assert mesh.everyones(1.0, 2.0) == [[1.0, 2.0]]
    assert mesh.dispatcher.ring.position().exchanges == ()


class Choosy(nn.Module):
    """Blocks of which odd data ranks leave one out."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = x if index == 2 and self.rank % 2 else torch.tanh(block(x))
        return x


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(("zero", "shard"), [(0, None), (1, None), (2, 2), (3, None), (3, 2)])
def test_every_rank_issues_the_same_exchanges(zero: int, shard: int | None, num_ranks: int) -> None:
    """With unequal shares and unequal use of the model too: that is what the comparison stands on."""
    rank = dist.get_rank()
    layout = {"zero": zero} | ({"shard": shard} if shard else {})
    engine = sixfold.initialize(
        Choosy(rank),
        config={"batch": {"micro": 2}, "layout": layout},
        loss_fn=lambda output, _: output.square().mean(),
    )
    for step in range(3):
        engine.train_step(torch.ones(2 + 3 * (rank + step), 8))
        engine.eval_step(torch.ones(2, 8))
    exchanges = engine.mesh.dispatcher.ring.position().exchanges
    mine: dict[str, list[str]] = {}
    for each in exchanges:
        mine.setdefault(each.group, []).append(f"{each.number} {each.op} {each.numel} {each.dtype}")
    everyones = [json.loads(text) for text in engine.mesh.texts(json.dumps(mine))]
    for group, calls in mine.items():
        for other in ranks_of(group):
            # Rings hold the same number of exchanges in all, not in each group.
            shared = min(len(calls), len(everyones[other][group]))
            assert calls[-shared:] == everyones[other][group][-shared:]
    engine.close()
