"""One layer of experts, dealt out over all ranks: ours against those of DeepSpeed and FairScale.

Run by `axes.py`. Every contestant has the same gated experts and two choices for each token. Ours drops no
token; theirs take as many tokens as an equal share, and drop the rest, which is less to compute; DeepSpeed's
is asked to keep all as well.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.config import LayoutConfig
from sixfold.mesh import Mesh
from sixfold.models.layers import FeedForward
from sixfold.models.moe import ExpertsConfig, MixtureOfExperts
from sixfold.parallel.change import Case
from sixfold.parallel.expert.axis import decide_expert
from sixfold.plan import Geometry, dispatch_traffic
from sixfold.testing.exchanges import noted_exchanges

SAMPLES, LENGTH, WIDTH, FFN_WIDTH, NUM_EXPERTS, CHOICES = 4, 512, 256, 512, 8, 2

_facts: dict[str, Any] = {}


def facts() -> dict[str, Any]:
    """What was sent in one turn, counted by the dispatcher, and the formula where load is even."""
    return _facts


def contestants(rank: int, num_ranks: int) -> dict[str, Callable[[], None] | str]:
    torch.manual_seed(rank)
    x = torch.randn(SAMPLES, LENGTH, WIDTH)
    made: dict[str, Callable[[], None] | str] = {}
    for transport in ("host", "network"):
        made[f"sixfold, {transport}"] = turn_of(ours(rank, num_ranks, transport), x)
    others: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
        "DeepSpeed": deepspeed,
        "DeepSpeed, all tokens": functools.partial(deepspeed, drops=False),
        "FairScale": fairscale,
    }
    for name, make in others.items():
        try:
            turn = turn_of(make(num_ranks), x)
            turn()
            made[name] = turn
        except Exception as error:
            made[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return made


def turn_of(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def turn() -> None:
        layer(x.clone().requires_grad_()).square().mean().backward()

    return turn


def ours(rank: int, num_ranks: int, transport: str) -> Callable[[Tensor], Tensor]:
    geometry = Geometry(
        (("pipe", 1), ("data", num_ranks), ("context", 1), ("tensor", 1)), num_ranks, num_ranks
    )
    mesh = Mesh(geometry, rank, torch.device("cpu")).sharing(transport, exchange_bytes=2**28, timeout_s=60)
    torch.manual_seed(0)
    layer = MixtureOfExperts(WIDTH, FFN_WIDTH, ExpertsConfig(NUM_EXPERTS, num_choices=CHOICES))
    change = decide_expert(Case(layer, LayoutConfig(expert=num_ranks), geometry, rank))
    for name, place in change.places.items():
        parameter = layer.get_parameter(name)
        ((start, stop),) = place.spans[0]
        parameter.data = parameter.data[start:stop].clone()
    change.apply(mesh)
    if transport == "host":
        count(layer, geometry)
    return layer


def count(layer: nn.Module, geometry: Geometry) -> None:
    with noted_exchanges() as topics:
        turn_of(layer, torch.randn(SAMPLES, LENGTH, WIDTH))()
    _facts["bytes sent by rank 0 in a turn"] = sum(topic.num_bytes for topic in topics)
    _facts["formula for even load"] = dispatch_traffic(
        geometry,
        choices=SAMPLES * LENGTH * CHOICES,
        num_experts=NUM_EXPERTS,
        width=WIDTH,
        dtype="fp32",
    )


def deepspeed(num_ranks: int, *, drops: bool = True) -> Callable[[Tensor], Tensor]:
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed("gloo")
        expert = FeedForward(WIDTH, FFN_WIDTH)
        layer = MoE(WIDTH, expert, NUM_EXPERTS, ep_size=num_ranks, k=CHOICES, drop_tokens=drops)
        layer.set_deepspeed_parallelism()
    return lambda x: layer(x)[0]  # type: ignore[no-any-return]


def fairscale(num_ranks: int) -> Callable[[Tensor], Tensor]:
    from fairscale.nn.moe import MOELayer, Top2Gate

    experts = nn.ModuleList(FeedForward(WIDTH, FFN_WIDTH) for _ in range(NUM_EXPERTS // num_ranks))
    return MOELayer(Top2Gate(WIDTH, NUM_EXPERTS), experts)  # type: ignore[no-any-return]
