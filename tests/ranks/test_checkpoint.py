"""Checkpoints by slices: every layout writes the same bytes and loads them; saves in the background."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sixfold
from sixfold.base.errors import CheckpointError, SaveError
from sixfold.checkpoint import Keep, open_checkpoint, ranges, together
from sixfold.checkpoint.files import Buffer, Files
from sixfold.checkpoint.importing import import_folder
from sixfold.engine import Engine
from sixfold.mesh.dispatch import Exchange
from sixfold.testing import Pool
from tests.covering import Case, covering
from tests.ranks import plain

PRECISIONS: dict[str, dict[str, str]] = {
    "fp64": {"compute": "fp64"},
    "bf16": {"compute": "bf16", "storage": "bf16"},
}


FACTORS: dict[str, tuple[Any, ...]] = {
    "precision": tuple(PRECISIONS),
    "ranks": (1, 2, 3, 4),
    "zero": (0, 1, 2, 3),
    "shard": (None, 2),
    "tensor": (1, 2, 4),
}


def legal(case: Case) -> bool:
    """Groups of hybrid sharding have two ranks, and there are two."""
    replicas = case["ranks"] // case["tensor"]
    return case["ranks"] % case["tensor"] == 0 and (
        case["shard"] is None or (replicas == 4 and case["zero"] > 0)
    )


class Mixed(nn.Module):
    """Tied, frozen and 0-d parameters, one that nobody uses, an empty one, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.table = nn.Embedding(31, 9)
            self.inner = nn.Linear(9, 9)
            self.base = nn.Linear(9, 9, bias=False).requires_grad_(False)
            self.head = nn.Linear(9, 31, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(7))
        self.empty = nn.Parameter(torch.ones(0, 4))
        self.tensor_rules = {
            "table": "embedding_rowwise",
            "inner": "colwise_gather_output",
            "base": "rowwise_split_input",
            "head": "colwise_gather_output",
        }
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = self.table(tokens)
        out: Tensor = self.head(torch.tanh(self.inner(x) + self.base(x)) * self.scale)
        return out


def make(layout: dict[str, Any], precision: str = "fp64", seed: int = 0, **more: Any) -> Engine:
    model = Mixed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + seed)
    vectors = [each for each in model.parameters() if each.requires_grad and each.dim() < 2]
    matrices = [each for each in model.parameters() if each.requires_grad and each.dim() == 2]
    # State in one group alone, as a momentum beside none.
    made = torch.optim.SGD([{"params": matrices, "momentum": 0.9}, {"params": vectors}], lr=0.05)
    if precision == "fp64":
        model = model.double()
        made = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "lr": 0.02}], lr=0.05)
    return sixfold.initialize(
        model,
        config={"layout": layout, "precision": PRECISIONS[precision], **more},
        optimizer=made,
        loss_fn=lambda output, batch: nn.functional.cross_entropy(output.flatten(0, 1), batch.flatten()),
    )


def step(engine: Engine) -> float:
    tokens = torch.randint(0, 31, (12, 5), generator=torch.Generator().manual_seed(engine.num_steps))
    places = plain.cuts(12, engine.data_ranks, "even", 0)[engine.data_rank]
    return engine.train_step(tokens[places.start : places.stop])


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All that a save holds but its manifest, whose serial counts saves."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


# Every layout.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layout_saves_the_same_bytes_and_loads_them(
    precision: str, tmp_path: Path, rank_pool: Pool
) -> None:
    """Of a model with all kinds of parameters; `test_checkpoint_layouts.py` has the other axes."""
    reference = tmp_path / "reference"
    loss = rank_pool.run(reference_run, reference, precision, ranks=1)[0]
    spread = {"zero": 3, "shard": 2, "gradients": "all", "optimizer": "all"}
    layouts = [(4, spread)]
    for case in covering(FACTORS, legal):
        if case.pop("precision") == precision:
            layouts.append((case.pop("ranks"), case))
    for ranks, layout in layouts:
        found = rank_pool.run(loaded_run, layout, precision, reference, ranks=ranks)
        assert found[0] == pytest.approx(loss, rel=1e-12 if precision == "fp64" else 2e-2), (ranks, layout)


def reference_run(folder: Path, precision: str) -> float:
    engine = make({"zero": 0}, precision)
    for _ in range(3):
        step(engine)
    engine.save(folder)
    return step(engine)


def loaded_run(layout: dict[str, Any], precision: str, reference: Path) -> float:
    engine = make(layout, precision, seed=1)
    engine.load(reference)
    assert engine.num_steps == 3
    saved = open_checkpoint(reference)
    whole = engine.full_state_dict()
    assert whole.keys() == set(saved.model_names)
    assert "scratch" not in whole
    for name, tensor in whole.items():
        assert torch.equal(tensor, saved.read_model(name)), name
    mine = reference.with_name("-".join(f"{k}{v}" for k, v in layout.items()) + f"-{dist.get_world_size()}")
    engine.save(mine)
    assert bytes_of(mine) == bytes_of(reference)
    return step(engine)


# What it costs.


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().mean()


def large(layout: dict[str, Any]) -> Engine:
    with torch.device("meta"):
        model = Large()
    engine = sixfold.initialize(model, config={"layout": layout})
    engine.train_step(torch.ones(1, 1024))
    return engine


def peak_growth(action: Callable[[], None]) -> int:
    """Bytes of private memory beyond those before, at the worst moment."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def bytes_exchanged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every exchange from here on, whatever carries it."""
    sent: list[int] = []
    start = Exchange.start

    def watched(self: Exchange) -> Exchange:
        sent.append(self.topic.num_bytes)
        return start(self)

    monkeypatch.setattr(Exchange, "start", watched)
    return sent


@pytest.mark.ranks(2, 4, timeout_s=60)
@pytest.mark.parametrize("layout", [{"zero": 0}, {"zero": 2, "shard": 2}, {"zero": 3}], ids=str)
def test_a_save_sends_little_and_needs_little_and_a_load_reads_what_it_owns(
    layout: dict[str, Any], num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = large(layout)
    sent = bytes_exchanged(monkeypatch)
    total = 4 * 2**20 * 4 * 3  # master and two moments
    assert peak_growth(lambda: engine.save(tmp_path / "one")) < 16 * 2**20
    assert peak_growth(lambda: engine.save(tmp_path / "two", wait=False)) < total / num_ranks + 16 * 2**20
    engine.wait_for_save()
    assert sent
    assert max(sent) < 2**20
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")

    num_read = 0
    plain_read = ranges.read_into

    def counted(handle: FileIO, buffer: memoryview) -> int:
        nonlocal num_read
        num_read += plain_read(handle, buffer)
        return len(buffer)

    monkeypatch.setattr(ranges, "read_into", counted)
    engine.load(tmp_path / "one")
    owned = 4 * sum(unit.master.numel() * 3 for unit in engine.state.units)
    assert owned - 2**20 < num_read < 1.1 * owned


class Counting(nn.Linear):
    """With a large buffer that only the rank of its stage keeps up to date."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(2**18))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        return super().forward(x)


@pytest.mark.ranks(2)
def test_a_pipeline_sends_little_as_well_and_saves_the_buffers_of_all_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sixfold.initialize(
        nn.Sequential(Counting(), Counting()),
        config={"layout": {"pipe": 2}, "batch": {"micro": 1}},
        loss_fn=lambda output, batch: output.square().mean(),
    )
    engine.train_step(torch.ones(2, 4))
    sent = bytes_exchanged(monkeypatch)
    engine.save(tmp_path / "c")
    assert 0 < max(sent) < 2**20
    found, saved = engine.full_state_dict(), open_checkpoint(tmp_path / "c")
    assert found["1.seen"][0] > 0
    for name, tensor in found.items():
        assert torch.equal(saved.read_model(name), tensor), name
    engine.close()


# In the background.


class Gated(Files):
    """A disk that takes as long as somebody wants it to."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began = threading.Event()

    def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
        self.began.set()
        assert self.gate.wait(15)
        super().write(handle, data, offset)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_slow_disk_on_one_rank_holds_nobody_up(zero: int, num_ranks: int, tmp_path: Path) -> None:
    engine = make({"zero": zero})
    step(engine)
    engine.save(tmp_path / "now")
    slow = Gated()
    if dist.get_rank() == num_ranks - 1:
        engine._saving._files = slow
    engine.save(tmp_path / "later", wait=False)
    for _ in range(10):
        step(engine)
    assert engine._saving.is_under_way
    assert not (tmp_path / "later").exists()
    slow.gate.set()
    engine.wait_for_save()
    assert not engine._saving.is_under_way
    # It holds the state of its own moment.
    assert bytes_of(tmp_path / "later") == bytes_of(tmp_path / "now")
    assert open_checkpoint(tmp_path / "later").step == 1


@pytest.mark.ranks(1, 2)
def test_a_second_save_waits_or_is_refused(num_ranks: int, tmp_path: Path) -> None:
    engine = make({"zero": 1}, checkpoint={"when_busy": "refuse", "asynchronous": True})
    slow = Gated()
    if dist.get_rank() == num_ranks - 1:
        engine._saving._files = slow
    engine.save(tmp_path / "one")
    with pytest.raises(CheckpointError, match="while an earlier save is being written"):
        engine.save(tmp_path / "two")
    slow.gate.set()
    engine.wait_for_save()
    engine.save(tmp_path / "two")
    engine.wait_for_save()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    waiting = make({"zero": 1}, checkpoint={"asynchronous": True})
    slow = Gated()
    threading.Timer(0.2, slow.gate.set).start()
    waiting._saving._files = slow
    waiting.save(tmp_path / "three")
    waiting.save(tmp_path / "four")
    assert (tmp_path / "three").exists()
    waiting.close()
    assert (tmp_path / "four").exists()


class Broken(Files):
    """A disk that fails once asked to."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
        assert self.gate.wait(15)
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.ranks
@pytest.mark.parametrize(("num_ranks", "sick"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 2)])
@pytest.mark.parametrize("surfaces_in", ["step", "save", "close"])
def test_a_failed_writer_is_told_by_every_rank_at_the_same_point(
    surfaces_in: str, sick: int, num_ranks: int, tmp_path: Path
) -> None:
    engine = make({"zero": 3})
    engine.save(tmp_path / "before")
    broken = Broken()
    if dist.get_rank() == sick:
        engine._saving._files = broken
    engine.save(tmp_path / "before", wait=False)
    step(engine)
    broken.gate.set()
    surface = {
        "step": lambda: [step(engine) for _ in range(10_000)],
        "save": lambda: engine.save(tmp_path / "other"),
        "close": engine.close,
    }[surfaces_in]
    with pytest.raises(SaveError, match="Input/output error"):
        surface()
    steps = torch.tensor([float(engine.num_steps)])
    dist.all_reduce(steps)
    assert steps.item() == num_ranks * engine.num_steps
    dist.barrier()
    assert open_checkpoint(tmp_path / "before").step == 0
    if surfaces_in != "close":  # and the run may go on
        engine._saving._files = Files()
        step(engine)
        # Of the same name, while the writers that failed may still be clearing up.
        engine.save(tmp_path / "before")
        assert open_checkpoint(tmp_path / "before").step == engine.num_steps
        dist.barrier()
        assert [path.name for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.ranks(2)
def test_content_that_one_rank_alone_cannot_save_is_refused_by_all(tmp_path: Path) -> None:
    engine = make({"zero": 0})
    if dist.get_rank() == 1:
        engine._last_weight = float("inf")
    with pytest.raises(CheckpointError, match=r"state\.last_weight is inf"):
        engine.save(tmp_path / "c")
    dist.barrier()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks(2)
def test_damage_that_one_rank_alone_reads_is_told_by_all_and_changes_nothing(tmp_path: Path) -> None:
    engine = large({"zero": 2})
    engine.save(tmp_path / "c")
    if dist.get_rank() == 0:
        path = tmp_path / "c" / "optimizer.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    engine.train_step(torch.ones(1, 1024))
    before = engine.full_state_dict()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: crc32"):
        engine.load(tmp_path / "c")
    after = engine.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.num_steps == 2


# Parts of a model, and what is kept.


@pytest.mark.ranks(1, 3)
def test_adapters_alone(num_ranks: int, tmp_path: Path) -> None:
    engine = make({"zero": 1})
    step(engine)
    engine.save(tmp_path / "adapters", only="adapters")
    saved = open_checkpoint(tmp_path / "adapters")
    trained = {name for name, each in Mixed().named_parameters() if each.requires_grad}
    assert set(saved.model_names) == trained | {"head.weight"}
    assert saved.manifest.only == "adapters"
    again = make({"zero": 2})
    again.load(tmp_path / "adapters")
    again.module.seen.fill_(5)
    assert again.num_steps == 1
    assert step(again) == pytest.approx(step(engine), rel=1e-12)
    # A pattern that leaves out something trained comes without state of training.
    engine.save(tmp_path / "inner", only="inner.*")
    part = make({"zero": 0}, seed=2)
    untouched = part.full_state_dict()
    part.load(tmp_path / "inner")
    assert part.num_steps == 0
    found, expected = part.full_state_dict(), engine.full_state_dict()
    for name in found:
        assert torch.equal(found[name], (expected if name.startswith("inner") else untouched)[name]), name
    with pytest.raises(CheckpointError, match="fits none of"):
        engine.save(tmp_path / "none", only="lora_*")
    with pytest.raises(CheckpointError, match="all 4 parameters are trained"):
        large({"zero": 0}).save(tmp_path / "none", only="adapters")


@pytest.mark.ranks(2)
def test_the_newest_and_every_so_manieth_are_kept(tmp_path: Path) -> None:
    engine = make({"zero": 1})
    for _ in range(7):
        step(engine)
        engine.save(tmp_path / f"step-{engine.num_steps}", wait=False, keep=Keep(2, every=3))
    engine.wait_for_save()
    assert {path.name for path in tmp_path.iterdir()} == {"step-3", "step-6", "step-7"}


@pytest.mark.ranks(1, 3)
def test_a_rehearsal_notices_what_a_save_would_and_leaves_nothing(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make({"zero": 2})
    engine.rehearse_save(tmp_path)
    dist.barrier()
    assert list(tmp_path.iterdir()) == []
    # The forecast is what a save comes to once the optimizer has its state, but for headers and counters.
    asked: list[int] = []
    monkeypatch.setattr(type(engine._saving), "rehearse", lambda self, folder, needed: asked.append(needed))
    engine.rehearse_save(tmp_path)
    monkeypatch.undo()
    step(engine)
    engine.save(tmp_path / "c")
    tensors = sum(entry.stop - entry.start for entry in open_checkpoint(tmp_path / "c").manifest.tensors)
    num_scalars = sum(len(keys) - 2 for keys in engine.bound.state_specs().values())
    assert asked == [tensors - 4 * num_scalars]
    with pytest.raises(SaveError, match="takes 1024"):
        engine._saving.rehearse(tmp_path, 2**40)
    dist.barrier()
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/\.rehearsal failed"):
        engine.rehearse_save(tmp_path / "file")


@pytest.mark.ranks(2)
def test_a_folder_that_hosts_do_not_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_REHEARSAL_LIMIT_S", 0.3)
    engine = make({"zero": 0})
    with pytest.raises(SaveError, match="did not find each other's files"):
        engine.rehearse_save(tmp_path / f"host-{dist.get_rank()}")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("differs", ["socket.gethostname", "tempfile.gettempdir"])
def test_ranks_without_a_common_temporary_folder_cannot_save_behind_a_url(
    differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make({"zero": 0})
    monkeypatch.setattr(differs, lambda: f"/{dist.get_rank()}")
    for save in (engine.save, engine.rehearse_save):
        with pytest.raises(CheckpointError, match=r"common temporary folder: rank 0: .*/0.*, rank 1: .*/1"):
            save("memory://bucket/c")


# A peer's folder.


@pytest.mark.ranks(2)
def test_what_fsdp2_saved_goes_on_here(tmp_path: Path) -> None:
    """A model cut by rows over two ranks, saved by torch.distributed.checkpoint, against its next steps."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    x = torch.arange(24.0).view(4, 6).sin()
    mine = x[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    model = fully_shard(build(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def peer_step() -> float:
        optimizer.zero_grad()
        loss = model(mine).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / 2

    for _ in range(2):
        peer_step()
    states, optimizer_states = get_state_dict(model, optimizer)
    dcp.save({"model": states, "optim": optimizer_states}, checkpoint_id=tmp_path / "dcp")
    if dist.get_rank() == 0:
        import_folder(tmp_path / "dcp", tmp_path / "native")
    dist.barrier()
    fresh = build()
    made = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    engine = sixfold.initialize(
        fresh,
        config={"layout": {"zero": 2}},
        optimizer=made,
        loss_fn=lambda output, batch: output.square().mean(),
    )
    engine.load(tmp_path / "native")
    for name, tensor in states.items():
        assert torch.equal(engine.full_state_dict()[name], tensor.full_tensor()), name
    assert engine.num_steps == 2
    for _ in range(2):  # the second one shows that the moments came along
        assert engine.train_step((mine,)) == pytest.approx(peer_step(), rel=1e-6)
