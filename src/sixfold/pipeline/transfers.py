"""What goes from stage to stage: tensors in any nesting of tuples, lists and dictionaries.

Called by the player. A message tells structure, shapes and types only when they are new for micro-batches of
this kind; both ends see the same micro-batches, so both know when. It plays nothing and keeps no result.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sixfold.base.errors import ModelError
from sixfold.mesh import Link, Mesh, Pending, is_duplex
from sixfold.parallel import torch_name, torch_type
from sixfold.pipeline.batch import Batch, tensors_of

Kind = tuple[Any, ...]
"""What the shapes of a stage's output depend on: those of its micro-batch, and whether it learns."""


def kind_of(batch: Batch, module: nn.Module) -> Kind:
    """That of a micro-batch of `module`."""
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(batch))
    return (*shapes, torch.is_grad_enabled(), module.training)


Way = tuple[int, int, int]
"""What is sent: from stage, to stage, micro-batch."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a message.

    Args:
        dtype: as torch names it.
        learns: whether it has a gradient, which comes back.
    """

    shape: tuple[int, ...]
    dtype: str
    learns: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Leaf:
        """What is told of `tensor`."""
        return cls(tuple(tensor.shape), torch_name(tensor.dtype), tensor.requires_grad)

    def empty(self, device: torch.device) -> torch.Tensor:
        """A tensor like it."""
        return torch.empty(self.shape, dtype=torch_type(self.dtype), device=device)


@dataclass(frozen=True)
class Form:
    """Structure of a message: nested JSON with numbers of leaves in it, and the leaves."""

    tree: Any
    leaves: tuple[Leaf, ...]

    def text(self) -> str:
        """As a message."""
        return json.dumps([self.tree, [[leaf.shape, leaf.dtype, leaf.learns] for leaf in self.leaves]])

    @classmethod
    def read(cls, text: str) -> Form:
        """Inverse of `text`."""
        tree, leaves = json.loads(text)
        return cls(tree, tuple(Leaf(tuple(shape), dtype, learns) for shape, dtype, learns in leaves))


@dataclass(frozen=True)
class Received:
    """What a stage takes up.

    Args:
        value: nested tensors.
        learning: leaves of a graph of its own that those of `value` that learn come from, in order.
    """

    value: Any = None
    learning: tuple[torch.Tensor, ...] = ()

    def gradients(self) -> list[torch.Tensor]:
        """Of `learning`, after the backward; zeros where the stage did not use one."""
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in self.learning]


def form_of(value: Any) -> tuple[Form, list[torch.Tensor]]:
    """The form of a nested value, and its tensors in order."""
    tensors: list[torch.Tensor] = []
    tree = _flatten(value, tensors)
    return Form(tree, tuple(map(Leaf.of, tensors))), tensors


def received(form: Form, tensors: Sequence[torch.Tensor]) -> Received:
    """What a stage takes up of `tensors`, which have come from another stage."""
    pairs = zip(form.leaves, tensors, strict=True)
    leaves = [tensor.detach().requires_grad_(leaf.learns) for leaf, tensor in pairs]
    given = [_alias(leaf) if leaf.requires_grad else leaf for leaf in leaves]
    return Received(_nest(form.tree, given), tuple(leaf for leaf in leaves if leaf.requires_grad))


def _alias(leaf: torch.Tensor) -> torch.Tensor:
    alias: torch.Tensor = _Alias.apply(leaf)  # type: ignore[no-untyped-call]
    return alias


class _Alias(torch.autograd.Function):
    """The same memory as no leaf, so that a stage may change it in place, which torch refuses for leaves and
    their views."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return len(tensors) - 1
    # Of these types alone: what is derived from them (named tuples, ModelOutput) would come out as they are.
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _flatten(each, tensors) for key, each in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_flatten(each, tensors) for each in value]}
    if value is None:
        return None
    raise ModelError(
        f"a stage that ends with a {type(value).__name__}",
        rule="stages hand on tensors, in tuples, lists and dictionaries with text keys, not in types derived "
        "from those",
        fix="return tensors from the block at which the model is cut, or cut elsewhere with layout.balance",
    )


def _nest(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if tree is None or isinstance(tree, int):
        return None if tree is None else tensors[tree]
    (kind, inside), *_ = tree.items()
    if kind == "dict":
        return {key: _nest(each, tensors) for key, each in inside.items()}
    return (list if kind == "list" else tuple)(_nest(each, tensors) for each in inside)


@dataclass
class Message:
    """A message on its way to this rank.

    Args:
        known_by: under which its form is known; None where `form` is given.
    """

    known_by: tuple[int, Kind] | None = None
    form: Form | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)


class _Inbox:
    """Messages from one other rank, in the order in which it sends them.

    Args:
        waits: whether a form that is not known yet is waited for where its message is expected.
    """

    def __init__(
        self, link: Link, device: torch.device, forms: dict[tuple[int, Kind], Form], *, waits: bool
    ) -> None:
        self._waits = waits
        self._link = link
        self._device = device
        self._forms = forms
        self._unposted: deque[Message] = deque()

    def expect(self, message: Message) -> Message:
        """Start to receive a message, as soon as forms of this and earlier ones are known."""
        self._unposted.append(message)
        while self._unposted and (self._waits or self._find(self._unposted[0])):
            self._post_first()
        return message

    def take(self, message: Message) -> list[torch.Tensor]:
        """Wait for the tensors of a message."""
        while message in self._unposted:
            self._post_first()
        for pending in message.pending:
            pending.wait()
        return message.tensors

    def _find(self, message: Message) -> bool:
        if message.form is None and message.known_by is not None:
            message.form = self._forms.get(message.known_by)
        return message.form is not None

    def _post_first(self) -> None:
        message = self._unposted.popleft()
        if not self._find(message):
            assert message.known_by is not None, "its form is told"
            message.form = self._forms[message.known_by] = Form.read(self._told())
        assert message.form is not None, "found or told"
        message.tensors = [leaf.empty(self._device) for leaf in message.form.leaves]
        message.pending = [self._link.receive(tensor) for tensor in message.tensors]

    def _told(self) -> str:
        size = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._link.receive(size).wait()
        words = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self._link.receive(words).wait()
        return bytes(words.tolist()).decode()


class Transfers:
    """Sends and receives of one rank of a pipeline.

    Args:
        rank_of: the place in the pipeline that has a stage.
    """

    def __init__(self, mesh: Mesh, rank_of: Callable[[int], int]) -> None:
        self._mesh = mesh
        self._rank_of = rank_of
        self._inboxes: dict[int, _Inbox] = {}
        self._sent_forms: dict[tuple[int, Kind], Form] = {}
        self._told_forms: dict[tuple[int, Kind], Form] = {}
        self._sent: dict[Way, list[tuple[Pending, torch.Tensor]]] = {}

    def is_local(self, stage: int, other: int) -> bool:
        """Whether two stages are on one rank."""
        return self._rank_of(stage) == self._rank_of(other)

    def send_activation(self, stage: int, micro: int, kind: Kind, value: Any) -> None:
        """Start to send what `stage` has computed to the next one.

        Raises:
            ModelError: micro-batches of one kind gave outputs of two forms.
        """
        form, tensors = form_of(value)
        way = stage, stage + 1, micro
        known = self._sent_forms.setdefault((stage, kind), form)
        if known is form:
            self._tell(way, form.text())
        elif known != form:
            raise ModelError(
                f"stage {stage} has computed {form.leaves} from a micro-batch whose like gave {known.leaves}",
                rule="what stages hand on has a shape that follows from the shapes of the micro-batch",
                fix="pad to one shape inside the model, or cut it elsewhere with layout.balance",
            )
        self._send(way, tensors)

    def receive_activation(self, stage: int, kind: Kind) -> Message:
        """Start to receive what the stage before `stage` sends."""
        return self._inbox(stage - 1).expect(Message(known_by=(stage - 1, kind)))

    def take_activation(self, stage: int, message: Message) -> Received:
        """Wait for it."""
        tensors = self._inbox(stage - 1).take(message)
        assert message.form is not None, "it has arrived"
        return received(message.form, tensors)

    def send_gradient(self, stage: int, micro: int, gradients: Sequence[torch.Tensor]) -> None:
        """Start to send gradients of the input of `stage`, one for each tensor of it that learns."""
        self._send((stage, stage - 1, micro), gradients)

    def receive_gradient(self, stage: int, outputs: Sequence[torch.Tensor]) -> Message:
        """Start to receive the gradients of `outputs`, what a stage has sent on and learns."""
        form = Form(None, tuple(map(Leaf.of, outputs)))
        return self._inbox(stage + 1).expect(Message(form=form))

    def take_gradient(self, stage: int, micro: int, message: Message) -> list[torch.Tensor]:
        """Wait for them. What they are the gradients of has arrived then, and is let go: gloo says of a send
        that it has left only to who waits for it."""
        tensors = self._inbox(stage + 1).take(message)
        if any(tensor.numel() for tensor in tensors):
            self._let_go((stage, stage + 1, micro))
        return tensors

    @property
    def num_held(self) -> int:
        """Messages that were sent and are kept until they have left."""
        return len(self._sent)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        for way in list(self._sent):
            self._let_go(way)

    def _link(self, stage: int) -> Link:
        return self._mesh.link(self._rank_of(stage))

    def _inbox(self, stage: int) -> _Inbox:
        rank = self._rank_of(stage)
        if rank not in self._inboxes:
            self._inboxes[rank] = _Inbox(
                self._link(stage), self._mesh.device, self._told_forms, waits=not is_duplex(self._mesh.device)
            )
        return self._inboxes[rank]

    def _send(self, way: Way, tensors: Sequence[torch.Tensor]) -> None:
        _, stage, _ = way
        for tensor in tensors:
            out = tensor.detach().contiguous()
            self._sent.setdefault(way, []).append((self._link(stage).send(out), out))
        # Not waited for: a receiver that does not know a form yet takes a message later than it stands.
        for sent in list(self._sent):
            if not all(pending.has_arrived() for pending, _ in self._sent[sent]):
                break
            self._let_go(sent)

    def _let_go(self, way: Way) -> None:
        for pending, _ in self._sent.pop(way, ()):
            pending.wait()

    def _tell(self, way: Way, text: str) -> None:
        words = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self._mesh.device)
        self._send(way, [torch.tensor([words.numel()], device=self._mesh.device), words])
