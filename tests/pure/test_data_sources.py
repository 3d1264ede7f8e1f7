"""Which files make a corpus, and what is said when they cannot."""

import json
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from sixfold.base.errors import DataError
from sixfold.config.tree import DataConfig
from sixfold.data.documents import fetch
from sixfold.data.sources import Selection, find_sources, places_of, sample_texts, select


def write(folder: Path, names: dict[str, str | bytes]) -> Path:
    for name, content in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def many(count: int) -> dict[str, str | bytes]:
    return {f"part{number % 4}/file{number}.py": f"text of {number}\n" * 10 for number in range(count)}


def chosen(folder: Path, **settings: object) -> Selection:
    return chosen_by(DataConfig.model_validate({"path": folder, **settings}))


def chosen_by(config: DataConfig) -> Selection:
    (selection,) = select(find_sources(config), config)
    return selection


def listed(config: DataConfig) -> list[str]:
    (source,) = find_sources(config)
    return [each.name for each in source.files]


def names(documents: tuple[object, ...]) -> set[str]:
    return {document.name for document in documents}


def test_patterns_reach_any_depth(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "1", "x/b.py": "2", "x/y/c.txt": "3", "x/d.md": "4", "py": "5"})
    config = DataConfig(path=tmp_path, include=("*.py", "y/*.txt"))
    assert listed(config) == ["a.py", "x/b.py", "x/y/c.txt"]


def test_the_parts_are_disjoint_and_whole(tmp_path: Path) -> None:
    selection = chosen(write(tmp_path, many(40)), held_out_documents=10)
    assert len(selection.held_out) == 10
    assert names(selection.train) | names(selection.held_out) == set(many(40))
    assert not names(selection.train) & names(selection.held_out)


def test_held_out_documents_stay_when_others_come(tmp_path: Path) -> None:
    before = names(chosen(write(tmp_path, many(40)), held_out_documents=10).held_out)
    write(tmp_path, {"another.py": "new"})
    after = names(chosen(tmp_path, held_out_documents=10).held_out)
    assert len(before - after) <= 1
    assert after - before <= {"another.py"}


def test_held_out_documents_do_not_depend_on_content_or_bound(tmp_path: Path) -> None:
    write(tmp_path, many(40))
    whole = chosen(tmp_path, held_out_documents=10)
    bounded = chosen(tmp_path, held_out_documents=10, max_mb=0.003)
    assert bounded.held_out == whole.held_out
    assert 0 < len(bounded.train) < len(whole.train)
    assert sum(d.num_bytes for d in bounded.train + bounded.held_out) <= 3000
    assert bounded == chosen(tmp_path, held_out_documents=10, max_mb=0.003)
    write(tmp_path, {name: f"other {name}" for name in many(40)})
    assert names(chosen(tmp_path, held_out_documents=10).held_out) == names(whole.held_out)


def test_copies_empty_files_and_other_bytes_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, many(12))
    write(tmp_path, {"copy.py": many(12)["part0/file0.py"], "latin.py": b"caf\xe9", "empty.py": b""})
    selection = chosen(tmp_path, held_out_documents=3)
    assert len(selection.train) + len(selection.held_out) == 12
    assert (selection.num_duplicates, selection.num_undecodable) == (1, 1)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    selection = chosen(write(tmp_path, many(12)), held_out_documents=3)
    document = selection.train[0]
    assert list(fetch(tmp_path, [document], "text")) == [many(12)[document.name]]
    (tmp_path / document.name).write_text("other")
    with pytest.raises(DataError, match="changed while"):
        list(fetch(tmp_path, [document], "text"))


def test_the_tokenizer_sample_is_training_text_up_to_a_bound(tmp_path: Path) -> None:
    selection = chosen(write(tmp_path, many(40)), held_out_documents=10)
    texts = {many(40)[document.name] for document in selection.train}
    some = list(sample_texts([selection], 500, "text"))
    assert 500 <= sum(map(len, some)) < 800
    assert set(some) <= texts
    assert len(list(sample_texts([selection], 0, "text"))) == 1
    assert set(sample_texts([selection], 10**9, "text")) == texts


def test_the_standard_library_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places_of(DataConfig()) == [("data.path", Path(sysconfig.get_path("stdlib")))]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    write(
        tmp_path,
        {"os.py": "1", "site-packages/p.py": "2", "dist-packages/q.py": "3", "__pycache__/r.py": "4"},
    )
    assert listed(DataConfig()) == ["os.py"]
    assert len(listed(DataConfig(path=tmp_path))) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_text(tmp_path: Path) -> None:
    write(tmp_path, many(12))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.py")).write_text("strange name")
    selection = chosen(tmp_path, held_out_documents=12)
    assert {document.shown_name for document in selection.train + selection.held_out} > {"caf\ufffd.py"}


def refusal(config: DataConfig) -> DataError:
    with pytest.raises(DataError) as caught:
        chosen_by(config)
    return caught.value


def test_a_missing_folder_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "my_texts").mkdir()
    error = refusal(DataConfig(path=tmp_path / "my_text"))
    assert f"{tmp_path}/my_text' does not exist" in error.given
    assert f"set data.path = '{tmp_path}/my_texts'" in error.fix


def test_a_place_that_is_named_twice(tmp_path: Path) -> None:
    write(tmp_path, many(12))
    (tmp_path / "link").symlink_to(tmp_path)
    error = refusal(DataConfig(sources=(str(tmp_path), str(tmp_path / "link"))))
    assert error.given == f"data.sources names '{tmp_path}/link' twice"


def test_a_path_that_is_missing_higher_up_names_that_place(tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    error = refusal(DataConfig(path=tmp_path / "corpra" / "python" / "src"))
    assert f"{tmp_path} has corpora" in error.given
    assert f"'{tmp_path}/corpora'" in error.fix


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, {"book.txt": "once"})
    error = refusal(DataConfig(path=tmp_path / "book.txt"))
    assert f"data.path = '{tmp_path}'" in error.fix
    assert "['*.txt']" in error.fix


def test_no_match_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "1", "b/c.txt": "2", "d.md": "3"})
    error = refusal(DataConfig(path=tmp_path))
    assert "2 *.txt, 1 *.md" in error.given
    assert error.fix == "set data.include = ['*.txt']"


def test_an_empty_folder(tmp_path: Path) -> None:
    error = refusal(DataConfig(path=tmp_path))
    assert "it holds no files" in error.given
    assert "data.path" in error.fix


def test_too_few_files_with_a_number_that_works(tmp_path: Path) -> None:
    write(tmp_path, many(30))
    error = refusal(DataConfig(path=tmp_path, held_out_documents=30))
    assert "30 different documents" in error.given
    assert error.fix == "set data.held_out_documents = 3"
    assert len(chosen(tmp_path, held_out_documents=3).train) == 27


def test_too_few_files_because_of_the_bound(tmp_path: Path) -> None:
    write(tmp_path, many(30))
    assert "data.max_mb = 0.001" in refusal(DataConfig(path=tmp_path, max_mb=0.001)).given
    assert "max_mb" in refusal(DataConfig(path=tmp_path, max_mb=0.000001)).fix


def test_a_single_file_cannot_be_held_out_and_trained_on(tmp_path: Path) -> None:
    write(tmp_path, {"all.py": "everything"})
    assert "split the text" in refusal(DataConfig(path=tmp_path, held_out_documents=1)).fix


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path, many(3))
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert "gone.py cannot be read" in refusal(DataConfig(path=tmp_path)).given


ROWS = [f"row {number} " * 20 for number in range(30)]


def as_lines(path: Path, field: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({"id": n, field: row}) for n, row in enumerate(ROWS)) + "\n\n")
    return path


def as_parquet(path: Path, field: str = "text") -> Path:
    parquet = pytest.importorskip("pyarrow.parquet", reason="comes with the extras data and test")
    import pyarrow

    parquet.write_table(pyarrow.table({"id": range(30), field: ROWS}), path, row_group_size=7)
    return path


@pytest.mark.parametrize("make", [as_lines, as_parquet])
def test_a_row_of_a_table_is_a_document(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = make(tmp_path / f"rows.{'jsonl' if make is as_lines else 'parquet'}", "content")
    config = DataConfig(path=path, text_field="content", held_out_documents=5)
    selection = chosen_by(config)
    train, held_out = (
        list(fetch(tmp_path, part, "content")) for part in (selection.train, selection.held_out)
    )
    assert len(held_out) == 5
    assert sorted(train + held_out) == sorted(ROWS)
    assert train == sorted(train, key=ROWS.index)
    assert "content" in refusal(DataConfig(path=path)).given
    assert refusal(DataConfig(path=path)).fix.startswith("set data.text_field")


def test_tables_in_a_folder_and_damaged_ones(tmp_path: Path) -> None:
    as_lines(tmp_path / "a.jsonl")
    config = DataConfig(path=tmp_path, include=("*.jsonl",), held_out_documents=3)
    assert len(chosen_by(config).train) == 27
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "half a ')
    assert "a.jsonl:32 is not JSON" in refusal(config).given
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing else")
    assert "b.parquet cannot be read as parquet" in refusal(DataConfig(path=tmp_path / "b.parquet")).given


def test_sources_are_split_each_and_share_no_copy(tmp_path: Path) -> None:
    write(tmp_path / "code", many(20))
    write(
        tmp_path / "more",
        {**{f"more{n}.py": f"other {n}" for n in range(9)}, "copy.py": many(20)["part0/file0.py"]},
    )
    config = DataConfig(sources=(str(tmp_path / "code"), str(tmp_path / "more")), held_out_documents=4)
    code, more = select(find_sources(config), config)
    assert (len(code.train), len(code.held_out)) == (16, 4)
    assert (len(more.train), len(more.held_out), more.num_duplicates) == (5, 4, 1)
    assert "data.sources" in refusal(DataConfig(sources=(str(tmp_path / "cod"),))).given


def test_sources_of_one_name_are_told_apart_by_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here/a", "there/a", "here/b", "here"):
        write(tmp_path / folder, {"train.jsonl": '{"text": "one"}\n', "other.py": "two"})
    monkeypatch.chdir(tmp_path / "here" / "b")
    named = (
        "../a/train.jsonl",
        "train.jsonl",
        str(tmp_path / "there" / "a" / "train.jsonl"),
        ".",
        "../../here",
    )
    found = find_sources(DataConfig(sources=named))
    expected = ["here/a/train.jsonl", "b/train.jsonl", "there/a/train.jsonl", "b", "here"]
    assert [source.name for source in found] == expected
    (lone,) = find_sources(DataConfig(path=tmp_path / "here" / "a"))
    assert lone.name == "a"
