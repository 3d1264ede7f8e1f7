"""What is in a checkpoint folder: every type and shape round trips, and other tools read it as it lies."""

from __future__ import annotations

import ast
import json
import zlib
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import sixfold
from sixfold.base.errors import CheckpointError
from sixfold.base.units import item_bytes
from sixfold.checkpoint import MODEL, Content, Piece, open_checkpoint, ranges, save, untie, whole
from sixfold.checkpoint.cells import CELL_BYTES, Cells
from sixfold.checkpoint.files import CHUNK_BYTES, Buffer, Files
from sixfold.checkpoint.manifest import MANIFEST, SUMS, TAGS
from sixfold.checkpoint.sums import Tally, join_crc32, joined
from sixfold.checkpoint.tensorfile import DTYPES
from sixfold.parallel import dtype_name


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the bit, NaN and negative zero included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def _every_kind() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6) - 7
    tensors = {f"dtype.{tag}": base.abs().to(dtype) for tag, dtype in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(3.5),
        "scalar.bf16": torch.tensor(-0.0, dtype=torch.bfloat16),
        "empty": torch.empty(0, 5),
        "empty.int": torch.empty(3, 0, dtype=torch.int64),
        "odd.bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "größe/with slash": torch.randn(2),
    }


def _content(model: dict[str, torch.Tensor] | None = None, step: int = 3) -> Content:
    model = model if model is not None else {"w": torch.randn(4, 3), "b": torch.randn(4)}
    return whole(model=model, state={"step": step})


def test_a_manifest_knows_the_size_of_every_type_without_torch() -> None:
    assert {tag: dtype.itemsize for tag, dtype in DTYPES.items()} == {tag: item_bytes(tag) for tag in TAGS}


def test_the_name_of_a_type_tells_its_size() -> None:
    every = [each for each in vars(torch).values() if isinstance(each, torch.dtype)]
    assert {each: item_bytes(dtype_name(each)) for each in every} == {each: each.itemsize for each in every}


def test_every_type_and_shape_round_trips_and_safetensors_reads_the_same(tmp_path: Path) -> None:
    tensors = _every_kind()
    save(tmp_path / "c", _content(tensors))
    saved = open_checkpoint(tmp_path / "c")
    assert set(saved.model_names) == set(tensors)
    assert all(
        _same(tensor, tensors[name].detach().resolve_conj().contiguous()) for name, tensor in saved.model()
    )
    with safe_open(tmp_path / "c" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert _same(file.get_tensor(name), tensor.detach().resolve_conj().contiguous()), name


def test_tensors_lie_aligned_to_their_elements(tmp_path: Path) -> None:
    save(tmp_path / "c", _content(_every_kind()))
    for entry in open_checkpoint(tmp_path / "c").manifest.tensors:
        assert entry.start % DTYPES[entry.dtype].itemsize == 0, entry.name


def test_several_files_have_the_index_that_readers_expect(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(10, 10) for i in range(5)} | {"large": torch.randn(50, 50)}
    save(tmp_path / "c", _content(tensors), max_file_bytes=1000)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 400 + 10_000}
    assert [index["weight_map"][name] for name in tensors] == [
        f"model-0000{n}-of-00004.safetensors" for n in (1, 1, 2, 2, 3, 4)
    ]
    for name, file_name in index["weight_map"].items():
        with safe_open(tmp_path / "c" / file_name, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), tensors[name])
    saved = open_checkpoint(tmp_path / "c")
    saved.verify()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in saved.model())
    assert not (tmp_path / "c" / "optimizer.safetensors").exists()


def test_the_whole_state_comes_back(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, dtype=torch.bfloat16)
    optimizer = {
        "a.weight": {"step": torch.tensor(7.0), "exp_avg": torch.randn(4, 3), "master": torch.randn(4, 3)},
        "odd/name": {"exp_avg": torch.randn(2)},
    }
    model = {"a.weight": weight, "odd/name": torch.randn(2), "frozen": torch.randn(1)}
    state = {"step": 12, "seed": 2**62, "lr": 0.1, "betas": (0.9, 0.999), "none": None, "deep": {"ß": [True]}}
    content = whole(model, state, {"tied": "a.weight"}, optimizer, {"config.json": b'{"a": 1}'})
    save(tmp_path / "run" / "step-00000012", content)
    saved = open_checkpoint(tmp_path / "run" / "step-00000012")
    assert saved.step == 12
    assert saved.state == {**state, "betas": [0.9, 0.999]}
    assert saved.model_names == ("a.weight", "odd/name", "frozen", "tied")
    assert saved.aliases == {"tied": "a.weight"}
    assert torch.equal(saved.read_model("tied"), weight)
    assert saved.read_file("config.json") == b'{"a": 1}'
    assert saved.optimizer_names == ("a.weight", "odd/name")
    for name, read in saved.optimizer():
        assert read.keys() == optimizer[name].keys()
        assert all(_same(read[key], optimizer[name][key]) for key in read)
    assert saved.read_optimizer("frozen") == {}
    with safe_open(tmp_path / "run" / "step-00000012" / "optimizer.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("a.weight/exp_avg"), optimizer["a.weight"]["exp_avg"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"step-00000012"}


def test_a_model_without_any_state_is_a_checkpoint_too(tmp_path: Path) -> None:
    save(tmp_path / "c", _content({}))
    assert open_checkpoint(tmp_path / "c").model_names == ()


def test_untie_finds_ties_and_only_ties() -> None:
    flat = torch.arange(12.0)
    first, second = flat[:6].view(2, 3), flat[6:].view(2, 3)
    tensors = {
        "a": first,
        "b": second,
        "a.again": flat[:6].view(2, 3),
        "a.flat": flat[:6],
        "e": flat[:0],
        "f": flat[:0],
    }
    kept, aliases = untie(tensors)
    assert aliases == {"a.again": "a"}
    assert list(kept) == ["a", "b", "a.flat", "e", "f"]


def test_load_model_accounts_for_every_tensor(tmp_path: Path) -> None:
    model = {"wte": torch.randn(4, 2), "h.0.weight": torch.randn(2, 2), "h.0.bias": torch.randn(2)}
    save(tmp_path / "c", whole(model, {"step": 1}, {"head": "wte"}))
    saved = open_checkpoint(tmp_path / "c")
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.items()}
    every = {**expected, "head": expected["wte"]}
    loaded = dict(saved.load_model(every))
    assert list(loaded) == list(every)
    assert torch.equal(loaded["head"], model["wte"])
    # A tensor is accounted for by any of its names.
    assert set(
        dict(
            saved.load_model(
                {
                    "head": expected["wte"],
                    "h.0.weight": expected["h.0.weight"],
                    "h.0.bias": expected["h.0.bias"],
                }
            )
        )
    ) == {*every} - {"wte"}
    wrong = {
        "module.h.0.weight": ((2, 2), torch.float32),
        "h.0.bias": ((3,), torch.bfloat16),
        "head": ((4, 2), torch.float32),
    }
    with pytest.raises(CheckpointError) as caught:
        saved.load_model(wrong)
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert "missing: module.h.0.weight (saved: h.0.weight)" in text
    assert "extra: h.0.weight" in text
    assert "h.0.bias: shape [2] saved, [3] expected" in text
    assert "h.0.bias: torch.float32 saved, torch.bfloat16 expected" in text
    assert "wte" not in text
    with pytest.raises(CheckpointError, match=r"2 problem\(s\)"):
        saved.load_model(wrong, strict=False)
    lenient = {"module.h.0.weight": wrong["module.h.0.weight"], "head": wrong["head"]}
    assert set(dict(saved.load_model(lenient, strict=False))) == {"head"}


def test_unknown_names_get_their_neighbour(tmp_path: Path) -> None:
    save(
        tmp_path / "c",
        whole({"layers.0.weight": torch.ones(1)}, {"step": 1}, optimizer={"x.weight": {"m": torch.ones(1)}}),
    )
    saved = open_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"did you mean 'layers\.0\.weight'"):
        saved.read_model("layer.0.weight")
    with pytest.raises(CheckpointError, match=r"did you mean 'x\.weight'"):
        saved.read_optimizer("x.weigth")
    with pytest.raises(CheckpointError, match=r"did you mean 'state\.json'"):
        saved.read_file("stat.json")


def test_content_that_cannot_be_saved_is_listed_whole(tmp_path: Path) -> None:
    content = whole(
        model={
            "meta": torch.empty(2, device="meta"),
            "sparse": torch.eye(3).to_sparse(),
            "wide": torch.zeros(2, dtype=torch.complex128),
            "__metadata__": torch.zeros(1),
            "both": torch.zeros(1),
        },
        aliases={"lost": "nowhere", "both": "wide"},
        state={"step": True, "bad": {"inf": float("inf"), "tensor": [torch.zeros(1)], 3: 4}},  # type: ignore[dict-item]
    )
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "c", content)
    text = str(caught.value)
    for problem in (
        "model 'meta': a meta tensor has no data",
        "model 'sparse': its layout is torch.sparse_coo",
        "model 'wide': its dtype is torch.complex128",
        "model '__metadata__': the name is reserved",
        "alias 'lost': its tensor 'nowhere' is not",
        "alias 'both' is stored as well",
        "state.step is True",
        "state.bad.inf is inf",
        "state.bad.tensor[0] is a Tensor",
        "state.bad has the key 3",
    ):
        assert problem in text
    assert "10 problem(s)" in text
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="the state key 'a/b' holds '/'"):
        whole({}, {"step": 1}, optimizer={"w": {"a/b": torch.zeros(1)}})


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "model.safetensors", "../escape", "a/b", "a\\b", ".hidden", ""]
)
def test_extra_files_have_plain_free_names(tmp_path: Path, name: str) -> None:
    content = whole({"w": torch.ones(1)}, {"step": 1}, extra_files={name: b""})
    with pytest.raises(CheckpointError, match="extra file name"):
        save(tmp_path / "c", content)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_and_never_touches_what_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "c", _content({"w": torch.zeros(2)}, step=1))
    save(tmp_path / "c", _content({"v": torch.ones(2)}, step=2))
    saved = open_checkpoint(tmp_path / "c")
    assert (saved.step, saved.model_names) == (2, ("v",))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
            save(tmp_path / name, _content())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", _content())
    assert open_checkpoint(tmp_path / "empty").step == 3


def test_sums_of_pieces_join_to_the_sum_of_the_whole() -> None:
    data = np.random.default_rng(0).bytes(70_000)
    for cut in (0, 1, 7, 4096, 65_537, 69_999, 70_000):
        first, second = data[:cut], data[cut:]
        assert join_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)


@pytest.mark.parametrize("writers", [1, 2, 5])
def test_whoever_wrote_what_the_checksums_are_those_of_the_bytes(writers: int) -> None:
    generator = np.random.default_rng(writers)
    data = [generator.bytes(size) for size in (3 * CELL_BYTES + 5, 7, 0, CELL_BYTES, 2 * CELL_BYTES - 1)]
    cells = Cells(tuple(map(len, data)))
    tallies = [Tally(cells) for _ in range(writers)]
    for number, file in enumerate(data):
        cuts = sorted(generator.integers(0, len(file) + 1, 12).tolist())
        for turn, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(file)], strict=True)):
            tallies[turn % writers].add(number, start, file[start:stop])
    expected = [
        zlib.crc32(file[start : start + CELL_BYTES])
        for file in data
        for start in range(0, len(file), CELL_BYTES)
    ]
    records = [tally.to_bytes() for tally in tallies]
    assert np.frombuffer(joined(cells, records), "<u4").tolist() == expected
    missing, twice = Tally(cells), Tally(cells)
    missing.add(0, 0, data[0][:-1])
    twice.add(1, 3, data[1][3:])
    for wrong in ([*records, twice.to_bytes()], [missing.to_bytes()]):
        with pytest.raises(AssertionError, match="once"):
            joined(cells, wrong)


def test_every_byte_but_the_manifest_s_has_a_checksum(tmp_path: Path) -> None:
    save(tmp_path / "c", whole(_every_kind(), {"step": 1}, extra_files={"config.json": b"{}"}))
    manifest = open_checkpoint(tmp_path / "c").manifest
    listed = {file.name for file in manifest.files}
    assert listed == {path.name for path in (tmp_path / "c").iterdir()} - {MANIFEST, SUMS}
    sums = (tmp_path / "c" / SUMS).read_bytes()
    assert zlib.crc32(sums) == manifest.sums_crc32
    each = [zlib.crc32((tmp_path / "c" / file.name).read_bytes()) for file in manifest.files]
    assert np.frombuffer(sums, "<u4").tolist() == each  # every file is smaller than a cell


def test_a_piece_is_read_without_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.randn(700_000)
    save(tmp_path / "c", whole({"small": torch.ones(3), "large": large}, {"step": 1}))
    saved = open_checkpoint(tmp_path / "c")
    num_read = 0
    plain = ranges.read_into

    def counted(handle: FileIO, buffer: memoryview) -> int:
        nonlocal num_read
        num_read += plain(handle, buffer)
        return len(buffer)

    monkeypatch.setattr(ranges, "read_into", counted)
    cuts = [0, 1, 17, 20_000, 350_000, 700_000]
    for start, stop in pairwise(cuts):
        num_read, found = 0, torch.empty(stop - start)
        saved.fill([Piece(MODEL, "large", start, found)])
        assert torch.equal(found, large[start:stop])
        assert num_read <= 4 * (stop - start) + 2 * CELL_BYTES
    # Neighbours are read together: each cell once.
    num_read, pieces = 0, [Piece(MODEL, "large", at, torch.empty(10)) for at in range(0, 100_000, 10)]
    saved.fill(reversed(pieces))
    assert torch.equal(torch.cat([piece.tensor for piece in pieces]), large[:100_000])
    assert num_read <= 4 * 100_000 + 2 * CELL_BYTES


class _Addresses(Files):
    """Notes from which memory the bytes come, and how many at once."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def write(self, handle: FileIO, data: Buffer, offset: int) -> None:
        self.writes.append((np.frombuffer(data, np.uint8).ctypes.data, len(data)))
        super().write(handle, data, offset)


def test_tensors_are_written_out_of_their_own_memory_in_bounded_chunks(tmp_path: Path) -> None:
    large = torch.zeros(CHUNK_BYTES + 1000, dtype=torch.bfloat16)
    flat = torch.randn(100)
    files = _Addresses()
    save(tmp_path / "c", _content({"large": large, "view": flat[10:20]}), files=files)
    begin = large.data_ptr()
    from_large = [(at - begin, size) for at, size in files.writes if begin <= at < begin + large.nbytes]
    assert from_large == [(0, CHUNK_BYTES), (CHUNK_BYTES, CHUNK_BYTES), (2 * CHUNK_BYTES, 2000)]
    assert (flat.data_ptr() + 40, 40) in files.writes


_PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
_TORCH_FILES = {"load", "save"}


def _pickling(source: str) -> list[str]:
    """Uses of pickle, torch.load or torch.save in one module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in _PICKLERS]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] if module.split(".")[0] in _PICKLERS else []
                found += [
                    f"{module}.{name.name}"
                    for name in names
                    if name.name in _PICKLERS
                    or (module in {"torch", "torch.serialization"} and name.name in _TORCH_FILES)
                ]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                only = [each for each in keywords if each.arg == "weights_only"]
                safe = len(only) == 1 and isinstance(only[0].value, ast.Constant) and only[0].value.value
                found += ["torch.load of tensors alone" if safe else "torch.load of anything"]
            case ast.Attribute(value=ast.Name(id="torch"), attr="save"):
                found.append("torch.save")
            case ast.keyword(arg="allow_pickle"):
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import dumps",
        "from torch import load",
        "import torch\ntorch.save(1, 'x')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "def f():\n    import cloudpickle.fast as c",
    ],
)
def test_the_search_for_pickle_finds_it(source: str) -> None:
    assert _pickling(source)


def test_nothing_in_the_package_pickles() -> None:
    """But for the test pool, whose messages to its own processes are no files. One module reads foreign
    files, tensors and plain values alone."""
    root = Path(sixfold.__file__).parent
    modules = [path for path in sorted(root.rglob("*.py")) if root / "testing" not in path.parents]
    assert root / "checkpoint" / "writing.py" in modules
    found = {path.relative_to(root).as_posix(): _pickling(path.read_text()) for path in modules}
    assert {name: uses for name, uses in found.items() if uses} == {
        "checkpoint/partitioned.py": ["torch.load of tensors alone"]
    }
