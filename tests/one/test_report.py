"""The report: what it reads out of run folders, and what stands in its page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sixfold.base.errors import EXIT_DONE, EXIT_USAGE, DataError
from sixfold.launch import current_session
from sixfold.monitor.report import curves, picture
from sixfold.monitor.report.page import page
from sixfold.monitor.report.story import differing, read_story
from sixfold.train import loop
from sixfold.train.job import Request
from tests.one import lab
from tests.one.runs import make_run, record_update
from tests.one.terminal import Terminal


class Outline(HTMLParser):
    """Tags that are open, headings, and whatever a page would fetch."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_a_page_stands_alone_and_tells_everything(tmp_path: Path) -> None:
    stories = [
        read_story(make_run(tmp_path / "first")),
        read_story(make_run(tmp_path / "second<2>", lr=3e-3, zero=2, num_steps=5)),
    ]
    text = page(stories)
    outline = Outline(text)
    assert outline.open == []
    assert outline.fetched == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert "<script" not in text
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert outline.headings == [
        "2 runs",
        "Figures",
        "What differs",
        "Curves",
        "Where the time of an update went",
        "Layout",
        "Samples",
        "Settings",
    ]
    for told in ("optimizer.lr", "second&lt;2&gt;", "compute 75.0%", "exposed communication 15.0%", "1.9000"):
        assert told in text
    assert "def &lt;b&gt;sample" in text
    assert "decided: one per core" in text
    assert text.count("<figure>") == 7
    assert text.count("rank 1<") == 2


def test_a_long_curve_has_a_line_through_medians_of_neighbours(tmp_path: Path) -> None:
    values = [3.0, 1.0, 100.0] * 50
    steps, bold = curves.medians(list(range(150)), [*values[:-2], math.nan, 7.0])
    assert len(steps) == len(bold) == 75
    assert steps[:3] == [1, 3, 5]
    assert bold[:3] == [2.0, 51.5, 50.5]
    assert bold[-1] == 7.0
    assert "the bold line" in page([read_story(make_run(tmp_path / "long", num_steps=101))])
    assert "the bold line" not in page([read_story(make_run(tmp_path / "short"))])


def test_only_what_differs_is_compared(tmp_path: Path) -> None:
    stories = [read_story(make_run(tmp_path / "a")), read_story(make_run(tmp_path / "b", lr=3e-3))]
    assert differing(stories) == {"optimizer.lr": [1e-3, 3e-3]}


def test_a_run_without_facts_or_times_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old", num_steps=2)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in one.items() if not k.endswith("_s")} for one in records if "loss" in one]
    for one in kept:
        one["loss"] = "nan"
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept) + '{"step": 3, "lo')
    text = page([read_story(run)])
    assert Outline(text).headings == ["old", "Figures", "Curves", "Settings"]


def test_a_run_with_experts_tells_how_they_were_loaded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    figures = {"expert_imbalance": 1.6, "expert_dropped": 0.25, "expert_entropy": 1.2, "expert_penalty": 0.02}
    with (run / "metrics.jsonl").open() as file:
        records = [json.loads(line) for line in file]
    told = [one | figures if "loss" in one else one for one in records]
    loads = {"model.layers.0.mlp.<gate>": [0.1, 0.2, 0.3, 0.4], "model.layers.1.mlp.<gate>": [0.25] * 4}
    loads["of a run gone wrong"] = ["nan", "inf", 0.5, 0.5]
    told += [{"step": 8, "expert_loads": {"earlier": [0.5, 0.5]}}, {"step": 12, "expert_loads": loads}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    text = page([read_story(run)])
    outline = Outline(text)
    assert "Load of experts" in outline.headings
    assert (outline.open, outline.fetched) == ([], [])
    for title in ("busiest expert", "choices without room", "entropy of routing", "penalty on routing"):
        assert f"<figcaption>{title}" in text
    assert "update 12" in text
    assert "earlier" not in text
    assert "layers.0.mlp.&lt;gate&gt;" in text
    assert "0.40 to 1.60" in text
    assert "expert 3: 1.60" in text
    assert text.count('fill="#ffffff"><title>') == 4  # equal shares


def test_many_ranks_are_drawn_in_part() -> None:
    facts = {
        "degrees": {"pipe": 4, "data": 8, "context": 1, "tensor": 4},
        "parts": {"parameters": 8, "gradients": 8, "optimizer": 8},
    }
    drawn = picture.layout(facts)
    assert drawn.count('class="rank"') == 64
    assert "and 64 ranks more" in drawn
    assert "pipe 1, data 7, tensor 3" in drawn


def test_a_recorded_update_is_drawn_above_its_simulation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record_update(run)
    story = read_story(run)
    spans = story.makespans()
    # Thirteen seconds without transfers; a rank hands over or asks in a quarter of a second each.
    assert spans["simulated"] == pytest.approx(14)
    assert spans["measured"] > 13.5
    text = page([story])
    outline = Outline(text)
    assert "One update on every rank" in outline.headings
    assert (outline.open, outline.fetched) == ([], [])
    assert f"update 3, measured {1e3 * spans['measured']:.0f} ms, simulated 14000 ms" in text
    for rank in range(2):
        measured, simulated = (text.index(f"rank {rank} {name} compute") for name in spans if name != "off")
        assert measured < simulated
    (run / "timeline.json").write_text('{"step": 3, "events": [[0, "backwards 0.0", 0, 1]]}')
    with pytest.raises(DataError, match="is not an instruction"):
        read_story(run)


def test_recorded_updates_are_drawn_into_a_file_of_their_own(sixfold: Terminal) -> None:
    for name in ("a", "b"):
        record_update(make_run(sixfold.folder / name))
    make_run(sixfold.folder / "c")
    assert sixfold("report", "a", "--timeline", "one.html", "--json") == EXIT_DONE
    told = json.loads(sixfold.out)["runs"]["a"]["recorded update"]
    assert told["off"] == pytest.approx(told["measured"] / told["simulated"] - 1)
    assert "rank 1 measured compute" in (sixfold.folder / "one.html").read_text()
    assert sixfold("report", "a", "b", "--timeline", "two.json") == EXIT_DONE
    trace = json.loads((sixfold.folder / "two.json").read_text())["traceEvents"]
    names = {each["args"]["name"] for each in trace if each["name"] == "process_name"}
    assert {"rank 0 a measured", "rank 1 b simulated"} <= names
    assert sixfold("report", "a", "--timeline", "three.txt") == EXIT_USAGE
    assert "three.html" in sixfold.err
    assert sixfold("report", "c", "--timeline", "four.html") == EXIT_USAGE
    assert "c has recorded no update" in sixfold.err
    assert sixfold("report", "a", "--timeline", "five.html", "--dry-run") == EXIT_DONE
    assert not (sixfold.folder / "five.html").exists()


def test_the_command(sixfold: Terminal) -> None:
    make_run(sixfold.folder / "a")
    make_run(sixfold.folder / "b")
    assert sixfold("report", "a") == EXIT_DONE
    assert (sixfold.folder / "a" / "report.html").exists()
    assert sixfold("report", "a", "b", "--json") == EXIT_DONE
    told = json.loads(sixfold.out)
    assert told["file"] == "report.html"
    assert told["runs"]["a"]["updates"] == 12
    assert told["runs"]["a"]["spent"]["data_s"] == pytest.approx(0.05)
    assert sixfold("report", "a", "--into", "none/such.html") == EXIT_USAGE
    assert "cannot be written" in sixfold.err
    (sixfold.folder / "empty").mkdir()
    assert sixfold("report", "empty") == EXIT_USAGE
    assert "holds no config.toml" in sixfold.err


def test_a_run_records_where_its_time_and_its_tokens_went(tmp_path: Path) -> None:
    lab.write_corpus(tmp_path / "text")
    experts = {"model__num_experts": 3, "model__balance": "loss", "train__steps": 5}
    config = lab.write_config(tmp_path / "my.toml", lab.settings(tmp_path, **experts))
    loop.train(Request(config, into=tmp_path / "run"), current_session())
    story = read_story(tmp_path / "run")
    for one in story.updates:
        parts = [one[name] for name in ("data_s", "compute_s", "exchange_s", "host_s")]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(one["seconds"], rel=0.01)
    assert story.spent()["compute_s"] > 0.5
    assert story.sample is not None
    assert story.sample.startswith("def ")
    assert story.facts["degrees"]["data"] == 1
    shown = {"Layout", "One update on every rank", "Load of experts"}
    assert shown <= set(Outline(page([story])).headings)
    assert [step for step, _ in story.loads] == [1, 2, 4, 5]
    for loads in story.loads[-1][1].values():
        assert sum(loads) == pytest.approx(1, abs=1e-4)
        assert max(loads) * 3 <= story.updates[-1]["expert_imbalance"] + 1e-4
    # Of the first update's load nothing is known yet; then each of two layers charges about its rate.
    assert story.column("expert_penalty")[1][0] == 0
    assert story.column("expert_penalty")[1][-1] == pytest.approx(2 * 0.01, rel=0.2)
    assert story.recorded is not None
    assert story.recorded[0] == min(10, len(story.updates))
    assert {each.instruction.op.value for each in story.lanes()["measured"].events} >= {"forward", "step"}
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="no update"):
        read_story(tmp_path / "run")
