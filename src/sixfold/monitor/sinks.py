"""Where else the records of a run go: TensorBoard, Weights & Biases, Prometheus, or code of the user's.

The training loop of the first rank writes every record of `metrics.jsonl` to them too. A sink that fails is
told once and left alone from then on; it never stops the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sixfold.base.plugins import load_plugin

Settings = Mapping[str, object]
"""Every option of the run by its dotted path."""


class Sink(Protocol):
    """What receives records. Made as `factory(run_folder, settings)`."""

    def write(self, record: Mapping[str, Any]) -> None:
        """One record, as it is in `metrics.jsonl`."""

    def close(self) -> None:
        """The run is over."""


class Sinks:
    """All sinks of a run, none of which can stop it.

    Args:
        names: what `monitor.sinks` says.
        warn: told once of each that fails.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Settings, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._sinks: dict[str, Sink] = {}
        for name in names:
            self._try(name, lambda name=name: self._add(name, folder, settings))  # type: ignore[misc]

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand one record to every sink that has not failed."""
        for name, sink in list(self._sinks.items()):
            self._try(name, lambda sink=sink: sink.write(record))  # type: ignore[misc]

    def close(self) -> None:
        """End all of them."""
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)
        self._sinks.clear()

    def _add(self, name: str, folder: Path, settings: Settings) -> None:
        factory = BUILT_IN.get(name) or load_plugin("sink", name)
        self._sinks[name] = factory(folder, settings)

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # a network, a full disk, or the code of others
            self._sinks.pop(name, None)
            self._warn(f"the sink {name} is left out: {_words(error, name)}; training goes on")


def _words(error: Exception, name: str) -> str:
    if isinstance(error, ImportError) and name in BUILT_IN:
        return f"{error}; pip install 'sixfold[{name}]'"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


class TensorBoard:
    """Scalars by update, in `RUN/tensorboard`."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        # Slow to load, and an extra.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        for key, number in _numbers(record).items():
            self._writer.add_scalar(key, number, record.get("step"))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named after the run folder; WANDB_MODE=offline keeps it local."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        # Slow to load, and an extra.
        import wandb

        config = {path: str(value) for path, value in settings.items() if value is not None}
        self._run: Any = wandb.init(project="sixfold", name=folder.name, dir=str(folder), config=config)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(_numbers(record), step=record.get("step"))

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The newest value of every figure in `RUN/metrics.prom`, for node_exporter's textfile collector."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        # An extra.
        import prometheus_client

        self._client: Any = prometheus_client
        self._registry: Any = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._file, self._run = folder / "metrics.prom", folder.name

    def write(self, record: Mapping[str, Any]) -> None:
        for key, number in {**_numbers(record), "step": float(record.get("step", 0))}.items():
            if key not in self._gauges:
                self._gauges[key] = self._client.Gauge(
                    f"sixfold_{key}", f"{key} of the newest record", ["run"], registry=self._registry
                )
            self._gauges[key].labels(self._run).set(number)
        self._client.write_to_textfile(str(self._file), self._registry)

    def close(self) -> None:
        """The file stays."""


BUILT_IN: dict[str, Callable[[Path, Settings], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "prometheus": Prometheus,
}
