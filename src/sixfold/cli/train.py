"""`sixfold train`: as launcher, prepare the data and start ranks; as a rank, train.

Called by `app`. Whether this process is a rank already (under torchrun, Slurm, Kubernetes or our own
launcher) is read from its environment. Settings are read and judged before anything heavy is loaded, so that
what is mistyped is told at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from sixfold.base.errors import EXIT_DONE
from sixfold.base.units import bytes_text, count_text
from sixfold.cli.output import print_json, progress_bar
from sixfold.config import Resolved
from sixfold.config.resolved import CONFIG
from sixfold.config.schema import flat
from sixfold.data.sources import find_sources
from sixfold.launch import NodePlacement, Placement, discover, launch, nodes, worker_session
from sixfold.launch.resources import default_ranks, default_threads
from sixfold.plan import decide_ranks
from sixfold.train.folder import check_place, held, make_folder
from sixfold.train.job import Request, as_started, resolve

if TYPE_CHECKING:
    from sixfold.data.corpus import Corpus
    from sixfold.train.resume import Standing

VERIFIED_BYTES = 2**30
"""A corpus up to this size is read and compared with its checksums before ranks start: a second or less."""


def run_train(request: Request, *, dry_run: bool, as_json: bool = False) -> int:
    """Returns the exit code."""
    place = discover(os.environ)
    if place is not None and not dry_run:
        # Ranks load torch's distributed parts; the launcher need not.
        from sixfold.train.loop import train

        with worker_session() as session:
            train(request, session)
        return EXIT_DONE
    if place is not None and place.rank > 0:
        return EXIT_DONE  # the first rank shows the plan for all
    node = nodes(os.environ) if place is None else None  # ranks inherit the variables of their node
    resolved = decide_launch(resolve(request), node, place)
    standing = _stand(request, resolved)
    if standing is not None and standing.is_complete:
        typer.echo(standing)
        return EXIT_DONE
    ranks, threads = resolved.config.launch.ranks, resolved.config.launch.threads
    assert ranks is not None, "decided above"
    world_size = place.world_size if place is not None else ranks * (node.num_nodes if node else 1)
    decided = _check_plan(resolved, world_size)
    if request.resume is None:
        check_place(request.into, resolved.config.train.folder)
    launches_all = place is None and (node is None or node.num_nodes == 1)
    resolved = _decide_compute(resolved, launches_all=launches_all)
    if dry_run:
        _show_plan(resolved, decided, as_json=as_json)
        return EXIT_DONE
    if request.resume is not None and (node is None or node.node_rank == 0):
        with held(request.resume):
            pass  # told before anything is started; the first rank, which this node starts, will hold it
    corpus = _prepare(resolved)
    if standing is not None:
        standing.reading(corpus)
    folder = request.resume or make_folder(request.into, resolved.config.train.folder)
    with TemporaryDirectory(prefix="sixfold-") as scratch:
        handed = Path(scratch) / CONFIG
        handed.write_text(resolved.to_toml())
        option = "--into" if request.resume is None else "--resume"
        return launch(
            [sys.executable, "-m", "sixfold", "train", "--handed", str(handed), option, str(folder)],
            ranks=ranks,
            run_folder=folder,
            threads=threads,
            node=node,
        )


def _stand(request: Request, resolved: Resolved) -> Standing | None:
    """Where the run stands that is to be resumed, if one is."""
    if request.resume is None:
        return None
    from sixfold.train.resume import stand

    return stand(request.resume, resolved)


def decide_launch(
    resolved: Resolved, node: NodePlacement | None = None, place: Placement | None = None
) -> Resolved:
    """Fill in how many ranks this machine gets, and how many threads each.

    Args:
        node: of several, which this machine is.
        place: of this rank, where ranks are started already: they are as many as there are.
    """
    if place is not None:
        # Slow to load; its count is what the rank was started with.
        import torch

        return as_started(resolved, place, torch.get_num_threads())
    if resolved.config.launch.ranks is None:
        ranks, why = default_ranks(node)
        resolved = resolved.decide({"launch.ranks": ranks}, why)
    if resolved.config.launch.threads is None:
        threads = default_threads(resolved.config.launch.ranks or 1)
        resolved = resolved.decide({"launch.threads": threads}, "the cores divided by the ranks")
    return resolved


def _decide_compute(resolved: Resolved, *, launches_all: bool) -> Resolved:
    """Settle what the ranks compute in, measured by the one launcher of all; a model that cannot be built is
    refused by the way."""
    from sixfold.data.tokenizer import BYTES
    from sixfold.train.compute import measured_compute, unmeasured_compute
    from sixfold.train.subject import build_model

    model = build_model(resolved.config, BYTES)  # no vocabulary has fewer entries
    return measured_compute(resolved, model) if launches_all else unmeasured_compute(resolved)


def _show_plan(resolved: Resolved, decided: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        values = flat(resolved.config)
        settings = {path: {"value": values[path], "origin": resolved.origins[path]} for path in values}
        print_json({"config": settings, "plan": decided})
    else:
        lines = "\n".join(f"# {name:<10} {text}" for name, text in decided.items())
        typer.echo(f"{resolved}\n{lines}")


def _check_plan(resolved: Resolved, world_size: int) -> dict[str, str]:
    """Refuse what cannot be carried out before data are prepared and ranks started."""
    from sixfold.data.corpus import built_corpus

    config = resolved.config
    if built_corpus(config.data) is None:
        find_sources(config.data)
    geometry, residency, batch = decide_ranks(config, world_size)
    return {"ranks": f"{world_size}: {geometry}", "residency": str(residency), "batch": str(batch)}


def _prepare(resolved: Resolved) -> Corpus:
    """Build or find the corpus before ranks start, where its progress and its errors are seen."""
    from sixfold.data.corpus import prepare

    with progress_bar() as progress:
        corpus = prepare(resolved.config.data, on_progress=progress)
    held_out = f"{corpus.num_held_out_documents} documents ({bytes_text(corpus.num_held_out_bytes)}) held out"
    typer.echo(
        f"corpus      {count_text(corpus.num_train_tokens)} training tokens, {held_out}, "
        f"{corpus.vocab_size} vocabulary entries"
    )
    if corpus.num_bytes <= VERIFIED_BYTES:
        corpus.verify()
    else:
        typer.echo(
            f"corpus      too large to verify at every start; sixfold data inspect {corpus.folder} --verify"
        )
    return corpus
