"""All parameters of a model, whichever rank has them: what checkpoints and whole views of it count with.

Made once by `ModelState`. Where an axis cuts the model, ranks tell each other which stages and pieces they
have; elsewhere nothing is exchanged. It holds no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sixfold.mesh import Mesh
from sixfold.parallel import DTYPES, torch_name
from sixfold.plan import Place
from sixfold.state.unit import Unit


@dataclass(frozen=True)
class Entry:
    """One parameter, under its first name.

    Args:
        shape: its global shape.
        trainable: whether it gets gradients.
        group: the optimizer group it belongs to.
        storage: type in which it is shown whole and written, as torch names it.
        working: of forward and backward.
        master: of what the optimizer updates.
        grad: of its gradients, "" for a frozen one.
        sources: ranks that together have all of it, each with its piece; None for the whole.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool
    group: int
    storage: str
    working: str
    master: str
    grad: str
    sources: tuple[tuple[int, Place | None], ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Catalog:
    """The parameters of all stages.

    Args:
        entries: by name, in module order.
        units: of each trained unit the names, in the order of its slots.
    """

    entries: dict[str, Entry]
    units: tuple[tuple[str, ...], ...]

    @property
    def trained(self) -> list[Entry]:
        """Those with gradients."""
        return [entry for entry in self.entries.values() if entry.trainable]


def storage_type(unit: Unit) -> torch.dtype:
    """The type in which a unit's parameters are shown whole and written."""
    if unit.precision is None or not unit.plan.trainable:
        return unit.master.dtype
    return DTYPES[unit.precision.storage]


def make_catalog(names: Iterable[str], units: Sequence[Unit], mesh: Mesh) -> Catalog:
    """Put together what all ranks hold; a collective where an axis cuts the model.

    Args:
        names: of all parameters of the model, in module order.
        units: this rank's.
    """
    entries = [_entry(unit, place, mesh.rank) for unit in units for place in range(len(unit.plan.slots))]
    trained = [[slot.name for slot in unit.plan.slots] for unit in units if unit.plan.trainable]
    if mesh.geometry.cuts_model:
        # Ranks of which each has another part of the model, or of a parameter; copies say the same.
        is_copy = mesh.geometry.replica(mesh.rank) >= mesh.geometry.expert
        rows = [json.loads(text) for text in mesh.texts(_told([] if is_copy else entries, trained))]
        entries = [_read(each) for row in rows for each in row[0]]
        trained = [unit for row in rows for unit in row[1]]
    found: dict[str, Entry] = {}
    for entry in entries:
        known = found.setdefault(entry.name, entry)
        if all(place != entry.sources[0][1] for _, place in known.sources):
            found[entry.name] = replace(known, sources=known.sources + entry.sources)
    order = {name: found[name] for name in names if name in found}
    return Catalog(order, tuple(dict.fromkeys(map(tuple, trained))))


def _told(entries: Sequence[Entry], trained: Sequence[Sequence[str]]) -> str:
    return json.dumps([[asdict(entry) for entry in entries], trained])


def _read(told: Mapping[str, Any]) -> Entry:
    (rank, place) = told["sources"][0]
    if place is not None:
        spans = tuple(tuple((start, stop) for start, stop in spans) for spans in place["spans"])
        place = Place(tuple(place["shape"]), spans, tuple(place["axes"]), tuple(place["partial"]))
    return Entry(**{**told, "shape": tuple(told["shape"]), "sources": ((rank, place),)})


def _entry(unit: Unit, place: int, rank: int) -> Entry:
    slot = unit.plan.slots[place]
    kinds = (storage_type(unit), unit.working.dtype, unit.master.dtype)
    storage, working, master = map(torch_name, kinds)
    grad = torch_name(unit.grads.dtype) if unit.grads is not None else ""
    # Whole in every rank's hands, though its gradient may not be.
    source = (rank, slot.place if slot.place and slot.place.axes else None)
    return Entry(
        slot.name,
        slot.whole_shape,
        unit.plan.trainable,
        slot.group,
        storage,
        working,
        master,
        grad,
        (source,),
    )
