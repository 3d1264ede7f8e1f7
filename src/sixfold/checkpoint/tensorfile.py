"""The safetensors format: which bytes of which file hold which tensor, and tensors as bytes.

`writing` plans files here from names, dtypes and shapes alone, before any data is touched, so every
writer that knows the same names arrives at the same files. A file is an 8-byte little-endian length,
a JSON header of that length, then the tensors' bytes without gaps. This module opens no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sixfold.checkpoint.files import CHUNK_BYTES

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The format's tags for number types."""

TAGS = {dtype: tag for tag, dtype in DTYPES.items()}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A logical tensor without its numbers: global shape, and type as written."""

    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where one whole tensor lies: bytes `start` to `stop`, counted from the start of the file."""

    name: str
    spec: Spec
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """One file as planned: its name, its first bytes, and its tensors in the order they lie."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        return self.slots[-1].stop


def plan_files(part: str, specs: Mapping[str, Spec], max_file_bytes: int) -> tuple[TensorFile, ...]:
    """Lay tensors into `<part>.safetensors`, or into several numbered files of at most that much data.

    Tensors keep the given order from file to file; one larger than a file gets a file of its own.
    """
    groups: list[list[str]] = []
    filled = 0
    for name, spec in specs.items():
        size = spec.num_bytes
        if not groups or filled + size > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    names = [f"{part}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [f"{part}.safetensors"]
    return tuple(
        _lay_out(file, {name: specs[name] for name in group})
        for file, group in zip(names, groups, strict=True)
    )


def _lay_out(file: str, specs: Mapping[str, Spec]) -> TensorFile:
    # Wide types first keeps every tensor aligned to its own element size, so readers can map the file.
    ordered = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in ordered:
        offsets[name] = (end, end + specs[name].num_bytes)
        end = offsets[name][1]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name in ordered:
        spec = specs[name]
        entries[name] = {
            "dtype": TAGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": list(offsets[name]),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    at = len(header)
    slots = (Slot(name, specs[name], at + offsets[name][0], at + offsets[name][1]) for name in ordered)
    return TensorFile(file, header, tuple(slots))


class HeaderError(ValueError):
    """The header of a safetensors file does not describe the file."""


def slots_in(header: bytes | bytearray, file_bytes: int) -> tuple[Slot, ...]:
    """The tensors that a header, without its length, places in a file of so many bytes.

    Raises:
        HeaderError: they cannot lie there, or have a type that torch does not have.
    """
    at = 8 + len(header)
    slots = []
    try:
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise HeaderError(f"{name!r} has the type {entry['dtype']!r}, which is not known here")
            slot = Slot(name, Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]]), at + begin, at + end)
            if not 0 <= begin <= end or end - begin != slot.spec.num_bytes or slot.stop > file_bytes:
                raise HeaderError(f"{name!r} does not fit into its {file_bytes} bytes: it is cut short")
            slots.append(slot)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, HeaderError) else HeaderError(f"its header: {error!r}") from error
    return tuple(slots)


def index_json(files: Sequence[TensorFile]) -> bytes:
    """The index that tells readers of safetensors which of several files holds which tensor."""
    total = sum(slot.stop - slot.start for file in files for slot in file.slots)
    where = {slot.name: file.name for file in files for slot in file.slots}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes: a view of its own memory where it is contiguous and on the host, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def chunks_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Its bytes as `dtype` in row-major order, a chunk in memory at a time."""
    flat = tensor.detach().reshape(-1)
    step = CHUNK_BYTES // max(dtype.itemsize, flat.dtype.itemsize)
    for start in range(0, flat.numel(), step):
        yield bytes_of(flat[start : start + step].to(dtype))
