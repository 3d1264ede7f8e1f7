"""Counts how often Python enters the library in one update: `python -m sixfold.testing.entries`.

For docs/numbers.md and for whoever changes what runs in an update: these entries keep an accelerator waiting.
The reference models are left out, because a user's own would stand there. It changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import CodeType, FrameType

import torch

from sixfold.engine import Engine, initialize
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.testing.pool import Pool

PER_UNIT, PER_PARAMETER = 40, 1
"""What an update may cost: this many entries for each unit, and one small hook for each parameter."""

_PACKAGE = Path(__file__).parents[1]
_SIZES = {"vocab_size": 4096, "context_length": 128, "width": 384, "num_layers": 5, "num_heads": 6}
_WARM_UP, _COUNTED = 6, 30
"""Updates before, and those of which the one with the fewest counts: where a unit meets a buffer for the
first time an exchange is prepared. On a busy machine sums take longer and new pairs go on being met for a
while; there are only so many."""
_WAITING = ("mesh/host/signals.py wait_beyond", "mesh/host/signals.py _system_call")
"""Entered while another rank lets this one wait, and as often as it is late, which is not this one's cost."""


def entries(call: Callable[[], object]) -> Counter[str]:
    """Run `call` and count the Python functions of the library it entered, by file and qualified name.

    Resumed generators count each time, as the interpreter enters them; waiting for other ranks does not.
    """
    counts: Counter[CodeType] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            counts[frame.f_code] += 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    named: Counter[str] = Counter()
    for code, count in counts.items():
        path = Path(code.co_filename)
        if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "models"):
            named[f"{path.relative_to(_PACKAGE)} {code.co_qualname}"] += count
    for name in (f"{Path(__file__).relative_to(_PACKAGE)} {entries.__qualname__}", *_WAITING):
        del named[name]
    return named


def fewest_entries(
    update: Callable[[], object], is_enough: Callable[[int], bool] = lambda fewest: False
) -> Counter[str]:
    """`entries` of an update that does nothing for the first time and waits little.

    Args:
        is_enough: asked after every update for the fewest until then; true ends the counting. Where an update
            takes several ranks it has to tell all of them the same.
    """
    for _ in range(_WARM_UP):
        update()
    fewest = entries(update)
    for _ in range(_COUNTED - 1):
        if is_enough(fewest.total()):
            break
        fewest = min(fewest, entries(update), key=Counter.total)
    return fewest


def bound(engine: Engine) -> int:
    """The most entries that one update of `engine` may cost."""
    units = engine.state.units
    return PER_UNIT * len(units) + PER_PARAMETER * sum(len(unit.parameters) for unit in units)


def _decoder_entries(zero: int, transport: str) -> tuple[Counter[str], int, int, int]:
    """On every rank: (entries of one update of the 10 M decoder, their bound, units, parameters)."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.derive(**_SIZES))
    engine = initialize(model, config={"layout": {"zero": zero, "transport": transport}})
    tokens = torch.randint(_SIZES["vocab_size"], (2, _SIZES["context_length"] + 1))
    counts = fewest_entries(lambda: engine.train_step(tokens))
    num_parameters = len(list(model.parameters()))
    found = counts, bound(engine), len(engine.state.units), num_parameters
    engine.close()
    return found


def main() -> None:
    """Print what one update costs on rank 0 under each preset, and which functions are entered most."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--transport", nargs="+", default=["host", "network"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--top", type=int, default=12)
    args = parser.parse_args()
    with Pool() as pool:
        for transport, zero in product(args.transport, args.zero):
            counts, most, num_units, num_parameters = pool.run(
                _decoder_entries, zero, transport, ranks=args.ranks, timeout_s=120
            )[0]
            print(
                f"{transport}, preset {zero}: {counts.total()} entries an update, bound {most}; "
                f"{num_units} units, {num_parameters} parameters: "
                f"{(counts.total() - num_parameters) / num_units:.1f} a unit beside one a parameter"
            )
            for name, count in counts.most_common(args.top):
                print(f"{count:7d}  {name}")


if __name__ == "__main__":
    main()
