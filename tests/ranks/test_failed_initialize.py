"""What an `initialize` that fails late leaves behind: nothing that keeps a further one from working."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim import SGD

import sixfold
from sixfold.base.errors import StateError
from sixfold.engine import Engine
from sixfold.models.decoder import Decoder, DecoderConfig

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def model_of() -> nn.Module:
    torch.manual_seed(3)
    return Decoder(DecoderConfig(24, 10, 8, num_layers=3, num_heads=2, num_kv_heads=2, ffn_width=12))


def changes_of(model: nn.Module) -> list[str]:
    """What of a model is not as its classes make it."""
    found = [f"{name}.forward" for name, part in model.named_modules() if "forward" in vars(part)]
    found += [f"{name}.{kind}" for name, part in model.named_modules() for kind in HOOKS if vars(part)[kind]]
    return found + [
        name for name, each in model.named_parameters() if getattr(each, "_post_accumulate_grad_hooks", None)
    ]


def engine_of(model: nn.Module, layout: dict[str, Any], **options: Any) -> Engine:
    return sixfold.initialize(model, config={"layout": layout}, **options)


def too_few(parameters: Iterable[nn.Parameter]) -> SGD:
    return SGD([next(iter(parameters))], lr=0.1)


def all_of_them(parameters: Iterable[nn.Parameter]) -> SGD:
    return SGD(parameters, lr=0.1)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("at", "layout"),
    [
        ("optimizer", {"tensor": 2, "recompute": "full"}),
        ("optimizer", {"context": 2}),
        ("bind", {"data": 2, "zero": 1, "recompute": "full"}),
    ],
)
def test_a_corrected_call_works_as_if_it_were_the_first(at: str, layout: dict[str, Any]) -> None:
    module: Any = sys.modules["sixfold.engine.initialize"]

    def fail(*_: Any) -> None:
        raise StateError("made to fail", rule="it fails", fix="nothing")

    model, tokens = model_of(), torch.arange(40).view(4, 10) % 24
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sixfold.engine.watch._store", lambda address: HashStore())
        if at == "bind":
            patch.setattr(module, "bind", fail)
        with pytest.raises(StateError):
            engine_of(model, layout, optimizer=too_few if at == "optimizer" else all_of_them)
    assert "sixfold-watcher" not in [thread.name for thread in threading.enumerate()]
    assert changes_of(model) == []
    again, first = (
        engine_of(model, layout, optimizer=all_of_them),
        engine_of(model_of(), layout, optimizer=all_of_them),
    )
    for engine in (again, first):
        engine.train_step({"tokens": tokens})
    assert again.train_step({"tokens": tokens}) == first.train_step({"tokens": tokens})
    again.close()
    first.close()
    assert changes_of(model) == []
