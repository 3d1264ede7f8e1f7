"""The report in a real browser: it renders, says nothing on the console, and asks nobody for anything."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sixfold.monitor.report.page import page
from sixfold.monitor.report.story import read_story
from tests.one.runs import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.fresh,
    pytest.mark.skipif(
        CHROMIUM is None, reason="NO BROWSER: the report was not looked at; apt-get install chromium"
    ),
]

QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-features=OptimizationHints,MediaRouter",
)


def browse(file: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """The page as the browser has it, what it wrote to the console, and what was asked of a network."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            str(CHROMIUM),
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    started = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser asks for things of its own (the time, a dictionary); what a page asks has a page's origin.
    by_page = [each["url"] for each in started if each.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, console, [url for url in by_page if not url.startswith(("file:", "data:"))]


def test_it_renders_without_a_word_and_without_a_network(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=3e-3, zero=3)]
    file = tmp_path / "report.html"
    file.write_text(page([read_story(run) for run in runs]), encoding="utf-8")
    dom, console, asked = browse(file, tmp_path)
    assert dom.count("<figure>") == 7
    assert "Where the time of an update went" in dom
    assert console == []
    assert asked == []


def test_what_a_page_says_and_asks_is_seen(tmp_path: Path) -> None:
    """The counterpart, so that the test above cannot pass by looking in the wrong place."""
    file = tmp_path / "bad.html"
    file.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("broken")</script>')
    _, console, asked = browse(file, tmp_path)
    assert any("broken" in line for line in console)
    assert "http://127.0.0.1:9/x.png" in asked
