"""Which GPU a rank takes, whatever a scheduler lets it see."""

from __future__ import annotations

import pytest
import torch

from sixfold.base.errors import ConfigError
from sixfold.engine.device import own_device
from sixfold.launch import Placement


def rank(local_rank: int) -> Placement:
    return Placement(4 + local_rank, 8, local_rank, 4, "host", 1234, "slurm")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Torch's current device, each time that it is set, on a machine that seems to have GPUs."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("asked", [None, "cuda", torch.device("cuda")])
@pytest.mark.parametrize(
    ("num_visible", "placement", "index"),
    [
        (4, rank(0), 0),
        (4, rank(3), 3),
        (1, rank(0), 0),
        (1, rank(3), 0),  # Slurm with one GPU bound to each task
        (4, None, 2),
    ],
)
def test_a_rank_takes_its_own_gpu(
    num_visible: int,
    placement: Placement | None,
    index: int,
    asked: torch.device | str | None,
    chosen: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    if num_visible == 1:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5")
    assert own_device(asked, placement) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


def test_a_gpu_that_is_named_is_taken(chosen: list[torch.device]) -> None:
    assert own_device("cuda:1", rank(3)) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize("asked", ["cpu", "meta"])
def test_other_devices_are_no_concern(asked: str, chosen: list[torch.device]) -> None:
    assert own_device(asked, rank(3)) == torch.device(asked)
    assert chosen == []


@pytest.mark.parametrize("num_visible", [1, 2])
def test_more_ranks_than_gpus_are_refused(
    num_visible: int, chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=rf"local rank 3 of 4 .* {num_visible} GPU") as caught:
        own_device("cuda", rank(3))
    assert f"at most {num_visible} rank(s)" in caught.value.fix
    assert chosen == []
