"""What is noticed about a run before it is resumed: where it stands, what was changed, what cannot go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sixfold.base.errors import EXIT_USAGE, CheckpointError, ConfigError
from sixfold.checkpoint import save, step_folder, whole
from sixfold.checkpoint.finding import CHECKPOINTS
from sixfold.config import Resolved, load
from sixfold.config.resolved import CONFIG
from sixfold.data.corpus import Corpus, prepare
from sixfold.data.record import TOKENIZER
from sixfold.train.folder import held, write_config
from sixfold.train.job import Request, resolve
from sixfold.train.resume import stand
from sixfold.train.vocabulary import is_kept, keep_vocabulary
from tests.one import lab
from tests.one.terminal import Terminal

STEP = 7


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose newest checkpoint is after update 7 of 9."""
    folder = tmp_path / "run"
    folder.mkdir()
    values = lab.settings(tmp_path, train__steps=9, batch__global=8, precision__compute=None)
    asked = load(lab.write_config(tmp_path / "my.toml", values))
    write_config(folder, asked.decide({"precision.compute": "fp32"}, "of this test"))
    state = {"step": STEP, "samples": 8 * STEP}
    content = whole(model={"weight": torch.zeros(2)}, aliases={}, optimizer={}, state=state, extra_files={})
    save(step_folder(folder / CHECKPOINTS, STEP), content)
    return folder


def measure(run: Path, step: int) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": step, "held_out_bits_per_byte": 3.0}) + "\n")


def asked(run: Path, *overrides: str) -> Resolved:
    return resolve(Request(resume=run, overrides=overrides))


def test_an_unchanged_run_goes_on_with_its_origins(run: Path, tmp_path: Path) -> None:
    resolved = asked(run)
    standing = stand(run, resolved)
    assert (standing.step, standing.changes, standing.is_complete) == (STEP, (), False)
    assert str(standing) == f"resumed     after update {STEP} from {standing.newest}"
    assert resolved.origins["batch.global"].startswith(f"{tmp_path / 'my.toml'}:")
    assert resolved.origins["precision.compute"] == "decided: of this test"
    assert resolved.origins["model.rope_base"] == "default"
    assert asked(run, "seed=5").origins["seed"] == "--set"


def test_every_change_is_told_in_a_line(run: Path) -> None:
    resolved = asked(run, "batch.global=6", "seed=4", "data.include=['*.md']", "optimizer.clip_norm=1.0")
    assert set(stand(run, resolved).changes) == {
        "changed since the save: batch.global 8 -> 6",
        "changed since the save: seed 0 -> 4",
        'changed since the save: data.include ["*.py", "*.txt"] -> ["*.md"]',
        "changed since the save: optimizer.clip_norm unset -> 1.0",
    }
    assert str(stand(run, resolved)).count("\nchanged since the save: ") == 4


def test_fewer_updates_than_are_made_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        stand(run, asked(run, "train.steps=3"))
    assert "train.steps = 3 (--set)" in caught.value.given
    assert "after update 7" in caught.value.given
    assert "--set train.steps=10" in caught.value.fix
    assert stand(run, asked(run, "train.steps=10")).step == STEP
    assert not stand(run, asked(run, "train.minutes=2")).is_complete


@pytest.mark.parametrize("override", ["model.width=64", "data.vocab_size=400", "model.num_kv_heads=2"])
def test_another_model_is_refused_by_its_keys(run: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as caught:
        stand(run, asked(run, override, "model.num_layers=3"))
    for name, now in ((key, value), ("model.num_layers", "3")):
        assert name in caught.value.given
        assert f"-> {now}" in caught.value.given
        assert name in caught.value.fix
    assert str(run / CONFIG) in caught.value.fix


def test_a_run_is_complete_when_it_is_measured_at_its_end(run: Path) -> None:
    at_end = asked(run, f"train.steps={STEP}")
    assert not stand(run, at_end).is_complete  # it ended between the save and the measurement
    measure(run, STEP - 1)
    assert not stand(run, at_end).is_complete
    measure(run, STEP)
    assert not stand(run, asked(run)).is_complete
    assert str(stand(run, at_end)) == (
        f"already complete after update {STEP}; nothing to do (raise train.steps to go on)"
    )


def test_a_run_without_a_checkpoint(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write_config(bare, asked(run))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint") as caught:
        stand(bare, asked(bare))
    assert f"or remove {bare}" in caught.value.fix, "a second run is not let into its folder"


def test_a_run_under_way_is_not_resumed_beside_itself(run: Path, sixfold: Terminal) -> None:
    lab.write_corpus(sixfold.folder / "text", num_files=8)
    with held(run):
        assert sixfold("train", "--resume", run) == EXIT_USAGE
    assert f"{run} is in use" in sixfold.err


def read(run: Path, *overrides: str) -> Corpus:
    """The corpus as the run would read it now."""
    return prepare(asked(run, *overrides).config.data)


def keep(run: Path, corpus: Corpus) -> None:
    """What a run that has read `corpus` leaves of it."""
    keep_vocabulary(run, corpus)
    facts = {"corpus": corpus.fingerprint, "num_train_tokens": corpus.num_train_tokens}
    (run / "metrics.jsonl").write_text(json.dumps({"facts": facts}) + "\n")


def write_other_text(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_text(file.read_text()[::-1])


def test_a_corpus_of_another_vocabulary_is_refused_with_a_way_to_train_on_it(
    run: Path, tmp_path: Path
) -> None:
    """Of the same size: its weights would load, and mean something else."""
    text = lab.write_corpus(tmp_path / "text", num_files=8)
    before = read(run)
    keep(run, before)
    standing = stand(run, asked(run))
    assert standing.reading(before) is standing
    write_other_text(text)
    now = read(run)
    assert now.vocab_size == before.vocab_size
    with pytest.raises(ConfigError) as caught:
        standing.reading(now)
    assert str(run / TOKENIZER) in caught.value.given
    option = f"data.tokenizer={run / TOKENIZER}"
    assert f"--set model.weights={standing.newest} --set {option}" in caught.value.fix
    anew = resolve(Request(config=run / CONFIG, overrides=(option,)))
    assert is_kept(run, prepare(anew.config.data))


def test_another_text_of_the_same_vocabulary_is_told(run: Path, tmp_path: Path) -> None:
    text = lab.write_corpus(tmp_path / "text", num_files=8)
    tokenizer = "data.tokenizer=bytes"
    before = read(run, tokenizer)
    keep(run, before)
    write_other_text(text)
    now = read(run, tokenizer)
    changes = stand(run, asked(run)).reading(now).changes
    assert changes == (
        "changed since the save: the text of data.path, "
        f"{before.num_train_tokens} -> {now.num_train_tokens} training tokens of the same vocabulary",
    )
    keep(run, now)
    assert stand(run, asked(run)).reading(now).changes == ()


def test_a_run_that_has_lost_its_vocabulary_gets_it_again(run: Path, tmp_path: Path) -> None:
    lab.write_corpus(tmp_path / "text", num_files=8)
    standing = stand(run, asked(run))
    assert standing.reading(read(run)) is standing
