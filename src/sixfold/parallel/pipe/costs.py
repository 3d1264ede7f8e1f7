"""What the parts of a model cost in comparison: estimated from shapes, or measured by running them once.

Called where a model is cut into stages. A measurement leaves parameters, gradients, buffers and forwards as
they were; what the ranks make of its figures is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sixfold.parallel.blocks import put_forward
from sixfold.parallel.pipe.parts import Parts
from sixfold.plan import BlockCosts

NUM_RUNS = 3
"""Of which each part's fastest counts: the first one of all makes what later ones find made."""


def estimated_costs(model: nn.Module, parts: Parts) -> BlockCosts:
    """Parameters that a token is multiplied with; a table that is only looked up counts as one row."""

    def cost(name: str, *, is_lookup: bool = True) -> float:
        total = 0.0
        for module in model.get_submodule(name).modules():
            if is_lookup and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                total += module.embedding_dim
            else:
                total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        return total

    return BlockCosts(
        tuple(map(cost, parts.blocks)),
        sum(map(cost, parts.before)),
        sum(cost(name, is_lookup=False) for name in parts.after),
    )


def measured_costs(
    model: nn.Module,
    parts: Parts,
    run: Callable[[Callable[..., Any]], Tensor],
    *,
    device: torch.device,
    compute: torch.dtype | None,
) -> BlockCosts:
    """Seconds of a forward and a backward of each part, on this rank.

    Each part is run by the model's own forward, and backward by itself right behind, so no more is kept than
    one part needs. What the model computes outside of its parts, its loss above all, counts as behind the
    blocks. For its time the model is there once more where `device` or `compute` are not its own.

    Args:
        run: calls the function it is given, which stands for the model, with a micro-batch of the real shape,
            and returns the loss.
        compute: type of forward and backward; None: that of the parameters.
    """
    tensors = {
        name: _copied(tensor, device, compute if isinstance(tensor, nn.Parameter) else None)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    best: dict[str, float] = {}
    for _ in range(NUM_RUNS):
        stopwatch = _Stopwatch(device)
        with _wrapped(model, parts, stopwatch.timed):
            began = stopwatch.now()
            loss = run(lambda *args, **kwargs: functional_call(model, tensors, args, kwargs))
            _backward(loss, [*tensors.values(), *stopwatch.leaves])
            rest = stopwatch.now() - began - sum(stopwatch.seconds.values())
        for name, seconds in {**stopwatch.seconds, _REST: rest}.items():
            best[name] = min(seconds, best.get(name, seconds))
    blocks = [best.get(name, 0.0) for name in parts.blocks]
    before = {name: best.get(name, 0.0) for name in parts.before}
    after = best[_REST] + sum(best.get(name, 0.0) for name in parts.after if name not in before)
    if not parts.after:  # nothing stands behind the blocks that could be a stage of its own
        blocks[-1] += after
        after = 0.0
    return BlockCosts(tuple(blocks), sum(before.values()), after)


def on_meta(model: nn.Module, compute: torch.dtype | None) -> Callable[..., Any]:
    """A function that stands for the model, with arguments and all its tensors on the meta device.

    Args:
        compute: as for `measured_costs`.
    """
    tensors = {
        name: torch.empty_like(
            tensor, device="meta", dtype=compute if isinstance(tensor, nn.Parameter) else None
        )
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return lambda *args, **kwargs: functional_call(model, tensors, args, kwargs)


def handed_bytes(model: nn.Module, parts: Parts, run: Callable[[], object]) -> dict[str, int]:
    """Bytes of what each part up to the last block returns for a micro-batch.

    Args:
        run: runs the model with a micro-batch on meta; see `on_meta`.
    """
    found: dict[str, int] = {}

    def noting(names: list[str], part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run_part(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            found.update(dict.fromkeys(names, sum(each.nbytes for each in _tensors(output))))
            if parts.blocks[-1] in names:
                raise _Enough
            return output

        return run_part

    with _wrapped(model, parts, noting), torch.no_grad(), suppress(_Enough):
        run()
    return found


class _Enough(Exception):
    """The last block has run; what comes behind it, such as a loss, may look at numbers."""


@contextmanager
def _wrapped(
    model: nn.Module,
    parts: Parts,
    wrap: Callable[[list[str], nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Inside, parts run by what `wrap` makes of their names, themselves and their forward."""
    names: dict[nn.Module, list[str]] = {}
    for name in dict.fromkeys((*parts.before, *parts.blocks, *parts.after)):
        names.setdefault(model.get_submodule(name), []).append(name)
    with ExitStack() as undo:
        for part, its_names in names.items():
            undo.callback(put_forward(part, wrap(its_names, part, part.forward)))
        yield


_REST = ""
"""Stands for what is computed outside of all parts."""


def _copied(tensor: Tensor, device: torch.device, compute: torch.dtype | None) -> Tensor:
    """A leaf of its own for a parameter, in memory of its own where it has another type or place; a copy of a
    buffer, which a forward may change."""
    is_parameter = isinstance(tensor, nn.Parameter)
    own = tensor.detach().to(device, compute).contiguous()
    return own.requires_grad_(tensor.requires_grad) if is_parameter else own.clone()


def _backward(outputs: Any, wanted: list[Tensor]) -> None:
    """Gradients of what an output comes from, thrown away."""
    roots = [each for each in _tensors(outputs) if each.requires_grad]
    leaves = [each for each in wanted if each.requires_grad]
    if roots and leaves:
        torch.autograd.grad(roots, leaves, [torch.ones_like(each) for each in roots], allow_unused=True)


@dataclass
class _Stopwatch:
    """Times parts as a model's forward comes to them.

    Args:
        seconds: of each part that has run.
        leaves: what the last part has handed on.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)

    def now(self) -> float:
        """Seconds, when all that was started is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def timed(self, names: list[str], part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that is timed, and its backward with it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            output = forward(*args, **kwargs)
            _backward(output, [*_tensors((args, kwargs)), *part.parameters()])
            handed = _handed(output)
            self.leaves = [each for each in _tensors(handed) if each.requires_grad]
            share = (self.now() - began) / len(names)  # a module that stands at several places is run at each
            self.seconds.update({name: self.seconds.get(name, 0.0) + share for name in names})
            return handed

        return run


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _handed(value: Any) -> Any:
    """The same numbers, as leaves of what comes next."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _handed(each) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_handed, value))
    return value
