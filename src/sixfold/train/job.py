"""What a training job is asked for: the settings that a request comes to.

Used by the launcher for a first look and by every rank; both come to the same answer. No tensor library is
loaded here, and nothing is trained or started.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sixfold.base.errors import ConfigError
from sixfold.config import Resolved, load
from sixfold.config.resolved import CONFIG
from sixfold.config.schema import LEAVES
from sixfold.launch import Placement
from sixfold.train.folder import run_at

RECIPE = Path(__file__).with_name("recipe.toml")


@dataclass(frozen=True)
class Request:
    """What the user typed.

    Args:
        config: configuration file.
        overrides: `key=value` texts.
        resume: run folder to go on with.
        into: run folder to make.
        preset: a number of parameters such as "125m", from which sizes and learning rate follow.
        handed: what the launcher has made of all that, and decided besides; for its ranks.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    resume: Path | None = None
    into: Path | None = None
    preset: str | None = None
    handed: Path | None = None


def resolve(request: Request) -> Resolved:
    """The configuration of a request: recipe, file or resumed run, overrides; or as the launcher handed it.

    Raises:
        ConfigError: all problems at once.
        DataError: a corpus is named that is damaged, or was built under other settings.
    """
    if request.handed is not None:
        return load(request.handed).recall(request.handed.read_text(), request.handed)
    given = {"--config": request.config, "--into": request.into, "--preset": request.preset}
    other = next((option for option, value in given.items() if value is not None), None)
    if request.resume is not None and other is not None:
        raise ConfigError(
            f"--resume {request.resume} together with {other}",
            rule="a resumed run goes on in its folder with its own configuration",
            fix=f"drop {other}; single values can be changed with --set",
        )
    if request.resume is not None:
        file = run_at(request.resume) / CONFIG
        return load(file, overrides=request.overrides).recall(file.read_text(), file)
    asked = load(request.config, overrides=request.overrides, recipe=RECIPE, preset=request.preset)
    return _as_built(_decide_tokenizer(asked))


def as_started(resolved: Resolved, place: Placement | None, threads: int) -> Resolved:
    """Write down how ranks were started, where no number was asked for.

    Args:
        place: of this rank; None for a process of its own.
        threads: that it computes with.
    """
    asked, ranks = resolved.config.launch, place.local_world_size if place is not None else 1
    found = {"launch.ranks": (asked.ranks, ranks), "launch.threads": (asked.threads, threads)}
    unset = {path: number for path, (given, number) in found.items() if given is None}
    return resolved.decide(unset, "as started") if unset else resolved


def _decide_tokenizer(resolved: Resolved) -> Resolved:
    model, data = resolved.config.model.hf, resolved.config.data
    if model is None or data.tokenizer is not None or data.vocab_size is not None:
        return resolved
    own = model.expanduser() / "tokenizer.json"
    if not own.is_file():
        return resolved
    return resolved.decide({"data.tokenizer": str(own)}, "comes with model.hf")


def _as_built(resolved: Resolved) -> Resolved:
    """With the settings of the corpus that is named, if one is: a run's own file then tells what it was."""
    from sixfold.data.corpus import built_corpus  # arrays are slow to load; what is mistyped is told by now

    corpus = built_corpus(resolved.config.data)
    if corpus is None:
        return resolved
    settings = {f"data.{name}": value for name, value in corpus.record.settings.items() if value is not None}
    known = {path: value for path, value in settings.items() if path in LEAVES}
    return resolved.above(known, f"as {corpus.folder} was built")
