"""`sixfold plan`: what a training run would be, before anything is started.

Called by `app`. It decides as the ranks will, on a model without weights, and predicts the time of one update
with the simulator. It starts no rank and writes nothing but the page that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import typer
from torch import nn
from torch.optim import Optimizer

from sixfold.base.errors import EXIT_DONE
from sixfold.base.units import bytes_text, duration_text, milliseconds_text
from sixfold.cli.output import print_json, write_timelines
from sixfold.cli.train import decide_launch
from sixfold.config import Config, Resolved
from sixfold.data.corpus import built_corpus
from sixfold.data.tokenizer import DEFAULT_SIZE
from sixfold.monitor.hardware import peak_flops
from sixfold.parallel import DTYPES, ModelCut, block_names, decide_axes
from sixfold.parallel.expert.axis import experts_of
from sixfold.plan import (
    Memory,
    Plan,
    Traffic,
    decide,
    decide_batch,
    decide_geometry,
    persistent_memory,
    placed,
    programs_for,
    update_traffic,
)
from sixfold.simulate import Costs, StageCosts, Timeline, simulate
from sixfold.state import build_optimizer, make_optimizers, optimized_facts, state_bytes_per_weight
from sixfold.state.making import kind_of
from sixfold.train.compute import measured_compute
from sixfold.train.subject import build_model


def show_plan(resolved: Resolved, *, ranks: int | None, timeline: Path | None, as_json: bool) -> int:
    """Returns the exit code.

    Args:
        ranks: of the run; None: as `sixfold train` would start here.
        timeline: where the predicted update is drawn.
    """
    resolved = decide_launch(resolved)
    config = resolved.config
    world_size = ranks or config.launch.ranks
    assert world_size is not None, "decided above"
    corpus = built_corpus(config.data)
    # One that is not there yet may offer fewer entries.
    entries = corpus.vocab_size if corpus is not None else config.data.vocab_size or DEFAULT_SIZE
    model = build_model(config, entries)
    config = measured_compute(resolved, model).config
    cut = ModelCut.decide(model, config.layout)
    blocks = block_names(model, config.layout.blocks)
    made = make_optimizers(build_optimizer(config.optimizer, model, blocks), model)
    facts, moments = optimized_facts(model, made, blocks), _moments(made)
    geometry = decide_geometry(config.layout, world_size)

    def plan_of(pipe_rank: int) -> Plan:
        axes = decide_axes(model, config.layout, geometry, geometry.first_rank(pipe_rank), owns_loss=True)
        pieces = placed(facts.parameters, axes.places)
        return decide(config, cut.facts_of(pieces, pipe_rank), world_size, cut.plan)

    plans = [plan_of(rank) for rank in range(config.layout.pipe)]
    memories = [persistent_memory(plan, [each or 0.0 for each in moments]) for plan in plans]
    data_ranks = plans[0].geometry.degree("data")
    batch = decide_batch(config.batch, data_ranks=data_ranks, sequence_length=config.data.sequence_length)
    longest = max(map(batch.num_micro, range(data_ranks)))
    traffics = [update_traffic(plan, longest) for plan in plans]
    predicted = predict(config, model, cut, batch.micro, longest)
    if timeline is not None:
        write_timelines(timeline, {"predicted": predicted}, "One update, computation alone, predicted")
    if as_json:
        print_json(_facts(str(plans[0].geometry), memories, traffics, predicted))
        return EXIT_DONE
    typer.echo(plans[0])
    if config.layout.cost == "measured":
        typer.echo("            (cut by estimated cost here; rank 0 of a run measures first)")
    for rank, memory in enumerate(memories):
        typer.echo(f"memory      pipe rank {rank}: {bytes_text(memory.total)} ({memory})")
    if None in moments:
        typer.echo(
            f"            ({kind_of(made)} could not be tried on a few zeros: its state is not counted)"
        )
    for rank, traffic in enumerate(traffics):
        typer.echo(f"traffic     pipe rank {rank}: {bytes_text(traffic.total)} sent in an update ({traffic})")
    for kind in _unpriced(plans[0]):
        typer.echo(f"            (beside {kind})")
    typer.echo(
        f"update      {_time(predicted.makespan)} predicted, of computation alone: "
        "transfers, sums and memory are not in it"
    )
    for limit in _limits(config, model):
        typer.echo(f"            ({limit})")
    typer.echo(str(predicted))
    return EXIT_DONE


def _time(seconds: float) -> str:
    return duration_text(seconds) if seconds >= 10 else milliseconds_text(seconds)


def _limits(config: Config, model: nn.Module) -> Iterator[str]:
    """What the prediction takes for more than it is."""
    if config.layout.tensor > 1 or config.layout.context > 1:
        yield "as if it were uncut by tensor and context"
    if experts_of(model):
        yield "as if every token took every expert"


def _unpriced(plan: Plan) -> Iterator[str]:
    """What a rank sends besides: it follows from the model's activations, or from when units are in use."""
    if plan.geometry.num_parts(plan.residency.parameters) > 1:
        yield "gathers of cut parameters"
    for axis in ("tensor", "pipe", "context", "expert"):
        if plan.geometry.degree(axis) > 1:
            yield f"what crosses along {axis} in every micro-batch"


def predict(config: Config, model: nn.Module, cut: ModelCut, micro_samples: int, num_micro: int) -> Timeline:
    """One update on a clock, from the operations in matrix products alone.

    Transfers take no time: what carries them is not known here. A multiplication and its addition are two
    operations, and each of the two parts of a backward has as many as its forward. Every weight counts for
    every token, also those that tensor ranks share, and experts that a token does not take.

    Args:
        micro_samples: in a micro-batch.
        num_micro: micro-batches of the rank that has most.
    """
    compute = DTYPES[config.precision.compute or "fp32"]
    rate = (config.monitor.peak_tflops or 0.0) * 1e12 or peak_flops(compute)
    weights = sum(parameter.numel() for parameter in model.parameters())
    shares = cut.plan.costs if cut.plan is not None else (1.0,)
    seconds = 2 * weights * micro_samples * config.data.sequence_length / rate
    stages = tuple(StageCosts(share * seconds, share * seconds, share * seconds) for share in shares)
    programs = programs_for(config.layout, "training", num_micro)
    return simulate(programs, Costs(stages))


def _moments(made: Sequence[Optimizer]) -> list[float | None]:
    """Numbers that optimizers keep per weight, by group; None where nobody knows."""
    dtypes = [torch.float32 for each in made for _ in each.param_groups]
    known = state_bytes_per_weight(made, dtypes)
    return [None if each is None else each / torch.float32.itemsize for each in known]


def _facts(
    geometry: str, memories: list[Memory], traffics: list[Traffic], predicted: Timeline
) -> dict[str, object]:
    return {
        "ranks": geometry,
        "memory_bytes": [memory.total for memory in memories],
        "traffic_bytes": [vars(traffic) for traffic in traffics],
        "makespan_s": predicted.makespan,
        "ideal_s": predicted.ideal,
        "bubble_s": predicted.bubble,
    }
