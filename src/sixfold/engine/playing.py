"""From a batch to a played program: cuts it, writes the programs for this layout, and has them played.

Made by `initialize`, called by the engine for training, evaluation and rehearsal alike. It owns no schedule
and no loss; it holds together what knows of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.config import Config, LayoutConfig
from sixfold.mesh import Mesh, Streams, is_duplex
from sixfold.parallel import Routing, Stage, compute_type, off_zero
from sixfold.pipeline import (
    Batch,
    Counts,
    Kind,
    LossForm,
    LossScaler,
    Piece,
    Player,
    SequenceCut,
    Share,
    StepResult,
    Work,
    checksum,
    divide,
    fields_of,
    lengths_of,
    num_samples,
    split,
    tensors_of,
    to_device,
    without_targets,
)
from sixfold.plan import Plan
from sixfold.program import Program, check, evaluation, post_ahead, training
from sixfold.simulate import Timeline
from sixfold.state import ModelState

Purpose = Literal["training", "rehearsal", "evaluation"]


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
        self._posts_ahead = is_duplex(mesh.device)
        self._streams = streams
        self._state = state
        self._loss_form = loss_form
        self._sequences = sequences
        self.cast = compute_type(asked.precision.compute)
        """Type of the module's floating inputs; None: as they are given."""

    def play(
        self, what: str, purpose: Purpose, batch: Batch, step: int, last_weight: float | None
    ) -> StepResult:
        """Play this rank's program for `batch`.

        Args:
            what: the call it is for.
            step: updates done.
            last_weight: global weight of the update before; None for the first.
        """
        micros = split(batch, self._micro)
        common = self._in_common(batch, len(micros)) if self._layout.expert > 1 else 0
        if not self._loss_form.is_settled:
            self._settle(batch)
        most = self._state.largest(what, len(micros))
        self._compare(batch)
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
        programs = self._programs(purpose, len(micros), num_served, num_reduces)

        cut, shift = self._sequences, self._loss_form.shift
        pieces = list(map(partial(cut.piece, shift=shift), micros))
        run = partial(self._run, step, scale, pieces)
        kinds = [self._kind(piece.batch) for piece in pieces] if self._mesh.pipe_ranks > 1 else ()
        enter = (lambda micro: cut.enter(pieces[micro])) if cut.is_cut else None
        work = Work(run, scale, counts, kinds, enter)
        try:
            return self.player.play(programs[self._mesh.pipe_rank], work)
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
        args, kwargs = self._arguments(piece, scale)
        with self.stream(step, micro, stage=stage.number):
            output = stage(received, args, kwargs)
            return self._read(output, piece, scale) if stage.is_last else output

    def _arguments(self, piece: Piece, scale: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The loss function sees targets and weights as they were given; only the module's inputs are cast.
        inputs = piece.batch if self.cast is None else to_device(piece.batch, self._mesh.device, self.cast)
        args, kwargs = fields_of(inputs, self._module.forward, all_of_them=self._loss_form.loss_fn is None)
        if self._loss_form.shift is not None:
            kwargs["num_items_in_batch"] = scale
        return args, kwargs

    def _read(self, output: Any, piece: Piece, scale: float) -> Share:
        return self._loss_form.read(
            output, piece.batch, scale, part=piece.share, least=piece.least, items=piece.targets
        )

    def _compare(self, batch: Batch) -> None:
        """Compare the batches of ranks that are to have the same, before anything is sent whose shape follows
        from them. A collective.

        Raises:
            ModelError: they differ; on every rank.
        """
        mesh = self._mesh
        if mesh.num_fed == 1:
            return
        is_first = mesh.pipe_rank == mesh.place("tensor") == mesh.place("context") == 0
        told = (mesh.data_rank + 1) * checksum(batch)
        (difference,) = mesh.total(_taken_out(told, mesh.num_fed, is_first=is_first))
        _refuse_different(difference, mesh.num_fed)

    def compare_written_out(self, batch: Batch) -> None:
        """The same before a forward of a written-out loop, among those who run it together; others may run
        fewer. A collective of them."""
        group = self._mesh.along("tensor")
        if group.num_ranks > 1:
            told = _taken_out(checksum(batch), group.num_ranks, is_first=group.place == 0)
            difference = torch.tensor([told], dtype=torch.float64, device=self._mesh.device)
            group.all_reduce(difference).wait()
            _refuse_different(float(difference), group.num_ranks)

    def _kind(self, batch: Batch) -> Kind:
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(batch))
        return (*shapes, torch.is_grad_enabled(), self._module.training)

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

    def _settle(self, batch: Batch) -> None:
        if self._sequences.is_cut:
            if num_samples(batch):
                self._sequences.piece(batch, shift=None)  # refuses what cannot be cut at all
            self._compare(batch)
        short = self._sequences.short(batch)
        found_on = to_device(short, self._mesh.device, self.cast)

        def run(kwargs: Mapping[str, Any]) -> Any:
            return self._output_of((), kwargs)

        with self._trying("settle", self._loss_form.num_trials(found_on), found_on) as arrive:
            self._loss_form.settle(found_on, run, self._streams, self._mesh, arrive, has_loss=self._has_loss)
        if self._sequences.is_cut:
            self._try_cut(short)

    @contextmanager
    def _trying(self, what: str, num_trials: int, batch: Batch) -> Iterator[Callable[[], object]]:
        """Inside, this rank runs the model `num_trials` times, and ranks that run it less often serve the
        others; gives what it calls when it has."""
        if self._layout.pipe == 1:
            if self._layout.expert > 1:  # ranks wait for each other's tokens
                with torch.no_grad():
                    bare = to_device(without_targets(batch), self._mesh.device, None)
                    for _ in range(num_trials, self._mesh.largest(num_trials)):
                        self._output_of(*self._arguments(Piece(bare), 1.0))
            yield lambda: self._state.arrive(what)
            return
        most = self._state.largest(what, num_trials)
        self._compare(batch)
        if self._residency.parameters and not num_trials:
            with torch.no_grad():
                for _ in range(most):
                    self._pass_through(self._programs("evaluation", 0, 1), Work(_nothing))
        yield lambda: None

    def _try_cut(self, short: Batch) -> None:
        """Raise ModelError, on every rank, unless the model gives the same for sequences that are cut."""
        tried = [short, *self._sequences.padded(short)] if num_samples(short) else []
        errors, sums = [0.0, 0.0], self._loss_form.shift is not None  # means may weigh padded parts unequally
        was_training = self._module.training
        self._module.eval()
        with (
            self._trying("cut", 2 * len(tried), short) as arrive,
            torch.no_grad(),
            self._streams.keyed("settle"),
            off_zero(self._module),
            self._sequences.noting() as refused,
        ):
            for number, each in enumerate(tried):
                errors[number] = self._difference_of_cut(each, compares_loss=not number or sums)
            arrive()
        self._module.train(was_training)
        is_narrow = next((each.itemsize < 4 for each in self._module.parameters()), False)
        self._sequences.judge(errors[0], errors[1], refused, is_narrow=is_narrow, is_bad=self._mesh.any)

    def _difference_of_cut(self, short: Batch, *, compares_loss: bool) -> float:
        """How far outputs and loss for pieces are from those for whole sequences, relative to these."""
        whole, piece = Piece(short), self._sequences.piece(short, shift=self._loss_form.shift)
        found = []
        for each in (whole, piece):
            each = replace(each, batch=to_device(each.batch, self._mesh.device, None))
            with self._sequences.running(each):
                output = self._output_of(*self._arguments(each, 1.0))
            has_loss = compares_loss and self._has_loss
            found.append((output, self._read(output, each, 1.0).value if has_loss else torch.zeros(())))
        (expected, loss), (output, part) = found
        total = part.detach().double().reshape(1)
        self._mesh.along("context").all_reduce(total).wait()
        return self._sequences.difference(expected, output, piece, float(loss), float(total))

    def _output_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's output, None on ranks that have not the last stage."""
        if self._layout.pipe == 1:
            return self._module(*args, **kwargs)
        outputs: list[Any] = []

        def run(number: int, micro: int, received: Any) -> Any:
            stage = self._stages[number]
            try:
                output = stage(received, args, kwargs)
            except TypeError as error:  # the other stages wait, so it cannot be tried another way
                raise ModelError(
                    f"{type(self._module).__name__} with num_items_in_batch: {error}",
                    rule="a model that takes any keyword argument is asked whether it divides its loss by it",
                    fix="give a loss_fn to sixfold.initialize",
                ) from error
            if not stage.is_last:
                return output
            outputs.append(output)
            return Share(torch.zeros(()), None)

        self._pass_through(self._programs("evaluation", 1), Work(run, kinds=[self._kind((args, kwargs))]))
        return outputs[0] if outputs else None

    def _programs(
        self, purpose: Purpose, num_micro: int, num_served: int = 0, num_reduces: int = 1
    ) -> tuple[Program, ...]:
        return programs_for(
            self._layout,
            purpose,
            num_micro,
            num_served,
            num_reduces,
            cuts=bool(self._residency.parameters),
            posts_ahead=self._posts_ahead,
        )

    def _pass_through(self, programs: tuple[Program, ...], work: Work) -> None:
        self.player.pass_through(programs[self._mesh.pipe_rank], work)


def _taken_out(told: int, num_ranks: int, *, is_first: bool) -> float:
    """What sums to 0 over ranks that are told the same, and else does not: all is exact in fp64."""
    return float((num_ranks - 1 if is_first else -1) * told)


def _refuse_different(difference: float, num_ranks: int) -> None:
    if difference:
        raise ModelError(
            f"{num_ranks} ranks that work on the same samples were given different batches",
            rule="ranks that differ in pipe, tensor or context see the same batch; which part of the global "
            "one it is says engine.data_rank of engine.data_ranks, not the rank",
            fix="draw it by engine.data_rank, for example DistributedSampler(data, "
            "num_replicas=engine.data_ranks, rank=engine.data_rank)",
        )


def _nothing(stage: int, micro: int, received: Any) -> Any:
    raise AssertionError("a rank without micro-batches runs none")


@lru_cache(maxsize=64)
def programs_for(
    layout: LayoutConfig,
    purpose: Purpose,
    num_micro: int,
    num_served: int = 0,
    num_reduces: int = 1,
    *,
    cuts: bool = False,
    posts_ahead: bool = False,
) -> tuple[Program, ...]:
    """The programs of all ranks of a pipeline, checked.

    Args:
        num_micro: micro-batches of this rank.
        num_served: further ones that only other data ranks have.
        num_reduces: reductions of each stage in an update.
        cuts: whether parameters are cut. Then breadth-first, which runs many passes of a stage in a row, has
            it whole for all of them; elsewhere blocks are gathered as they run.
        posts_ahead: whether receives may move past sends; see `is_duplex`.
    """
    name, num_ranks, num_virtual = layout.schedule or "1f1b", layout.pipe, layout.virtual_stages
    longest = None if cuts and name == "breadth-first" else 0
    if purpose == "evaluation":
        programs = evaluation(
            name, num_ranks, num_micro, num_virtual, num_served=num_served, longest_window=longest
        )
    else:
        programs = training(
            name,
            num_ranks,
            num_micro,
            num_virtual,
            num_served=num_served,
            num_reduces=num_reduces,
            longest_window=longest,
            updates=purpose == "training",
        )
    check(programs)
    return tuple(map(post_ahead, programs)) if posts_ahead else programs
