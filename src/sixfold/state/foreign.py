"""What this rank has not of the model: parameters of other stages, which have shape and name here and no
numbers, and the other pieces of parameters that an axis cuts.

`take_over` is called by `initialize` before units are made, `Foreign` by `ModelState`, which lends numbers
for a while where somebody wants the whole model. It changes nothing that is this rank's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sixfold.mesh import Mesh
from sixfold.parallel import Stage, share_buffers, torch_type
from sixfold.parallel.pieces import piece_of, put_piece
from sixfold.plan import Place
from sixfold.state.absent import ELSEWHERE, absent_class
from sixfold.state.catalog import Catalog


def take_over(
    model: nn.Module,
    stages: Sequence[Stage],
    mesh: Mesh,
    given: Collection[str] = (),
    places: Mapping[str, Place] | None = None,
) -> None:
    """Take rank 0's numbers for what this rank has, its pieces of parameters of `stages`, and free the rest.
    A collective where an axis cuts the model.

    Args:
        given: parameters whose numbers are filled in afterwards.
        places: of which parameters which pieces are this rank's.
    """
    if not mesh.geometry.cuts_model:
        return
    own = _own(stages)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = (places or {}).get(name)
            if name not in given:
                numbers = parameter.detach().to(mesh.device, copy=True).contiguous()
                _share(mesh, numbers)
                for each in own.get(name, ()):
                    if place is None:
                        each.copy_(numbers)
                    else:
                        each.data = piece_of(numbers, place).clone()
            elif place is not None:
                for each in own.get(name, ()):
                    each.data = torch.zeros((), dtype=each.dtype, device=mesh.device).expand(place.piece)
            if name not in own:
                parameter.data = torch.empty_like(parameter)
                parameter.untyped_storage().resize_(0)


def _share(mesh: Mesh, numbers: torch.Tensor, source: int = 0) -> None:
    """Copy one rank's contiguous tensor into everyone's; as bytes, since backends do not know all types."""
    if numbers.numel():
        mesh.broadcast(numbers.view(-1).view(torch.uint8), source).wait()


def _own(stages: Sequence[Stage]) -> dict[str, list[nn.Parameter]]:
    """This rank's parameters by name; a tied weight may stand in several of its stages."""
    own: dict[str, list[nn.Parameter]] = {}
    for stage in stages:
        for name, parameter in stage.parameters.items():
            own.setdefault(name, []).append(parameter)
    return own


class Foreign:
    """What this rank's stages do not hold.

    Args:
        stages: this rank's.
        catalog: where everything is.
        places: of which parameters this rank has a piece only.
        buffer_sources: whose buffers are the model's; none in a pipeline of one stage.
    """

    def __init__(
        self,
        module: nn.Module,
        stages: Sequence[Stage],
        catalog: Catalog,
        places: Mapping[str, Place],
        buffer_sources: Mapping[str, int],
        mesh: Mesh,
    ) -> None:
        self._mesh = mesh
        self._places = places
        self._module = module
        self._buffer_sources = buffer_sources
        self._catalog = catalog
        self._own = _own(stages)
        named = dict(module.named_parameters())
        self._absent = {name: parameter for name, parameter in named.items() if name not in self._own}
        names: Mapping[int, str] = {id(parameter): name for name, parameter in self._absent.items()}
        self.names = names
        """Of the parameters, by id."""
        self._classes = {
            name: (type(parameter), absent_class(parameter, names, ELSEWHERE))
            for name, parameter in self._absent.items()
        }
        self._lent: list[str] = []
        self._pieces: dict[str, torch.Tensor] = {}
        for parameter in self._absent.values():
            parameter.untyped_storage().resize_(0)
        self._shells = {name: parameter.data for name, parameter in self._absent.items()}
        for name in self._absent:
            self._release(name)

    def _release(self, name: str) -> None:
        # What was lent is freed by its last user, who may have kept a view of it.
        parameter = self._absent[name]
        parameter.data = self._shells[name]
        parameter.__class__ = self._classes[name][1]

    def everyones(
        self, mine: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """Whole tensors by the names of `dtypes`, in parameters' shapes. A collective where an axis cuts the
        model.

        Args:
            mine: of this rank's stages, its pieces; the tensors themselves where nothing has to be sent.
            dtypes: their types.
        """
        if not self._mesh.geometry.cuts_model:
            return {name: mine[name] for name in dtypes}
        return {name: self._assembled(name, mine.get(name), dtype) for name, dtype in dtypes.items()}

    def _assembled(self, name: str, mine: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor from what its sources have of it; `mine` is this rank's piece."""
        entry = self._catalog.entries[name]
        whole = torch.empty(entry.shape, dtype=dtype, device=self._mesh.device)
        for source, place in entry.sources:
            piece = whole if place is None else whole.new_empty(place.piece)
            if mine is not None and self._mesh.rank == source:
                piece = mine.to(dtype).contiguous()
            _share(self._mesh, piece, source)
            if place is None:
                return piece
            put_piece(whole, place, piece)
        return whole

    @contextmanager
    def lent(self, names: set[str] | None) -> Iterator[None]:
        """Inside, parameters and buffers of other stages have numbers as well, and parameters are whole. A
        collective where an axis cuts the model.

        Args:
            names: which parameters, those of this rank's stages among them; None for all.
        """
        if not self._mesh.geometry.cuts_model:
            yield
            return
        self.collect_buffers()
        self._lent = [name for name in self._catalog.entries if names is None or name in names]
        for name in self._lent:
            own = self._own.get(name, [])
            mine = own[0].data if own else None
            whole = self._assembled(name, mine, torch_type(self._catalog.entries[name].working))
            if mine is None:
                self._absent[name].__class__ = self._classes[name][0]
                self._absent[name].data = whole
            elif name in self._places and self._places[name].axes:
                self._pieces[name], own[0].data = mine, whole
            else:
                mine.copy_(whole)
        try:
            yield
        finally:
            for name in self._lent:
                if name in self._absent:
                    self._release(name)
                elif name in self._pieces:
                    self._own[name][0].data = self._pieces[name]
            self._lent, self._pieces = [], {}

    def lends(self, name: str) -> bool:
        """Whether a parameter of this rank is whole now, beside its piece."""
        return name in self._pieces

    def share_edits(self) -> None:
        """Give everyone what rank 0 made of what is lent. A collective where an axis cuts the model."""
        for name in self._lent:
            numbers = self._numbers(name)
            _share(self._mesh, numbers)
            if name in self._pieces:
                numbers = piece_of(numbers, self._places[name])
                self._pieces[name].copy_(numbers)
            for copy in self._own.get(name, ())[1:]:
                copy.data.copy_(numbers)

    def source_of(self, buffer: str) -> int:
        """The rank whose numbers are the model's, since buffers may differ from rank to rank."""
        return self._buffer_sources.get(buffer, 0)

    def collect_buffers(self) -> None:
        """Give every rank the buffers of those whose stages use them. A collective in a pipeline."""
        share_buffers(self._module, self._mesh, self._buffer_sources)

    def _numbers(self, name: str) -> torch.Tensor:
        return self._absent[name].data if name in self._absent else self._own[name][0].data
