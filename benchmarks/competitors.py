"""Those who train the reference decoder in `zero.py`, each one a function from a task to its update.

All start from the same weights, see the same batches and use AdamW, fused wherever they take a torch
optimizer; each is set up as its own documentation has it. What differs from that is said at the place.
A library is imported only in the ranks of its own job, so that nothing it does to torch touches another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from contest import LR, SIZES, Step, make_model

from sixfold.base.malloc import malloc_variables

if TYPE_CHECKING:
    from torch import Tensor

DDP, LIMITS = "ddp", ("no-communication", "sixfold-alone")
BUCKET_ELEMENTS = 25 * 2**20 // 4
"""DeepSpeed's bucket, that of DDP: its default of 5e8 elements would send any of these models in one piece
after backward."""


@dataclass(frozen=True)
class Task:
    """What is trained: a key of `contest.SIZES`, where, and the type it computes in."""

    size: str
    dtype: str
    device: str = "cpu"

    def model(self) -> Any:
        """The decoder with its first weights."""
        return make_model(self.size, self.device)


@dataclass(frozen=True)
class Competitor:
    """One way to train.

    Args:
        build: makes the model trainable in a rank.
        stage: the row of Sixfold's residency table it comes to; None where nothing is exchanged.
        family: who made it.
        is_alone: every rank trains for itself, without a process group: only the first losses are DDP's.
        cpu_environment: of its ranks where they have no GPU.
    """

    build: Callable[[Task], Step]
    stage: int | None
    family: str
    is_alone: bool = False
    cpu_environment: Mapping[str, str] = field(default_factory=dict)


def _adamw(parameters: Iterable[Any]) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def _autocast(task: Task) -> Any:
    import torch

    return torch.autocast(task.device, torch.bfloat16) if task.dtype == "bf16" else nullcontext()


def _loop(model: Any, optimizer: Any, *, context: Callable[[], Any] = nullcontext) -> Step:
    """The training loop of torch's tutorials."""

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        with context():
            total, weight = model(tokens)
        loss = total / weight
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def _ddp(task: Task) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    return _loop(model, _adamw(model.parameters()), context=partial(_autocast, task))


def _plain(task: Task) -> Step:
    model = task.model()
    return _loop(model, _adamw(model.parameters()), context=partial(_autocast, task))


def _sixfold(task: Task, *, zero: int, transport: str, grad: str | None = None) -> Step:
    import sixfold

    if grad is not None and task.dtype == "fp32":
        raise ValueError("gradients in 16 bits beside weights in fp32 have nobody to be compared with")
    config = {
        "layout": {"zero": zero, "transport": transport},
        "precision": {"compute": task.dtype, "grad": grad},
        "optimizer": {"name": "adamw", "lr": LR},
    }
    return sixfold.initialize(task.model(), config=config, device=task.device).train_step


def _zero_redundancy(task: Task) -> Step:
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR, fused=True)
    return _loop(model, optimizer, context=partial(_autocast, task))


def _fsdp2(task: Task, *, reshard: bool) -> Step:
    """Root included, as torch advises where memory counts."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = task.model()
    policy = MixedPrecisionPolicy()
    if task.dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mp_policy=policy, reshard_after_forward=reshard)
    return _loop(model, _adamw(model.parameters()))


def _deepspeed(task: Task, *, stage: int) -> Step:
    import deepspeed

    model = task.model()
    config = {
        "train_micro_batch_size_per_gpu": SIZES[task.size]["batch"],
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "bf16": {"enabled": task.dtype == "bf16"},
        "gradient_clipping": 0.0,  # its default clips to 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_adamw(model.parameters()), config=config, dist_init_required=False
    )

    def step(tokens: Tensor) -> float:
        total, weight = engine(tokens)
        loss = total / weight
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step


def _fairscale_oss(task: Task) -> Step:
    import torch
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS

    model = task.model()
    optimizer = OSS(model.parameters(), torch.optim.AdamW, lr=LR, fused=True)
    model = ShardedDataParallel(model, optimizer)
    # Its gradients must be kept: dropping them, as torch's zero_grad does, makes it diverge unseen.
    optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)
    return _loop(model, optimizer, context=partial(_autocast, task))


def _fairscale_fsdp(task: Task) -> Step:
    import torch
    from fairscale.nn import FullyShardedDataParallel

    wrap = FullyShardedDataParallel if task.device == "cuda" else _fairscale_fsdp_on_cpu()
    options: dict[str, Any] = {"compute_device": torch.device(task.device), "flatten_parameters": True}
    if task.dtype == "bf16":
        options |= {"mixed_precision": True, "compute_dtype": torch.bfloat16, "fp32_reduce_scatter": True}
    model = task.model()
    for place, block in enumerate(model.model.layers):
        model.model.layers[place] = wrap(block, **options)
    model = wrap(model, **options)
    return _loop(model, _adamw(model.parameters()))


def _fairscale_fsdp_on_cpu() -> Any:
    """FairScale's class with what it takes for granted: streams, which do nothing here, and a collective that
    takes the shapes that NCCL's takes."""
    import torch
    import torch.distributed as dist
    from fairscale.nn import FullyShardedDataParallel

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...
        def synchronize(self) -> None: ...

    class OnCpu(FullyShardedDataParallel):  # type: ignore[misc]
        def _setup_streams(self) -> None:
            super()._setup_streams()
            self._streams |= dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), only)

    def reduce_scatter(output: Tensor, parts: Tensor, group: Any = None) -> Any:
        return dist.reduce_scatter_tensor(output, parts.flatten(), group=group)

    only = Stream()
    torch.cuda.current_stream = lambda *args: only
    torch.cuda.stream = lambda stream: nullcontext()
    torch.Tensor.record_stream = lambda tensor, stream: None
    dist._reduce_scatter_base = reduce_scatter
    return OnCpu


SIXFOLD = {
    f"sixfold-{zero}" + ("" if transport == "network" else f"-{transport}"): Competitor(
        partial(_sixfold, zero=zero, transport=transport),
        zero,
        f"sixfold {transport}",
        cpu_environment=malloc_variables(os.environ),  # as its launcher starts them
    )
    for transport in ("network", "host")
    for zero in range(4)
}
SIXFOLD["sixfold-2-host-grad16"] = replace(
    SIXFOLD["sixfold-2-host"], build=partial(_sixfold, zero=2, transport="host", grad="bf16")
)
"""Gradients add up and are summed in bf16, as DeepSpeed's are; for bf16 alone."""
DEEPSPEED = {
    f"deepspeed-{stage}": Competitor(
        partial(_deepspeed, stage=stage), stage, "deepspeed", cpu_environment={"DS_ACCELERATOR": "cpu"}
    )
    for stage in (1, 2, 3)
}
COMPETITORS: dict[str, Competitor] = {
    DDP: Competitor(_ddp, 0, "torch"),
    "no-communication": Competitor(_plain, None, "torch", is_alone=True),
    "sixfold-alone": Competitor(
        partial(_sixfold, zero=0, transport="network"),
        None,
        "sixfold",
        is_alone=True,
        cpu_environment=malloc_variables(os.environ),
    ),
    **SIXFOLD,
    "zero-redundancy": Competitor(_zero_redundancy, 1, "torch"),
    "fsdp2-no-reshard": Competitor(partial(_fsdp2, reshard=False), 2, "torch"),
    "fsdp2": Competitor(partial(_fsdp2, reshard=True), 3, "torch"),
    **DEEPSPEED,
    "fairscale-oss": Competitor(_fairscale_oss, 2, "fairscale"),
    "fairscale-fsdp": Competitor(_fairscale_fsdp, 3, "fairscale"),
}
"""`ddp` against itself shows how far two equal jobs come apart."""
