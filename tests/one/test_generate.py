"""`sixfold generate`: texts continued by the model of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sixfold.base.errors import EXIT_DONE, EXIT_USAGE
from sixfold.launch import current_session
from sixfold.models.decoder import Decoder
from sixfold.train import loop
from sixfold.train.completion import Sampling, _Writer, continuations, load_run
from sixfold.train.job import Request
from sixfold.train.vocabulary import vocabulary_of
from tests.one import lab
from tests.one.terminal import Terminal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    lab.write_corpus(folder / "text")
    config = lab.write_config(folder / "my.toml", lab.settings(folder, train__steps=3, optimizer__lr=1e-2))
    loop.train(Request(config, into=folder / "run"), current_session())
    return folder / "run"


def test_greedy_texts_are_those_of_the_whole_model_one_by_one(run: Path) -> None:
    module, vocabulary = load_run(run)
    assert isinstance(module, Decoder)
    prompts = ["def value", "class self return left", "x"]
    news = list(continuations(module, vocabulary, prompts, 12, Sampling(temperature=0)))
    texts = ["".join(row) for row in zip(*news, strict=True)]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [vocabulary.mark, *vocabulary.encode(prompt)]
        start = len(ids)
        while len(ids) < start + 12 and vocabulary.mark not in ids[start:]:
            ids.append(int(module.logits(torch.tensor([ids]))[0, -1].argmax()))
        expected = vocabulary.decode([token for token in ids[start:] if token != vocabulary.mark])
        assert expected.startswith(text)
        assert len(expected) - len(text) <= 3, "at most a character that is not whole"


def test_the_command(sixfold: Terminal, run: Path) -> None:
    asked = ("generate", run, "-p", "def ", "-p", "class ", "--tokens", "9")
    assert sixfold(*asked, "--json") == EXIT_DONE
    told = json.loads(sixfold.out)
    assert [one["prompt"] for one in told] == ["def ", "class "]
    assert all(one["text"].startswith(one["prompt"]) for one in told)
    assert sixfold(*asked) == EXIT_DONE
    assert sixfold.out == f"{told[0]['text']}\n---\n{told[1]['text']}\n"
    assert sixfold(*asked, "--seed", "1") == EXIT_DONE
    assert not sixfold.out.startswith(told[0]["text"])
    greedy = []
    for more in (("-t", "0"), ("-k", "1")):
        assert sixfold(*asked, *more) == EXIT_DONE
        greedy.append(sixfold.out)
    assert greedy[0] == greedy[1]
    checkpoint = next((run / "checkpoints").iterdir())
    assert sixfold(*asked, "-t", "0", "--checkpoint", checkpoint) == EXIT_DONE
    assert sixfold.out == greedy[0]


def test_wrong_input(sixfold: Terminal, run: Path) -> None:
    assert sixfold("generate", "nowhere", "-p", "x") == EXIT_USAGE
    assert "nowhere is no run: it does not exist" in sixfold.err
    assert sixfold("generate", run, "-p", "x", "--checkpoint", "step-9") == EXIT_USAGE
    assert f"give --checkpoint {run / 'checkpoints' / 'step-00000003'}" in sixfold.err
    assert sixfold("generate", run) == EXIT_USAGE
    assert "--prompt" in sixfold.err
    bare = sixfold.folder / "bare"
    bare.mkdir()
    (bare / "config.toml").write_text((run / "config.toml").read_text())
    assert sixfold("generate", bare, "-p", "x") == EXIT_USAGE
    assert "holds no complete checkpoint" in sixfold.err
    assert sixfold("generate", run, "-p", "x", "--checkpoint", "none") == EXIT_USAGE


def test_characters_come_when_they_are_whole_and_end_with_the_document(run: Path) -> None:
    vocabulary = vocabulary_of(run)
    writer = _Writer(vocabulary)
    ids = vocabulary.encode("a\u00e9b")
    news = [writer.add(token) for token in [*ids, vocabulary.mark, *ids]]
    assert "".join(news) == "a\u00e9b"
    assert "" in news[: len(ids)]
    assert writer.has_ended


def test_transformers_reads_the_vocabulary_that_a_run_keeps(run: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="comes with the extras hf and test")
    theirs = transformers.AutoTokenizer.from_pretrained(run)
    vocabulary = vocabulary_of(run)
    assert theirs("def value", add_special_tokens=False).input_ids == vocabulary.encode("def value")
    assert theirs.eos_token_id == vocabulary.mark
