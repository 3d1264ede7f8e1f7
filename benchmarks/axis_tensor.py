"""Forward and backward of decoder blocks cut along the tensor axis: ours against torch's own parallel styles.

Run by `axes.py`. Every contestant holds the blocks with the same weights; outputs and input gradients are
compared first. What our dispatcher was given to exchange is counted and held against the formula: four
all-reduces of the activations a block, forward and backward together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from contest import SIZES

SIZE = "s"
_facts: dict[str, Any] = {}


def facts() -> dict[str, Any]:
    """What was sent in one turn, counted by the dispatcher, and the formula."""
    return _facts


HOST, NETWORK, PEER = "sixfold, host", "sixfold, network", "torch styles"
COLUMN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW = ("self_attn.o_proj", "mlp.down_proj")


def blocks_of(size: str) -> Any:
    """The blocks of the reference decoder, the same weights on every rank."""
    import torch

    from sixfold.models.decoder import Decoder, DecoderConfig

    sizes = {key: value for key, value in SIZES[size].items() if key != "batch"}
    torch.manual_seed(0)
    return Decoder(DecoderConfig.derive(context_length=sizes.pop("length"), **sizes)).model.layers


def ours(size: str, mesh: Any) -> Any:
    """Cut by Sixfold."""
    from sixfold.parallel.pieces import piece_of
    from sixfold.parallel.tensor.cut import Rules, decide_tensor
    from sixfold.parallel.tensor.forwards import TensorForwards

    blocks, group = blocks_of(size), mesh.along("tensor")
    styles = {f"*.{name}": "colwise" for name in COLUMN} | {f"*.{name}": "rowwise" for name in ROW}
    cut = decide_tensor(blocks, Rules(styles), group.num_ranks, group.place)
    for name, parameter in blocks.named_parameters():
        if name in cut.places:
            parameter.data = piece_of(parameter.data, cut.places[name])
    TensorForwards(blocks, cut, group)
    return blocks


def theirs(size: str) -> Any:
    """Cut by torch."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    blocks, mesh = blocks_of(size), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        styles = {name: ColwiseParallel() for name in COLUMN} | {name: RowwiseParallel() for name in ROW}
        parallelize_module(block, mesh, styles)
    return blocks


def passes(blocks: Any, size: str) -> Callable[[], tuple[Any, Any]]:
    """One forward and backward: (output, gradient of the input)."""
    import torch

    from sixfold.models.attention import rotary_tables

    sizes = SIZES[size]
    shape = sizes["batch"], sizes["length"], sizes["width"]
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_tables(sizes["length"], sizes["width"] // sizes["num_heads"], 10_000.0, given)

    def run() -> tuple[Any, Any]:
        x = given.clone().requires_grad_()
        y = x
        for block in blocks:
            y = block(y, cos, sin)
        y.square().mean().backward()
        for parameter in blocks.parameters():
            parameter.grad = None
        return y.detach(), x.grad

    return run


def contestants(rank: int, num_ranks: int) -> dict[str, Callable[[], object] | str]:
    """Name -> turn."""
    import torch

    from sixfold.mesh import Mesh
    from sixfold.plan import Geometry

    geometry = Geometry((("pipe", 1), ("data", 1), ("context", 1), ("tensor", num_ranks)), 1)
    meshes = {
        name: Mesh(geometry, rank, torch.device("cpu")).sharing(transport, exchange_bytes=0, timeout_s=60.0)
        for name, transport in ((HOST, "host"), (NETWORK, "network"))
    }
    runs = {name: passes(ours(SIZE, mesh), SIZE) for name, mesh in meshes.items()}
    runs[PEER] = passes(theirs(SIZE), SIZE)
    results = [run() for run in runs.values()]
    for result in results[1:]:
        for mine, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    _facts["bytes given to exchange in a turn"] = counted(runs[NETWORK])
    _facts["formula"] = expected_bytes(SIZE)
    return {**runs}


def counted(run: Callable[[], object]) -> int:
    """Bytes of the tensors that are given to be exchanged in one turn."""
    from sixfold.testing.exchanges import noted_exchanges

    with noted_exchanges() as topics:
        run()
    return sum(topic.num_bytes for topic in topics)


def expected_bytes(size: str) -> int:
    """Two all-reduces of the activations forward and two backward, for each block, in fp32."""
    sizes = SIZES[size]
    return 4 * sizes["num_layers"] * sizes["batch"] * sizes["length"] * sizes["width"] * 4
