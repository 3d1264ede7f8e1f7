"""The tensor axis against torch's own parallel styles: forward and backward of decoder blocks, one command.

    python benchmarks/tensor.py [--ranks 2] [--size m] [--rounds 15] [--json]

One set of ranks (gloo, one compute thread each) holds the blocks three times, with the same weights: cut by
Sixfold, exchanging through shared memory and over the network, and cut by `parallelize_module`. They take
turns within every round, in an order that changes from round to round. Outputs and input gradients are
compared first. What Sixfold's dispatcher was given to exchange is counted and held against the formula: four
all-reduces of the activations a block, forward and backward together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from contest import SIZES, median_interval, quit_rank, run_ranks

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
    from sixfold.parallel.tensor import Rules, decide_tensor
    from sixfold.parallel.tensor_forwards import TensorForwards

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


def work(options: dict[str, Any]) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    from sixfold.mesh import Mesh
    from sixfold.plan import Geometry

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, size = dist.get_world_size(), options["size"]
    geometry = Geometry((("pipe", 1), ("data", 1), ("context", 1), ("tensor", ranks)), 1)
    meshes = {
        name: Mesh(geometry, dist.get_rank(), torch.device("cpu")).sharing(
            transport, exchange_bytes=0, timeout_s=60.0
        )
        for name, transport in ((HOST, "host"), (NETWORK, "network"))
    }
    runs = {name: passes(ours(size, mesh), size) for name, mesh in meshes.items()}
    runs[PEER] = passes(theirs(size), size)
    results = [run() for run in runs.values()]
    for result in results[1:]:
        for mine, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    sent, formula = counted(meshes[NETWORK], runs[NETWORK]), expected_bytes(size)
    assert sent == formula, f"{sent} bytes were exchanged, and the formula says {formula}"
    spent: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(-2, options["rounds"]):
        order = order[1:] + order[:1]
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            runs[name]()
            dist.barrier()
            if number >= 0:
                spent[name].append((time.perf_counter() - began) * 1e3)
    if dist.get_rank() == 0:
        print(json.dumps({"ms": spent, "sent_bytes": sent}), flush=True)
    quit_rank()


def counted(mesh: Any, run: Callable[[], object]) -> int:
    """Bytes of the tensors that the dispatcher is given to exchange in one pass."""
    total, start = 0, mesh.dispatcher.start

    def noting(op: str, group: str, tensor: Any, *rest: Any) -> Any:
        nonlocal total
        assert op == "all-reduce", op
        total += tensor.numel() * tensor.itemsize
        return start(op, group, tensor, *rest)

    mesh.dispatcher.start = noting
    run()
    del mesh.dispatcher.start
    return total


def expected_bytes(size: str) -> int:
    """Two all-reduces of the activations forward and two backward, for each block, in fp32."""
    sizes = SIZES[size]
    return 4 * sizes["num_layers"] * sizes["batch"] * sizes["length"] * sizes["width"] * 4


def table(found: dict[str, Any]) -> str:
    """The figures as a Markdown table; ratios above 1 mean that Sixfold is faster."""
    lines = ["| blocks cut by | ms | torch styles / it |", "|---|---|---|"]
    for name, values in found["ms"].items():
        pairs = [other / mine for mine, other in zip(values, found["ms"][PEER], strict=True)]
        middle, low, high = median_interval(pairs)
        lines.append(f"| {name} | {statistics.median(values):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join([*lines, "", f"exchanged by a rank in one pass: {found['sent_bytes'] / 1e6:.2f} MB"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the ranks and print."""
    args = parse()
    if args.work:
        work(json.loads(args.work))
        return
    options = json.dumps({"size": args.size, "rounds": args.rounds})
    found = run_ranks([__file__, "--work", options], args.ranks)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    sys.exit(main())
