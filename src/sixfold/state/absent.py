"""What a parameter is while its numbers are not on this rank: shape, type and name, and no numbers.

`Presence` gives the parameters of a unit this class when their numbers go and their own class back when they
come. Reading freed memory would end the process without a word; a parameter of this class raises
instead and says what to do. It frees and gathers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.base.errors import StateError

_HARMLESS = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("shape", "dtype", "device", "layout", "ndim", "names", "is_leaf", "requires_grad", "grad"),
                *("grad_fn", "grad_dtype", "retains_grad", "itemsize", "nbytes", "is_meta", "is_sparse"),
                *("is_cuda", "is_cpu", "is_quantized", "_version", "_backward_hooks"),
            )
            if hasattr(Tensor, name)
        ),
        *(
            getattr(Tensor, name).__set__
            for name in ("requires_grad", "grad", "grad_dtype")
            if hasattr(Tensor, name)
        ),
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
        *(Tensor.storage_offset, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex),
        *(Tensor.is_contiguous, Tensor.requires_grad_, Tensor.register_hook, Tensor.__len__),
        *(Tensor.register_post_accumulate_grad_hook, torch.is_floating_point, torch.is_complex, torch.numel),
    }
)
"""What is asked about a tensor without its numbers."""

DROPPED = (
    "outside of its forward and backward",
    "with cut parameters (layout.zero = 3) a rank has a parameter's numbers only while the block that holds "
    "it runs",
    "read and edit inside `with engine.gathered():`, or take engine.full_state_dict(); call the model as a "
    "whole; name what runs on its own in layout.blocks",
)
ELSEWHERE = (
    "on a rank that has other stages",
    "in a pipeline (layout.pipe) a rank has the numbers of its own stages alone",
    "read and edit inside `with engine.gathered():`, or take engine.full_state_dict(); train with "
    "engine.train_step and evaluate with engine.eval_step",
)
CLOSED = (
    "after engine.close()",
    "with cut parameters (layout.zero = 3) a rank has its slice alone, and a closed engine gathers no more",
    "use engine.full_state_dict() or engine.save(folder) before engine.close(), and load it into a new model",
)
"""Why there are none: where, the rule, and a change that works."""


class Absent(nn.Parameter):
    """Base of the classes that `absent_class` makes; has no instances of its own."""

    names: Mapping[int, str] = {}
    """By `id`, of the parameters that one unit holds."""
    why: tuple[str, str, str] = DROPPED

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _HARMLESS:
            return nn.Parameter.__torch_function__(func, types, args, dict(kwargs or {}))  # type: ignore[no-untyped-call]
        what = getattr(func, "__name__", str(func))
        if what in ("__get__", "__set__"):
            what = func.__self__.__name__  # type: ignore[attr-defined]
        raise StateError(
            f"{_touched(cls, args, kwargs)}: {what.strip('_')} {cls.why[0]}", rule=cls.why[1], fix=cls.why[2]
        )


def _touched(cls: type[Absent], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> str:
    given = [*args, *(kwargs or {}).values()]
    flat = [each for one in given for each in (one if isinstance(one, list | tuple) else (one,))]
    return next((cls.names[id(each)] for each in flat if id(each) in cls.names), "a dropped parameter")


def absent_class(
    parameter: nn.Parameter, names: Mapping[int, str], why: tuple[str, str, str] = DROPPED
) -> type[Absent]:
    """The class that `parameter` has while it has no numbers.

    Args:
        names: by `id`, of the parameters that have none together.
        why: `DROPPED` or `ELSEWHERE`.
    """
    kind = type(parameter)
    bases = (Absent,) if kind is nn.Parameter else (Absent, kind)
    return type("Absent", bases, {"names": names, "why": why, "__module__": __name__})
