"""`sixfold data`: corpora that are built and looked at, and what an update of a run sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sixfold.base.errors import EXIT_DONE, EXIT_USAGE
from sixfold.config import load
from sixfold.data.corpus import prepare
from sixfold.launch import current_session
from sixfold.train import loop
from sixfold.train.job import Request
from sixfold.train.samples import samples_of
from tests.one import lab
from tests.one.terminal import Terminal

SMALL = (
    "--set",
    "data.held_out_documents=4",
    "--set",
    "data.vocab_size=300",
    "--set",
    "data.sequence_length=16",
)


def test_build_then_look(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text")
    arguments = ("text", "--into", "corpus", *SMALL)
    assert sixfold("data", "build", *arguments, "--dry-run", "--json") == EXIT_DONE
    assert json.loads(sixfold.out)[0]["files"] == 30
    assert not (sixfold.folder / "corpus").exists()
    assert sixfold("data", "build", *arguments) == EXIT_DONE
    assert "300 entries" in sixfold.out
    assert "26 documents" in sixfold.out
    assert sixfold("data", "inspect", "corpus", "--verify", "--json") == EXIT_DONE
    assert json.loads(sixfold.out)["vocab_size"] == 300
    asked = ("--set", "data.sequence_length=16", "--set", "batch.global=3")
    assert sixfold("data", "inspect", "corpus", *asked, "--step", "2", "--samples", "1") == EXIT_DONE
    assert "step 2 will see samples 3 to 5" in sixfold.out
    assert "2 more" in sixfold.out


def test_a_damaged_token_file_is_refused_by_name(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text")
    assert sixfold("data", "build", "text", "--into", "corpus", *SMALL) == EXIT_DONE
    path = sixfold.folder / "corpus" / "train-0.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    assert sixfold("data", "inspect", "corpus") == EXIT_DONE
    assert sixfold("data", "inspect", "corpus", "--verify") == EXIT_USAGE
    assert "train-0.bin is damaged: crc32" in sixfold.err
    started = ("--set", "launch.ranks=1", "--set", "data.path=corpus", "--set", "train.steps=1")
    assert sixfold("train", *started) == EXIT_USAGE
    assert "train-0.bin is damaged: crc32" in sixfold.err
    assert not (sixfold.folder / "runs").exists()
    path.write_bytes(content[:-1])
    assert sixfold("data", "inspect", "corpus") == EXIT_USAGE
    assert "train-0.bin is damaged" in sixfold.err


def test_what_a_corpus_was_built_with_is_what_a_run_notes(sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text")
    assert sixfold("data", "build", "text", "--into", "corpus", *SMALL) == EXIT_DONE
    asked = ("--set", "launch.ranks=1", "--set", "precision.compute=fp32", "--dry-run")
    start = ("train", "--set", "data.path=corpus", *asked)
    assert sixfold(*start, "--json") == EXIT_DONE
    noted = json.loads(sixfold.out)["config"]["data.held_out_documents"]
    assert noted == {"value": 4, "origin": "as corpus was built"}
    assert sixfold(*start) == EXIT_DONE
    (sixfold.folder / "again.toml").write_text(sixfold.out)
    assert sixfold("train", "--config", "again.toml", *asked) == EXIT_DONE
    assert sixfold(*start, "--set", "data.held_out_documents=60") == EXIT_USAGE
    assert "data.held_out_documents = 60, and corpus was built with 4" in sixfold.err


def test_wrong_input(sixfold: Terminal) -> None:
    assert sixfold("data", "build", "nowhere", "--into", "corpus") == EXIT_USAGE
    assert "data.sources = 'nowhere' does not exist" in sixfold.err
    assert sixfold("data", "build", "--into", "") == EXIT_USAGE
    lab.write_corpus(sixfold.folder / "text")
    assert sixfold("data", "inspect", "text") == EXIT_USAGE
    assert "neither config.toml nor corpus.json" in sixfold.err
    assert sixfold("data", "build", "text", "--into", "text", *SMALL) == EXIT_USAGE
    assert "text exists and is no corpus" in sixfold.err
    assert "remove" not in sixfold.err, "they are the texts"
    assert sixfold("data", "build", "text", "--into", ".", *SMALL) == EXIT_USAGE
    assert f"{sixfold.folder} exists and is no corpus" in sixfold.err
    assert sixfold("data", "inspect", "--config", sixfold.config(), "--step", "0") == EXIT_USAGE
    assert "counted from 1" in sixfold.err


def test_what_a_run_saw_and_will_see(sixfold: Terminal, tmp_path: Path) -> None:
    """After a resume with another batch, steps that were made keep theirs."""
    lab.write_corpus(tmp_path / "text")
    loop.train(
        Request(sixfold.config(train__steps=3, train__sample_tokens=0), into=tmp_path / "run"),
        current_session(),
    )
    more = ("train.steps=4", "batch.global=5")
    loop.train(Request(resume=tmp_path / "run", overrides=more), current_session())
    config = load(tmp_path / "run" / "config.toml").config
    corpus = prepare(config.data)
    for step, first, size, tense in ((3, 12, 6, "saw"), (4, 18, 5, "saw"), (6, 28, 5, "will see")):
        assert sixfold("data", "inspect", "run", "--step", str(step), "--samples", "2") == EXIT_DONE
        assert f"step {step} {tense} samples {first} to {first + size - 1}" in sixfold.out
        for row in samples_of(config, corpus).batch(first, np.arange(2).tolist()):
            assert corpus.decode(row.tolist()) in sixfold.out
