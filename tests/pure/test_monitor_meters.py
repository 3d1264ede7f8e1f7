"""Rates from a clock that the test sets by hand."""

from __future__ import annotations

import pytest

from sixfold.monitor.meters import Meter, StepRecord


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def play(meter: Meter, clock: Clock, durations: list[float], tokens: int = 100) -> list[StepRecord]:
    records = []
    for step, duration in enumerate(durations, 1):
        meter.start()
        clock.now += duration
        records.append(meter.stop(step, loss=2.5, lr=1e-3, grad_norm=None, tokens=tokens, samples=4 * step))
        clock.now += 50.0  # evaluation, saving: not training time
    return records


def test_a_record_holds_what_it_was_given_and_the_time_between_start_and_stop() -> None:
    clock = Clock()
    (record,) = play(Meter(10, memory=lambda: 7, clock=clock), clock, [2.0])
    assert record == StepRecord(
        step=1,
        loss=2.5,
        lr=1e-3,
        grad_norm=None,
        tokens=100,
        samples=4,
        seconds=2.0,
        tokens_per_s=50.0,
        mfu=None,
        memory_bytes=7,
        eta_s=18.0,
    )
    assert record.as_dict()["tokens_per_s"] == 50.0


def test_what_no_part_of_the_time_explains_is_the_host() -> None:
    clock = Clock()
    meter = Meter(1, clock=clock)
    meter.start()
    clock.now += 2.0
    record = meter.stop(
        1, loss=2.5, lr=1e-3, grad_norm=None, tokens=9, samples=4, data_s=0.25, compute_s=1.0, exchange_s=0.5
    )
    assert (record.data_s, record.compute_s, record.exchange_s, record.host_s) == (0.25, 1.0, 0.5, 0.25)


def test_one_slow_update_moves_neither_the_rate_nor_the_time_left() -> None:
    clock = Clock()
    *_, last = play(Meter(10, clock=clock), clock, [30.0, 2.0, 2.0, 2.0])
    assert last.seconds == 2.0
    assert last.tokens_per_s == 50.0
    assert last.eta_s == 12.0


def test_rates_forget_what_left_the_window() -> None:
    clock = Clock()
    records = play(Meter(100, clock=clock, window=3), clock, [4.0] * 5 + [1.0] * 3)
    assert [r.tokens_per_s for r in records[-3:]] == [25.0, 100.0, 100.0]


def test_utilisation_is_work_done_over_work_possible() -> None:
    clock = Clock()
    (record,) = play(Meter(1, flops_per_token=6.0, peak_flops=1200.0, clock=clock), clock, [2.0])
    assert record.mfu == pytest.approx(0.25)


@pytest.mark.parametrize("known", [{"flops_per_token": 6.0}, {"peak_flops": 6.0}])
def test_utilisation_is_unknown_when_a_side_is(known: dict[str, float]) -> None:
    clock = Clock()
    (record,) = play(Meter(1, clock=clock, **known), clock, [2.0])
    assert record.mfu is None


def test_a_clock_that_stands_still_and_a_run_past_its_end_are_survived() -> None:
    clock = Clock()
    *_, last = play(Meter(1, clock=clock), clock, [0.0, 0.0])
    assert last.seconds > 0
    assert last.eta_s == 0.0


def test_a_stop_needs_its_own_start() -> None:
    clock = Clock()
    meter = Meter(3, clock=clock)
    play(meter, clock, [1.0])
    with pytest.raises(RuntimeError, match=r"stop\(2\)"):
        meter.stop(2, loss=0.0, lr=0.0, grad_norm=None, tokens=1, samples=1)


def test_slow_memory_readings_become_rare() -> None:
    clock, readings = Clock(), []

    def read() -> int:
        clock.now += 4.0
        readings.append(clock.now)
        return len(readings)

    records = play(Meter(100, memory=read, clock=clock), clock, [2.0] * 20)
    # 4 s to read: not again within 400 s, which are eight updates and their pauses.
    assert [r.memory_bytes for r in records] == [1] * 8 + [2] * 8 + [3] * 4
    assert {r.seconds for r in records} == {2.0}
