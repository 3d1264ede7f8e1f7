"""From a batch to a played program: cuts it, asks for the programs of this layout, and has them played.

Made by `initialize`, called by the engine for training, evaluation and rehearsal alike. It owns no schedule
and no loss; it holds together what knows of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from sixfold.base.errors import ModelError
from sixfold.config import Config
from sixfold.mesh import Mesh, Streams, is_duplex
from sixfold.parallel import Routing, Stage, compute_type
from sixfold.pipeline.batch import Batch, divide, lengths_of, num_samples, split, to_device, without_targets
from sixfold.pipeline.comparing import compare
from sixfold.pipeline.loss import Counts, LossForm, Share
from sixfold.pipeline.player import Player
from sixfold.pipeline.scaling import LossScaler
from sixfold.pipeline.sequence import Piece, SequenceCut
from sixfold.pipeline.step import StepResult, Work
from sixfold.pipeline.transfers import kind_of
from sixfold.pipeline.trials import Trials
from sixfold.plan import Plan, Purpose, programs_for
from sixfold.program import Program
from sixfold.simulate import Timeline
from sixfold.state import ModelState


class Playing:
    """Plays batches.

    Args:
        module: the user's own model.
        stages: its stages on this rank.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        stages: Sequence[Stage],
        asked: Config,
        plan: Plan,
        mesh: Mesh,
        streams: Streams,
        state: ModelState,
        player: Player,
        scaler: LossScaler,
        loss_form: LossForm,
        sequences: SequenceCut,
        routing: Routing,
    ) -> None:
        self.player = player
        self.routing = routing
        self.scaler = scaler
        self._module = module
        self._stages = {stage.number: stage for stage in stages}
        self._has_loss = stages[-1].is_last
        self._answers = self._has_loss and mesh.place("tensor") == mesh.place("context") == 0
        self._layout = asked.layout
        self._micro = asked.batch.micro
        self._residency = plan.residency
        self._mesh = mesh
        self._streams = streams
        self._state = state
        self._loss_form = loss_form
        self._sequences = sequences
        self.cast = compute_type(asked.precision.compute)
        """Type of the module's floating inputs; None: as they are given."""
        self._trials = Trials(
            module=module,
            stages=self._stages,
            cast=self.cast,
            program=partial(self._program, "evaluation"),
            mesh=mesh,
            streams=streams,
            state=state,
            player=player,
            loss_form=loss_form,
            sequences=sequences,
        )

    def play(
        self, what: str, purpose: Purpose, batch: Batch, step: int, last_weight: float | None
    ) -> StepResult:
        """Play this rank's program for `batch`.

        Args:
            what: the call it is for.
            step: updates done.
            last_weight: global weight of the update before; None for the first.

        Raises:
            ModelError: ranks that work on the same samples have different batches, or as `Player.play`; on
                every rank.
        """
        micros = split(batch, self._micro)
        common = self._in_common(batch, len(micros)) if self._layout.expert > 1 else 0
        if not self._loss_form.is_settled:
            self._trials.settle(batch)
        most = self._state.largest(what, len(micros))
        compare(batch, self._mesh)
        if len(micros) < common:
            micros = self._cut_into(batch, common)
        # Some ranks have the same batch, and one of those with the loss answers for it.
        counts = Counts.of(batch) if self._answers else Counts()
        scale = self._loss_form.scale(counts, last_weight, self._mesh)
        self.routing.begin(batch, self.scaler.scale, answers=self._answers)
        if len(self._stages) > 1 or not self._has_loss:
            self.routing.scale_penalties(self.scaler.scale / scale)
        # Where something is sent in the middle of passes, all data ranks keep to the program of the longest.
        is_bound = self._residency.parameters or len(self._stages) > 1
        num_served = most - len(micros) if is_bound else 0
        num_reduces = max(1, most) if self._residency.reduces_each else 1
        program = self._program(purpose, len(micros), num_served, num_reduces)

        cut, shift = self._sequences, self._loss_form.shift
        pieces = list(map(partial(cut.piece, shift=shift), micros))
        run = partial(self._run, step, scale, pieces)
        kinds = [kind_of(piece.batch, self._module) for piece in pieces] if self._mesh.pipe_ranks > 1 else ()
        enter = (lambda micro: cut.enter(pieces[micro])) if cut.is_cut else None
        work = Work(run, scale, counts, kinds, enter)
        try:
            return self.player.play(program, work)
        finally:
            if enter is not None:
                cut.enter(None)

    @contextmanager
    def recording(self) -> Iterator[list[Timeline]]:
        """Inside, what is played is timed; the list holds the times of all ranks of this pipeline afterwards.
        A collective."""
        found: list[Timeline] = []
        self._mesh.barrier()
        zero, self.player.record = time.monotonic(), []
        try:
            yield found
            rank = self._mesh.pipe_rank
            mine = [(rank, str(each), start - zero, stop - zero) for each, start, stop in self.player.record]
        finally:
            self.player.record = None
        texts = self._mesh.texts(json.dumps(mine))
        own = [json.loads(texts[self._mesh.rank_at(rank)]) for rank in range(self._mesh.pipe_ranks)]
        found.append(Timeline.of_rows(chain.from_iterable(own)))

    def stream(self, step: int, micro: int, forward: int = 0, stage: int = 0) -> AbstractContextManager[None]:
        """Around one forward: its random numbers."""
        return self._streams.keyed("step", step, self._mesh.replica, micro, forward, stage)

    def _run(
        self, step: int, scale: float, pieces: Sequence[Piece], number: int, micro: int, received: Any
    ) -> Share | Any:
        stage, piece = self._stages[number], pieces[micro]
        piece = replace(piece, batch=to_device(piece.batch, self._mesh.device, None))
        args, kwargs = self._loss_form.arguments(piece.batch, scale, cast=self.cast)
        with self.stream(step, micro, stage=stage.number):
            output = stage(received, args, kwargs)
            return self._loss_form.read(output, piece, scale) if stage.is_last else output

    def _in_common(self, batch: Batch, num_micro: int) -> int:
        """Micro-batches of the rank that has most: as many as all run, who wait for each other's tokens.

        Raises:
            ModelError: a rank has fewer, and nothing from which to make others; on every rank.
        """
        rows = self._mesh.everyones(num_micro, float(bool(lengths_of(batch))))
        most = round(max(row[0] for row in rows))
        bare = [str(place) for place, row in enumerate(rows) if row[0] < most and not row[1]]
        if bare:
            raise ModelError(
                f"no tensors in the batch of replica {', '.join(bare)}; others have {most} micro-batches",
                rule="under layout.expert every rank runs as many micro-batches as the others, empty ones "
                "where it has no samples, because they send it tokens",
                fix="hand over the fields of a batch with zero samples, for example tokens[:0]",
            )
        return most

    def _cut_into(self, batch: Batch, parts: int) -> list[Batch]:
        # Models that count their targets need not be able to run without any sample.
        return [
            without_targets(micro) if self._loss_form.shift is not None and not num_samples(micro) else micro
            for micro in divide(batch, parts)
        ]

    def _program(
        self, purpose: Purpose, num_micro: int, num_served: int = 0, num_reduces: int = 1
    ) -> Program:
        programs = programs_for(
            self._layout,
            purpose,
            num_micro,
            num_served,
            num_reduces,
            cuts=bool(self._residency.parameters),
            posts_ahead=is_duplex(self._mesh.device),
        )
        return programs[self._mesh.pipe_rank]
