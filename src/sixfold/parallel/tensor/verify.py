"""Whether a model that is cut gives the numbers of the whole one: tried in one process, on a small model.

Threads stand for the ranks of the axis, each with a copy that is cut as its rank's would be. Outputs or loss,
and every gradient put together from its pieces, are compared. Called for all that a model's own plan does
not declare; it never touches the model that is trained.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import SixfoldError
from sixfold.parallel.pieces import piece_of, put_piece
from sixfold.parallel.tensor.crossing import Axis
from sixfold.parallel.tensor.cut import Rules, TensorCut, decide_tensor, in_lists, in_sequence
from sixfold.parallel.tensor.forwards import TensorForwards
from sixfold.plan.places import Place

TOLERANCE = 1e-5
"""Largest difference, as a part of the largest number compared with (of all gradients, and of the output)."""
PATIENCE_S = 60.0

Inputs = Mapping[str, Any]


class _Done:
    def wait(self) -> None:
        """Nothing is under way any more."""


class Meeting:
    """Where the threads of one trial exchange tensors."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=PATIENCE_S)
        self._given: list[Tensor | None] = [None] * num_ranks

    def exchange(self, place: int, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor."""
        self._given[place] = tensor.detach().clone()
        self.barrier.wait()
        found = [each for each in self._given if each is not None]
        self.barrier.wait()
        if len({each.shape for each in found}) > 1:
            raise ValueError(f"ranks exchange {', '.join(str(len(each)) for each in found)} numbers")
        return found


class Seat:
    """One thread's place in a meeting: what a `Group` is to a rank."""

    def __init__(self, meeting: Meeting, place: int) -> None:
        self._meeting = meeting
        self.num_ranks, self.place = meeting.num_ranks, place

    def all_reduce(self, whole: Tensor) -> _Done:
        """See `Group`."""
        whole.copy_(torch.stack(self._meeting.exchange(self.place, whole)).sum(0))
        return _Done()

    def all_gather(self, whole: Tensor) -> _Done:
        """See `Group`."""
        parts = self._meeting.exchange(self.place, whole.view(self.num_ranks, -1)[self.place])
        whole.copy_(torch.cat(parts))
        return _Done()

    def reduce_scatter(self, whole: Tensor) -> _Done:
        """See `Group`."""
        return self.all_reduce(whole)


def put_together(pieces: Sequence[tuple[Tensor, Place | None]], axis: str) -> Tensor:
    """The whole gradient from those of all ranks.

    Raises:
        ValueError: it is said to be whole on each of them, and they differ.
    """
    first, place = pieces[0]
    if place is None or axis not in (*place.axes, *place.partial):
        if any(not torch.equal(first, other) for other, _ in pieces):
            raise ValueError("is whole on every rank, with gradients that differ")
        return first
    if axis in place.partial:
        return torch.stack([piece for piece, _ in pieces]).sum(0)
    whole = first.new_zeros(place.shape)
    for piece, where in pieces:
        assert where is not None, "cut on one rank, so on all"
        put_piece(whole, where, piece)
    return whole


def difference(
    model: nn.Module, inputs: Inputs, rules: Rules, num_ranks: int, blocks: Sequence[str] = ()
) -> str | None:
    """What keeps `model`, cut over `num_ranks`, from giving its own numbers; None where nothing does.

    Args:
        model: small, with weights; left as it is.
        inputs: keyword arguments of its forward.
        blocks: those between which each rank keeps its part of the sequence alone; none for no such.
    """
    whole = copy.deepcopy(model).eval()
    try:
        expected = _pass(whole, inputs)
    except Exception as error:
        return f"it does not run on its own: {_short(error)}"
    try:
        cuts = [
            in_sequence(decide_tensor(model, rules, num_ranks, place), model, blocks)
            for place in range(num_ranks)
        ]
    except SixfoldError as error:
        return f"{error.given.partition(': ')[2] or error.given}; {error.rule}"
    results = _on_threads(num_ranks, lambda axis: _trial(model, cuts[axis.place], inputs, axis, blocks))
    failed = [each for each in results if isinstance(each, Exception)]
    if failed:
        own = [each for each in failed if not isinstance(each, threading.BrokenBarrierError)]
        if not own:
            return f"a rank waited {PATIENCE_S:g} s for the others, which exchange less often or are slow"
        return f"its forward or backward fails: {_short(own[0])}"
    outputs = [output for output, _ in results]
    off = max(_off(output, expected[0]) for output in outputs)
    if off > TOLERANCE:
        return f"its output differs by {off:.1e}"
    most = max((float(each.abs().max()) for each in expected[1].values() if each.numel()), default=0.0)
    for name, gradient in expected[1].items():
        try:
            found = put_together(
                [(grads[name], cut.places.get(name)) for (_, grads), cut in zip(results, cuts, strict=True)],
                "tensor",
            )
        except ValueError as error:
            return f"{name} {error}"
        off = float((found - gradient).abs().max()) / (most or 1.0) if gradient.numel() else 0.0
        if not off <= TOLERANCE:
            return f"the gradient of {name} differs by {off:.1e}"
    return None


def _short(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def _off(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    most = float(expected.abs().max()) if expected.numel() else 0.0
    off = float((found - expected).abs().max()) / (most or 1.0) if expected.numel() else 0.0
    return off if off == off else float("inf")


def _trial(
    model: nn.Module, cut: TensorCut, inputs: Inputs, axis: Axis, blocks: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    part = copy.deepcopy(model).eval()
    for name, parameter in part.named_parameters():
        if name in cut.places:
            parameter.data = piece_of(parameter.data, cut.places[name])
    forwards = TensorForwards(part, cut, axis, in_lists(blocks))
    try:
        return _pass(part, inputs)
    finally:
        forwards.remove()


def _pass(model: nn.Module, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Output (or loss) and gradients; those of an output are weighted by fixed random numbers."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    found = loss[None] if isinstance(loss, Tensor) else _first_tensor(output)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(found.shape, generator=draw, dtype=found.dtype)
    torch.autograd.backward((found * weight).sum())
    return found.detach(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    return next(each for each in values if isinstance(each, Tensor) and each.is_floating_point())


def _on_threads(num_ranks: int, run: Callable[[Axis], Any]) -> list[Any]:
    meeting, results = Meeting(num_ranks), list[Any]([None] * num_ranks)

    def body(place: int) -> None:
        try:
            results[place] = run(Seat(meeting, place))
        except Exception as error:
            results[place] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=body, args=(place,)) for place in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
