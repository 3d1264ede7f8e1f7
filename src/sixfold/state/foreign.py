"""Parameters of the model that stand on other stages: on this rank they have shape and name, and no numbers.

`take_over` is called by `initialize` before units are made, `Foreign` by `ModelState`, which lends numbers
for a while where somebody wants the whole model. It changes nothing that is this rank's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sixfold.mesh import Mesh
from sixfold.parallel import Stage, torch_type
from sixfold.state.absent import ELSEWHERE, absent_class
from sixfold.state.catalog import Catalog


def take_over(model: nn.Module, stages: Sequence[Stage], mesh: Mesh, given: Collection[str] = ()) -> None:
    """Take rank 0's numbers for the parameters of `stages`, and free others. A collective in a pipeline.

    Args:
        given: parameters whose numbers are filled in afterwards.
    """
    if mesh.pipe_ranks == 1:
        return
    own = _own(stages)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in given:
                numbers = parameter.detach().to(mesh.device, copy=True).contiguous()
                _share(mesh, numbers)
                for each in own.get(name, ()):
                    each.copy_(numbers)
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
        buffer_sources: whose buffers are the model's; none in a pipeline of one stage.
    """

    def __init__(
        self,
        module: nn.Module,
        stages: Sequence[Stage],
        catalog: Catalog,
        buffer_sources: Mapping[str, int],
        mesh: Mesh,
    ) -> None:
        self._mesh = mesh
        self._module = module
        self._buffer_sources = buffer_sources
        self._catalog = catalog
        self._own = _own(stages)
        named = dict(module.named_parameters())
        self._absent = {name: parameter for name, parameter in named.items() if name not in self._own}
        names: Mapping[int, str] = {id(parameter): name for name, parameter in self._absent.items()}
        self.ids = frozenset(names)
        """Of the parameters."""
        self._classes = {
            name: (type(parameter), absent_class(parameter, names, ELSEWHERE))
            for name, parameter in self._absent.items()
        }
        self._lent: list[str] = []
        for name in self._absent:
            self._release(name)

    def _release(self, name: str) -> None:
        parameter = self._absent[name]
        parameter.untyped_storage().resize_(0)
        parameter.__class__ = self._classes[name][1]

    def everyones(
        self, mine: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        """Tensors of all stages by the names of `dtypes`, in parameters' shapes. A collective in a pipeline.

        Args:
            mine: of this rank's stages; the tensors themselves where nothing has to be sent.
            dtypes: their types.
        """
        if self._mesh.pipe_ranks == 1:
            return {name: mine[name] for name in dtypes}
        whole = {}
        for name, dtype in dtypes.items():
            entry = self._catalog.entries[name]
            if name in mine:
                whole[name] = mine[name].to(dtype).contiguous()
            else:
                whole[name] = torch.empty(entry.shape, dtype=dtype, device=self._mesh.device)
            _share(self._mesh, whole[name], entry.source)
        return whole

    @contextmanager
    def lent(self, names: set[str] | None) -> Iterator[None]:
        """Inside, parameters and buffers of other stages have numbers as well. A collective in a pipeline.

        Args:
            names: which parameters, those of this rank's stages among them; None for all.
        """
        if self._mesh.pipe_ranks == 1:
            yield
            return
        self.collect_buffers()
        self._lent = [name for name in self._catalog.entries if names is None or name in names]
        for name in self._lent:
            entry = self._catalog.entries[name]
            if name in self._absent:
                parameter = self._absent[name]
                parameter.__class__ = self._classes[name][0]
                kind = torch_type(entry.working)
                parameter.data = torch.empty(entry.shape, dtype=kind, device=self._mesh.device)
            _share(self._mesh, self._numbers(name), entry.source)
        try:
            yield
        finally:
            for name in self._lent:
                if name in self._absent:
                    self._release(name)
            self._lent = []

    def share_edits(self) -> None:
        """Give everyone what rank 0 made of what is lent. A collective in a pipeline."""
        for name in self._lent:
            numbers = self._numbers(name)
            _share(self._mesh, numbers)
            for copy in self._own.get(name, ())[1:]:
                copy.data.copy_(numbers)

    def source_of(self, buffer: str) -> int:
        """The rank whose numbers are the model's, since buffers may differ from rank to rank."""
        return self._buffer_sources.get(buffer, 0)

    def collect_buffers(self) -> None:
        """Give every rank the buffers of those whose stages use them. A collective in a pipeline."""
        for name, source in self._buffer_sources.items():
            buffer = self._module.get_buffer(name)
            if buffer.numel():
                numbers = buffer.detach().contiguous().clone()
                _share(self._mesh, numbers, source)
                with torch.no_grad():
                    buffer.copy_(numbers)

    def _numbers(self, name: str) -> torch.Tensor:
        return self._absent[name].data if name in self._absent else self._own[name][0].data
