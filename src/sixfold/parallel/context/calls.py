"""Attention of an unmodified model, answered by another function while one of its modules runs.

torch's `scaled_dot_product_attention` is looked up in `torch.nn.functional` by models and by torch's own
modules alike. While an engine needs it, a function stands there that asks which module of whom is running in
this thread: outside of such modules torch's own answers. Forwards of modules say that they run, so it holds
as well when backward runs them again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sixfold.parallel.blocks import has_operations, own_forward, put_forward
from sixfold.parallel.recompute import Forward

Attend = Callable[..., Tensor]
"""Takes what `scaled_dot_product_attention` takes."""

_NAME = "scaled_dot_product_attention"
_own: Attend = F.scaled_dot_product_attention


class _Running(threading.local):
    attend: Attend | None = None


_running = _Running()
_lock = threading.Lock()
_users: dict[object, bool] = {}
"""Who needs it, and whether torch's fused layers were on before them: those would not ask."""


@functools.wraps(_own)
def _answer(*args: Any, **kwargs: Any) -> Tensor:
    return (_running.attend or _own)(*args, **kwargs)


def answer_calls(model: nn.Module, attend: Callable[[], Attend | None]) -> Callable[[], None]:
    """Have `attend()` answer calls of attention inside the modules of `model`; returns what ends it.

    Args:
        attend: gives what answers, each time that a module runs; None: torch's own.
    """
    # Single layers of torch attend to nothing.
    modules = [module for module in model.modules() if has_operations(module)]
    forwards = ExitStack()
    made: dict[Forward, Forward] = {}
    for module in modules:
        own = own_forward(module)
        if own not in made:
            made[own] = _marked(own, attend)
        forwards.callback(put_forward(module, MethodType(made[own], module)))
    user = object()
    with _lock:
        _users[user] = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(value=False)
        setattr(F, _NAME, _answer)

    def undo() -> None:
        with _lock:
            was_fast = _users.pop(user)
            if _users:  # the first of them knows what it was
                _users[next(iter(_users))] |= was_fast
            else:
                setattr(F, _NAME, _own)
                torch.backends.mha.set_fastpath_enabled(value=was_fast)
        forwards.close()

    return undo


def _marked(own: Forward, attend: Callable[[], Attend | None]) -> Forward:
    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer, _running.attend = _running.attend, attend()
        try:
            return own(self, *args, **kwargs)
        finally:
            _running.attend = outer

    return forward
