"""The engine: the object users train with.

Made by `initialize`; holds the rooms' objects and forwards to them. It owns no algorithm: programs
come from `program`, are played by `pipeline`, change `state`; files are written by `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ConfigError
from sixfold.checkpoint import Keep
from sixfold.checkpoint.remote import folder_at
from sixfold.config import Resolved
from sixfold.data.loader import Loader
from sixfold.engine.order import Order
from sixfold.engine.persistence import Persistence
from sixfold.launch import current_session
from sixfold.mesh import Mesh
from sixfold.models.evaluation import evaluating
from sixfold.models.moe import RoutingStatistics
from sixfold.pipeline import Batch, Playing, StepResult, WrittenOut, compare_written_out, to_device
from sixfold.plan import LearningRate, Memory, Plan
from sixfold.simulate import Timeline
from sixfold.state import BoundOptimizer, ModelState


class Engine:
    """A model being trained on every rank.

    Attributes:
        module: the user's own model.
        plan: what was decided.
        resolved: what was asked, with the origin of every value.
        mesh: which rank is where.
        state: the units behind the module's parameters.
        bound: the optimizer over them.
        learning_rate: the schedule; replace it by `ending_at` when the number of steps is settled later.
        num_steps: updates done, each from one global batch.
        num_skipped: those of them that changed nothing, because gradients overflowed in fp16. The learning
            rate's schedule counts the others.
        num_samples: samples consumed over all ranks, from which the data order goes on.
        last: what the latest update came to; None before the first.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        resolved: Resolved,
        plan: Plan,
        mesh: Mesh,
        state: ModelState,
        bound: BoundOptimizer,
        playing: Playing,
        persistence: Persistence,
        learning_rate: LearningRate,
        ending: ExitStack,
    ) -> None:
        self.module = module
        self.resolved = resolved
        self.plan = plan
        self.mesh = mesh
        self.state = state
        self.bound = bound
        self._persistence = persistence
        self._saving = persistence.saving
        self.learning_rate = learning_rate
        self.num_steps = 0
        self.num_skipped = 0
        self.num_samples = 0
        self.last: StepResult | None = None
        self._last_weight: float | None = None
        self._ending = ending
        self._playing = playing
        self._scaler = playing.scaler
        self._written_out = WrittenOut(playing.player)
        self._order = Order(playing.player, self._written_out, bound.average, mesh.geometry)

    # What this rank is and has.

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, the user's own object; the first where several were handed over."""
        return self.bound.inners[0]

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank feeds, from 0."""
        return self.mesh.data_rank

    @property
    def data_ranks(self) -> int:
        """Parts that the global batch is divided into."""
        return self.mesh.data_ranks

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.mesh.device

    def loader(self, dataset: Any, **options: Any) -> Loader:
        """This rank's part of every global batch of a map-style dataset, from `num_samples` on.

        Args:
            options: `shuffle`, `collate`, `num_workers`, `drop_last` of `sixfold.data.loader.Loader`.

        Raises:
            ConfigError: the global batch is not configured in samples.
        """
        size = self.resolved.config.batch.global_
        if size is None:
            raise ConfigError(
                f"engine.loader with batch.global = {size}",
                rule="the loader cuts global batches, so it must know their number of samples",
                fix='set batch.global, for example config={"batch": {"global": 32}}',
            )
        return Loader(
            dataset,
            global_batch=size,
            seed=self.resolved.config.seed,
            data_rank=self.data_rank,
            data_ranks=self.data_ranks,
            start=self.num_samples,
            **options,
        )

    # One update from one batch.

    def train_step(self, batch: Batch) -> float:
        """One update from this rank's part of the global batch.

        Args:
            batch: a mapping (passed by keyword), tuple or list (by position) or tensor, samples along
                dim 0; None or zero samples are an empty share. Ranks may hold unequal parts.

        Returns:
            The mean loss over the global batch before this update, the same on every rank.
        """
        self._order.check_idle("train_step")
        with self._updating():
            self.last = self._playing.play("train_step", "training", batch, self.num_steps, self._last_weight)
        return self.last.loss

    def timed_step(self, batch: Batch) -> Timeline:
        """`train_step`, with the times of all its instructions on the ranks of this rank's pipeline.

        Every rank calls it. The timeline is laid beside a predicted one by `sixfold.simulate.html_page`.
        """
        with self._playing.recording() as found:
            self.train_step(batch)
        return found[0]

    def eval_step(self, batch: Batch) -> StepResult:
        """Loss of this rank's part of a global batch, in evaluation mode, without learning from it.

        Returns:
            Mean loss and its weight, the same on every rank; nan and 0 where no rank has a sample.
        """
        with evaluating(self.module), torch.no_grad():
            return self._playing.play("eval_step", "evaluation", batch, self.num_steps, self._last_weight)

    def rehearse(self, batch: Batch) -> None:
        """Play a step without its update: forwards, backwards and reduction, for timing.

        Parameters, optimizer state and random streams stay as they are; buffers are put back.
        """
        self._order.check_idle("rehearse")
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        try:
            self._playing.play("rehearse", "rehearsal", batch, self.num_steps, self._last_weight)
        finally:
            with torch.no_grad():
                for name, buffer in self.module.named_buffers():
                    buffer.copy_(buffers[name])
            self._playing.routing.forget()

    # The same, written out.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch; returns the module's own output.

        Without gradients (`torch.no_grad`) it is the module's forward and nothing is counted.
        """
        self._order.check_whole("engine(...)")
        cast = self._playing.cast
        args, kwargs = to_device(args, self.device, cast), to_device(kwargs, self.device, cast)
        self.state.begin_forward()
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        self._playing.routing.refuse_written_out()
        batch: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        compare_written_out(batch, self.mesh)
        with (
            self._written_out.forward(batch) as place,
            self._playing.stream(self.num_steps, *place),
        ):
            return self.module(*args, **kwargs)

    def backward(
        self, loss: torch.Tensor, *, weight: float | None = None, retain_graph: bool = False
    ) -> None:
        """Backward of a mean loss; gradients accumulate until `step`.

        Args:
            loss: mean over the micro-batch, one number.
            weight: what it is a mean over (targets, say); None: the micro-batch's samples. `step`
                divides by the sum of weights over micro-batches and ranks.
            retain_graph: keep the graph for a further backward.
        """
        self._order.check_open("backward")
        self._order.check_whole("engine.backward")
        self._written_out.backward(loss, weight, retain_graph=retain_graph)

    def step(self) -> StepResult:
        """One update from the backwards since the last one; every rank calls it, with or without any."""
        self._order.check_open("step")
        self._order.check_whole("engine.step")
        self.state.arrive("step")
        with self._updating():
            self.last = self._written_out.step()
        return self.last

    # The whole model.

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[nn.Module]:
        """The whole model, readable and writable; edits hold afterwards, on every rank. Every rank calls it.

        Under a narrower compute type edits are taken over from the working parameters; numbers that
        were not edited keep their full precision.

        Args:
            parameters: which are needed; None for all. Where parameters are cut only their units are
                gathered, and others may not be touched.
        """
        self._order.check_idle("gathered")
        self.state.arrive("gathered")
        with self.state.edits.lent(parameters), self._order.lent("gathered"):
            yield self.module

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole logical model on the CPU, in the storage type, tied names included; copies.

        Every rank calls it and gets all of it.
        """
        self._order.check_trained("full_state_dict")
        self.state.arrive("full_state_dict")
        return self._persistence.full_state_dict()

    @contextmanager
    def ema(self) -> Iterator[nn.Module]:
        """The module with averaged weights in place of the trained ones, to evaluate; every rank calls it.

        Inside, `eval_step` and forwards without gradients work; what changes or saves the state is refused,
        and edits of trained weights are forgotten. For its time this rank's working parameters are there
        twice.
        """
        average = self._order.average("ema")
        self._order.check_idle("ema")
        self.state.arrive("ema")
        with torch.no_grad(), self.state.shown(average.numbers), self._order.lent("ema"):
            yield self.module

    def ema_state_dict(self) -> dict[str, torch.Tensor]:
        """`full_state_dict` with averaged weights in place of the trained ones; every rank calls it."""
        average = self._order.average("ema_state_dict")
        self.state.arrive("ema_state_dict")
        return self._persistence.full_state_dict(average)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The last update's gradient of every trained parameter, whole, as the optimizer got it; copies.

        Every rank calls it. `parameter.grad` shows it only where gradients and optimizer are whole.
        """
        self._order.check_ended("gradients")
        self.state.arrive("gradients")
        return self.state.gradients()

    def routing(self) -> dict[str, RoutingStatistics]:
        """How the last update's tokens were shared out over experts, over all ranks, by name of the router.

        In a pipeline each rank knows of the layers it has.
        """
        return self._playing.routing.statistics()

    def memory(self) -> Memory:
        """What this rank holds from step to step, in bytes; see `sixfold.plan.persistent_memory`."""
        parameters, gradients, master = self.state.live_bytes()
        average = self.bound.average.live_bytes() if self.bound.average is not None else 0
        return Memory(parameters, gradients, master, self.bound.live_bytes(), average)

    def save(
        self,
        folder: str | Path,
        *,
        only: str | None = None,
        wait: bool | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Write a checkpoint; every rank calls it and writes its own part. See `sixfold.checkpoint`.

        Args:
            only: a part of the model: "adapters" for what is trained beside frozen parameters, or a
                pattern of names such as "*.lora_*". State of the optimizer comes along where all that is
                trained does.
            wait: False copies the state to host memory and goes on while it is written; its end is
                noticed by later steps, and for certain by `wait_for_save`. None: as configured.
            keep: which checkpoints beside it stay once it is complete. None: all.

        Raises:
            SaveError: it could not be written, or an earlier save was not; on every rank. What was in
                `folder` before is untouched.
            CheckpointError: it cannot be saved at all, or another one is being written and
                `checkpoint.when_busy` is "refuse".
        """
        self._order.check_idle("save")
        self.state.arrive("save")
        counters = {
            "step": self.num_steps,
            "samples": self.num_samples,
            "skipped": self.num_skipped,
            "loss_scale": self._scaler.state(),
            "seed": self.resolved.config.seed,
            "num_steps": self.learning_rate.num_steps,
            "last_weight": self._last_weight,
            "routing": self._playing.routing.state(),
        }
        self._persistence.save(folder_at(folder), counters, only=only, wait=wait, keep=keep)

    def rehearse_save(self, folder: str | Path) -> None:
        """Find out whether checkpoints can be saved into a folder; every rank calls it, best at the start.

        A tiny checkpoint is written by all ranks, read by all ranks, and removed again.

        Raises:
            SaveError: the folder cannot be written, is not the same on every rank, or has no room for one
                checkpoint (state that the optimizer does not have yet is counted in).
        """
        self._order.check_idle("rehearse_save")
        self.state.arrive("rehearse_save")
        self._persistence.rehearse(folder_at(folder))

    def wait_for_save(self) -> None:
        """Return when a save begun with `wait=False` is complete; every rank calls it.

        Raises:
            SaveError: it could not be written; on every rank.
        """
        if self._saving.is_under_way:
            self.state.arrive("wait_for_save")
            self._persistence.wait()

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint: weights, optimizer, counters; every rank calls it and reads its part.

        A part of a model (`save(only=...)`) replaces that part; without state of training it leaves
        optimizer and counters alone. So do weights that other tools saved, a folder of safetensors files or
        one such file: they are converted to the model's number types and read straight into place.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing was changed, unless a foreign file
                became unreadable on the way.
        """
        self._order.check_idle("load")
        self.state.arrive("load")
        counters = self._persistence.load(folder_at(folder))
        if counters is not None:
            self.num_steps, self.num_samples = int(counters["step"]), int(counters["samples"])
            self.num_skipped = int(counters.get("skipped", 0))
            self._scaler.load(counters.get("loss_scale"))
            self._last_weight = counters["last_weight"]
            self._playing.routing.load(counters.get("routing"))

    def close(self) -> None:
        """End what `initialize` started, the process group too; take hooks and forwards off the module.

        Where parameters are cut, the module has no numbers afterwards: save them before.

        Raises:
            SaveError: a save begun with `wait=False` could not be written.
        """
        if self._order.is_closed:
            return
        self._order.is_closed = True
        with closing(self.mesh), self._ending:
            self.wait_for_save()

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Around an update, which leaves its result in `last`; nothing of one that is refused is counted."""
        current_session().step = self.num_steps + 1
        if self.learning_rate.moves:
            self.bound.set_lr(self.learning_rate.factor(self.num_steps - self.num_skipped))
        try:
            yield
        except BaseException:
            self._playing.routing.forget()
            raise
        assert self.last is not None, "left there"
        self._count_update(self.last)

    def _count_update(self, result: StepResult) -> None:
        # Until here ranks may take long: kernels are chosen, modules compiled.
        if self.mesh.dispatcher.phase_name != "step":
            self.mesh.dispatcher.enter("step")
        self.num_steps += 1
        self.num_skipped += result.skipped
        self.num_samples += result.samples
        self._last_weight = result.weight
        # Balance follows updates that changed weights.
        if result.skipped:
            self._playing.routing.forget()
        else:
            self._playing.routing.end_update()
        self._saving.look()  # here every rank is at the same point
