"""The training run of one rank: set up, update after update, evaluation, save, sample.

The command line calls `train` on every rank inside a worker session. Everything collective goes
through the engine; what only one rank does (files, the terminal) rank 0 does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sixfold.base.errors import ConfigError
from sixfold.base.plugins import load_plugin
from sixfold.config import Config, Resolved
from sixfold.config.schema import flat
from sixfold.data.corpus import Corpus, prepare
from sixfold.engine import initialize
from sixfold.launch import Session, discover
from sixfold.monitor.console import Console
from sixfold.monitor.hardware import memory_bytes, peak_flops
from sixfold.monitor.journal import Journal
from sixfold.monitor.meters import Meter
from sixfold.monitor.recording import write_recording
from sixfold.monitor.sinks import Sinks
from sixfold.parallel import DTYPES
from sixfold.plan import LossScaling, decide_batch, decide_geometry
from sixfold.train import adapters, job
from sixfold.train.callbacks import Adapters, Callback, Checkpoints, Evaluations, Metrics
from sixfold.train.completion import Sampling, continuations
from sixfold.train.compute import unmeasured_compute
from sixfold.train.facts import facts_of
from sixfold.train.folder import make_folder
from sixfold.train.length import TimeBudget
from sixfold.train.resume import Standing, stand
from sixfold.train.run import Run
from sixfold.train.samples import samples_of
from sixfold.train.subject import build_model, fields_of, flops_per_token, loss_of, weights_of
from sixfold.train.vocabulary import keep_vocabulary

RECORDED = 10
"""The update of this process that is recorded, or its last: memory and code paths are warm by then."""
REHEARSALS = 3
"""Timed updates before the first one; the first of them is slow by nature and not counted."""


def train(request: job.Request, session: Session) -> None:
    """Train as one rank of a job.

    Raises:
        SixfoldError: whatever keeps the run from starting or going on, with a change that works.
    """
    with Console(sys.stdout) as console:
        resolved = _note_launch(unmeasured_compute(job.resolve(request)))
        standing = stand(request.resume, resolved) if request.resume is not None else None
        if standing is not None and standing.is_complete:
            if session.rank == 0:
                console.say(str(standing))
            return
        run = _set_up(request, resolved, standing, console)
        # In the end it is saved before it is measured: a failure of the latter then costs nothing.
        own = [load_plugin("callback", name)(run) for name in run.resolved.config.train.callbacks]
        if adapters.is_asked(run.resolved.config.model):
            own.append(Adapters())
        callbacks: Sequence[Callback] = (Metrics(run), *own, Checkpoints(run), Evaluations(run))
        _tell_compiled(run)
        budget = _settle_length(run)
        if run.is_first:
            run.keep_config()
            keep_vocabulary(run.folder, run.corpus)
            names, settings = run.resolved.config.monitor.sinks, flat(run.resolved.config)
            run.sinks = Sinks(names, run.folder, settings, warn=console.say)
            run.record({"facts": facts_of(run)})
        finished = _updates(run, session, callbacks, budget)
        for callback in callbacks:
            callback.at_end(run, finished)
        if finished:
            _complete_prompt(run)
            run.say(f"\nrun folder {run.folder}")
        else:
            run.say(f"stopped and saved after update {run.engine.num_steps}; go on with:")
            run.say(f"  sixfold train --resume {run.folder}")
            session.interrupted()
        if run.journal is not None:
            run.journal.close()
        if run.sinks is not None:
            run.sinks.close()
        run.engine.close()


def _set_up(request: job.Request, resolved: Resolved, standing: Standing | None, console: Console) -> Run:
    config = resolved.config
    corpus = prepare(config.data)
    module = build_model(config, corpus.vocab_size)
    # A checkpoint holds all of the model, unless it is one of adapters alone.
    begins = standing is None or adapters.is_asked(config.model)
    engine = initialize(
        module,
        config=resolved,
        loss_fn=loss_of(config, module),
        weights=weights_of(config) if begins else None,
        example=_example(config, corpus),
    )
    folder = request.resume
    if folder is None:
        folder = Path(engine.mesh.share_text(_make_folder(request, config.train.folder, engine.mesh.rank)))
    run = Run(
        resolved=resolved,
        engine=engine,
        corpus=corpus,
        stream=samples_of(config, corpus),
        batch=decide_batch(
            config.batch, data_ranks=engine.data_ranks, sequence_length=config.data.sequence_length
        ),
        folder=folder,
        console=console,
    )
    run.say(f"{engine.plan}\nbatch       {run.batch}")
    if standing is not None:
        engine.load(standing.newest)
        run.say(str(standing))
    if run.is_first:
        run.journal = Journal(folder, engine.num_steps, warn=console.say)
    return run


def _example(config: Config, corpus: Corpus) -> dict[str, Any] | None:
    """A batch of a rank, for what is measured and priced by one."""
    layout = config.layout
    if max(layout.pipe, layout.tensor, layout.context, layout.expert) == 1:
        return None
    placement = discover(os.environ)
    geometry = decide_geometry(config.layout, placement.world_size if placement else 1)
    batch = decide_batch(
        config.batch, data_ranks=geometry.degree("data"), sequence_length=config.data.sequence_length
    )
    return fields_of(config, corpus, samples_of(config, corpus).batch(0, range(len(batch.share(0)))))


def _note_launch(resolved: Resolved) -> Resolved:
    """Apply the threads that were asked for, and write down how this rank was started."""
    asked = resolved.config.launch
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    placement = discover(os.environ)
    found = {
        "launch.ranks": placement.local_world_size if placement else 1,
        "launch.threads": torch.get_num_threads(),
    }
    unset = {
        path
        for path, value in (("launch.ranks", asked.ranks), ("launch.threads", asked.threads))
        if value is None
    }
    return resolved.decide({path: found[path] for path in unset}, "as started") if unset else resolved


def _make_folder(request: job.Request, parent: Path, rank: int) -> str:
    if rank != 0:
        return ""
    return str(make_folder(request.into, parent))


def _tell_compiled(run: Run) -> None:
    """Say what compiling the blocks brings, from timed rehearsals with and without."""
    backend = run.resolved.config.layout.compile
    if backend is None:
        return
    with torch.compiler.set_stance("force_eager"):
        plain = _seconds_per_update(run)
    compiled = _seconds_per_update(run)
    run.say(
        f"compile     blocks by {backend}: {compiled:.3f} s an update, {plain:.3f} s as written "
        f"({plain / compiled:.2f} times as fast)"
    )


def _settle_length(run: Run) -> TimeBudget | None:
    """Settle how many updates the run has: as asked, or as many as fill the time by a rehearsal."""
    asked = run.resolved.config.train
    if asked.steps is None and asked.minutes is None:
        raise ConfigError(
            f"train.steps = {asked.steps}, train.minutes = {asked.minutes}",
            rule="a run ends after a number of updates or after a time",
            fix="set train.steps = 300 or train.minutes = 3",
        )
    if asked.steps is not None:
        run.end_after(asked.steps)
        return None
    assert asked.minutes is not None, "checked above"
    budget = TimeBudget(asked.minutes * 60, run.engine.num_steps)
    pace_s = _seconds_per_update(run)
    run.end_after(budget.guess(pace_s), f"{_time_text(asked.minutes, pace_s)} an update, as rehearsed")
    run.say(
        f"length      {run.total_steps} updates in {_time_text(asked.minutes, pace_s)} each, as rehearsed"
    )
    return budget


def _correct_length(run: Run, budget: TimeBudget, meter: Meter) -> None:
    """Settle it anew by the updates so far, to the same number on every rank; what is complete stays so."""
    step = run.engine.num_steps
    sums = run.engine.mesh.total(meter.spent_s, meter.pace_s)
    spent_s, pace_s = (each / run.engine.mesh.world_size for each in sums)
    length = budget.correct(step, spent_s=spent_s, pace_s=pace_s)
    if length == run.total_steps:
        return
    minutes = budget.seconds / 60
    run.end_after(length, f"{_time_text(minutes, pace_s)} an update, as measured by update {step}")
    meter.total_steps = length
    run.record({"step": step, "length": length, "seconds_per_update": pace_s})
    told = budget.outdated(length)
    if told is not None:
        run.say(
            f"length      {length} updates, not {told}, fill {minutes:g} minutes: {pace_s:.3f} s each now"
        )


def _time_text(minutes: float, pace_s: float) -> str:
    return f"{minutes:g} minutes at {pace_s:.3f} s"


def _seconds_per_update(run: Run) -> float:
    """Duration of an update, the same number on every rank."""
    batch = run.next_batch()
    best = float("inf")
    for rehearsal in range(REHEARSALS):
        run.engine.mesh.barrier()
        began = time.perf_counter()
        run.engine.rehearse(batch)
        run.engine.mesh.barrier()
        if rehearsal > 0:
            best = min(best, time.perf_counter() - began)
    # The barriers make ranks agree to within a message; the mean makes it exact.
    return run.engine.mesh.total(best)[0] / run.engine.mesh.world_size


def _updates(run: Run, session: Session, callbacks: Sequence[Callback], budget: TimeBudget | None) -> bool:
    """Update until the end; False when asked to stop before it."""
    meter, dispatcher = _meter(run), run.engine.mesh.dispatcher
    targets = run.batch.size * run.resolved.config.data.sequence_length
    recorded = run.engine.num_steps + RECORDED
    while run.engine.num_steps < run.total_steps:
        meter.start()
        began, blocked = time.perf_counter(), dispatcher.blocked_s
        batch = run.next_batch()
        data_s = time.perf_counter() - began
        loss = _step(run, batch, is_recorded=run.engine.num_steps + 1 == min(recorded, run.total_steps))
        assert run.engine.last is not None, "train_step leaves a result"
        record = meter.stop(
            run.engine.num_steps,
            loss=loss,
            lr=run.engine.bound.lr,
            grad_norm=run.engine.last.grad_norm,
            tokens=targets,
            samples=run.engine.num_samples,
            loss_scale=run.engine.last.loss_scale if run.engine.plan.loss_scaling != LossScaling() else None,
            skipped=run.engine.last.skipped,
            data_s=data_s,
            compute_s=run.engine.last.compute_s or 0.0,
            exchange_s=dispatcher.blocked_s - blocked,
        )
        # Before it is saved: a resumed run goes on by the length that is written down there.
        if budget is not None and budget.is_due(run.engine.num_steps):
            _correct_length(run, budget, meter)
            record = replace(record, eta_s=meter.left_s(record.step))
        for callback in callbacks:
            callback.after_update(run, record)
        # Ranks learn of a signal at different moments; they stop after the same update.
        if run.engine.mesh.any(session.stop_requested):
            return run.engine.num_steps >= run.total_steps
    return True


def _step(run: Run, batch: Any, *, is_recorded: bool) -> float:
    """One update; its mean loss."""
    if not is_recorded:
        return run.engine.train_step(batch)
    timeline = run.engine.timed_step(batch)
    if run.is_first:
        write_recording(run.folder, run.engine.num_steps, timeline, warn=run.console.say)
    assert run.engine.last is not None, "an update leaves a result"
    return run.engine.last.loss


def _meter(run: Run) -> Meter:
    config = run.resolved.config
    if config.monitor.peak_tflops is not None:
        own_peak = config.monitor.peak_tflops * 1e12
    else:
        own_peak = peak_flops(DTYPES[config.precision.compute or "fp32"], device=run.engine.device)
    return Meter(
        run.total_steps,
        flops_per_token=flops_per_token(run.engine.module, config.data.sequence_length),
        peak_flops=run.engine.mesh.total(own_peak)[0],
        memory=memory_bytes,
    )


def _complete_prompt(run: Run) -> None:
    asked = run.resolved.config.train
    if not asked.sample_tokens:
        return
    how = Sampling(seed=run.resolved.config.seed)
    with run.engine.gathered() as module:
        if run.is_first:
            news = continuations(module, run.corpus.vocabulary, [asked.prompt], asked.sample_tokens, how)
            text = asked.prompt + "".join(new for (new,) in news)
            run.say(f"\nsample\n{text}")
            run.record({"step": run.engine.num_steps, "sample": text})
