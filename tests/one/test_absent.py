"""A parameter that has been dropped has no memory: whatever touches it says so, and nothing crashes.

Each touch runs in a fork of its own, since reading freed memory would end the process.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sixfold
from sixfold.engine import Engine

Touch = Callable[[nn.Sequential, nn.Parameter], Any]


def _with_gradient(parameter: nn.Parameter) -> nn.Parameter:
    parameter.grad = torch.zeros(4, 4)
    return parameter


def _assigned(parameter: nn.Parameter) -> None:
    parameter.data = torch.zeros(4, 4)


@torch.no_grad()
def _multiplied(parameter: nn.Parameter) -> None:
    parameter.mul_(2)


@torch.no_grad()
def _set(model: nn.Sequential, parameter: nn.Parameter) -> None:
    parameter.set_(torch.zeros(4, 4))  # type: ignore[call-overload]  # torch asks no class here
    model(torch.ones(2, 4))


def three() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


TOUCHES: dict[str, Touch] = {
    "sum": lambda m, p: p.sum(),
    "clone": lambda m, p: p.clone(),
    "print": lambda m, p: print(p),
    "mul_": lambda m, p: _multiplied(p),
    "copy_": lambda m, p: p.copy_(torch.ones(4, 4)),
    "out=": lambda m, p: torch.add(torch.ones(4, 4), 1, out=p),
    "init": lambda m, p: nn.init.zeros_(p),
    "reset": lambda m, p: m[0].reset_parameters(),  # type: ignore[operator]
    "numpy": lambda m, p: p.detach().numpy(),
    "asarray": lambda m, p: np.asarray(p),
    "ufunc": lambda m, p: np.add(np.ones((4, 4)), p),  # type: ignore[call-overload]
    "deepcopy": lambda m, p: copy.deepcopy(p),
    "deepcopy of the model": lambda m, p: copy.deepcopy(m),
    "state_dict": lambda m, p: m.state_dict(),
    "load_state_dict": lambda m, p: m.load_state_dict(
        nn.Sequential(*(nn.Linear(4, 4) for _ in m)).state_dict()
    ),
    "pickle": lambda m, p: pickle.dumps(p),
    "pickle of the model": lambda m, p: pickle.dumps(m),
    "torch.save": lambda m, p: torch.save(p, io.BytesIO()),
    "index": lambda m, p: p[0],
    "assigned item": lambda m, p: p.__setitem__(0, 1.0),
    "iteration": lambda m, p: list(p),
    "float": lambda m, p: float(p),
    "item": lambda m, p: p.item(),
    "bool": lambda m, p: bool(p),
    "tolist": lambda m, p: p.tolist(),
    "linear": lambda m, p: F.linear(torch.ones(2, 4), p),
    "matmul": lambda m, p: torch.ones(2, 4) @ p,
    "stack": lambda m, p: torch.stack([p, p]),
    "vector": lambda m, p: nn.utils.parameters_to_vector(m.parameters()),
    ".data": lambda m, p: p.data,
    "assigned .data": lambda m, p: _assigned(p),
    "to": lambda m, p: p.to(torch.bfloat16),
    "to of the model": lambda m, p: m.to(torch.bfloat16),
    "view": lambda m, p: p.view(-1),
    "compare": lambda m, p: torch.equal(p, p),
    "storage": lambda m, p: p.untyped_storage(),
    "data_ptr": lambda m, p: p.data_ptr(),
    "share_memory_": lambda m, p: p.share_memory_(),
    "another optimizer": lambda m, p: torch.optim.SGD([_with_gradient(p)], lr=0.1).step(),
    "Parameter of it": lambda m, p: nn.Parameter(p),
    "zeros_like": lambda m, p: torch.zeros_like(p),
    "from_dlpack": lambda m, p: torch.from_dlpack(p),
    "weight norm": lambda m, p: nn.utils.parametrizations.weight_norm(m[0]),
    "copy": lambda m, p: copy.copy(p),
    "format": lambda m, p: f"{p}",
    "in-place operator": lambda m, p: p.__iadd__(1),
    "transposed": lambda m, p: p.T,
    "foreach": lambda m, p: torch._foreach_norm(list(m.parameters())),
    "as_tensor": lambda m, p: torch.as_tensor(p).sum(),
    "other numbers": lambda m, p: _set(m, p),
    "averaged model": lambda m, p: torch.optim.swa_utils.AveragedModel(m),
    "functional call": lambda m, p: torch.func.functional_call(m[0], {"weight": p}, torch.ones(2, 4)),
    "stacked state": lambda m, p: torch.func.stack_module_state([m[0], m[1]]),
    "the block alone": lambda m, p: m[0](torch.ones(2, 4)),
}
"""By what a user might do: the model and one of its parameters."""

HARMLESS: dict[str, Touch] = {
    "shape": lambda m, p: (p.shape, p.dtype, p.device, p.ndim, len(p), p.requires_grad, p.is_leaf),
    "count": lambda m, p: sum(each.numel() * each.element_size() for each in m.parameters()),
    "names": lambda m, p: [name for name, _ in m.named_parameters()],
    "gradient": lambda m, p: p.grad,
    "clipping": lambda m, p: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    "repr of the model": lambda m, p: repr(m),
    "hash": lambda m, p: (p in {p}, isinstance(p, nn.Parameter)),
    "hook": lambda m, p: p.register_hook(lambda grad: grad).remove(),
    "the model as a whole": lambda m, p: m(torch.ones(2, 4)),
}


@pytest.fixture
def engine() -> Engine:
    """Of one rank: preset 3 drops there too."""
    return sixfold.initialize(three(), config={"layout": {"zero": 3}}, loss_fn=lambda out, batch: out.mean())


def outcome(touch: Touch, engine: Engine) -> str:
    """What became of it in a fork: "" or the error's text; how the fork ended if it did not end well."""
    model: Any = engine.module
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            touch(model, model[0].weight)
            text = ""
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"ended with status {status}"


SAID = {"linear": "linear", ".data": "data", "assigned .data": "data", "sum": "sum"}


@pytest.mark.parametrize("name", TOUCHES)
def test_a_touch_says_what_to_do(name: str, engine: Engine) -> None:
    text = outcome(TOUCHES[name], engine)
    assert ("0.weight: " + SAID[name] if name in SAID else "0.weight") in text
    if name == "load_state_dict":  # torch makes an error of its own out of these, with what was given alone
        assert "0.weight: copy outside of its forward and backward" in text
        return
    assert text.startswith("StateError")
    assert "engine.gathered()" in text


@pytest.mark.parametrize("name", HARMLESS)
def test_what_needs_no_numbers_goes_on(name: str, engine: Engine) -> None:
    assert outcome(HARMLESS[name], engine) == ""


def test_a_crash_would_be_seen(engine: Engine) -> None:
    assert (
        outcome(lambda m, p: os.kill(os.getpid(), signal.SIGKILL), engine)
        == f"ended with status {int(signal.SIGKILL)}"
    )


def test_what_is_kept_of_gathered_parameters_keeps_its_numbers(engine: Engine) -> None:
    def touch(model: nn.Module, parameter: nn.Parameter) -> None:
        with engine.gathered():
            kept = {**model.state_dict(), "a view": parameter.detach()[0]}
            copies = {name: numbers.clone() for name, numbers in kept.items()}
        engine.train_step((torch.ones(2, 4),))
        assert all(torch.equal(kept[name], numbers) for name, numbers in copies.items())

    assert outcome(touch, engine) == ""


def test_a_gathered_parameter_is_itself_again(engine: Engine) -> None:
    model: Any = engine.module
    parameter = model[0].weight
    before = type(parameter)
    assert before is not nn.Parameter
    assert isinstance(parameter, nn.Parameter)
    with engine.gathered():
        assert type(parameter) is nn.Parameter
        assert parameter is model[0].weight
        assert torch.equal(copy.deepcopy(model)[0].weight, parameter)
    assert type(parameter) is before
