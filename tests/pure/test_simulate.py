"""The simulator against closed forms and against small cases worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sixfold.base.errors import ProgramError
from sixfold.program import (
    SCHEDULES,
    Instruction,
    Op,
    Program,
    evaluation,
    post_ahead,
    stages_of,
    training,
)
from sixfold.simulate import (
    LANES,
    Costs,
    Event,
    StageCosts,
    Timeline,
    chrome_trace,
    html_page,
    measured_costs,
    simulate,
    simulated_again,
)
from tests.pure.programs import accumulation

SECONDS = StageCosts()
"""A second for each pass and each part, everything else at once and for nothing."""
ANY_VIRTUAL = ("interleaved", "breadth-first")


def timed(
    schedule: str, num_ranks: int, num_micro: int, stage: StageCosts = SECONDS, num_virtual=None, **whole
) -> Timeline:
    programs = training(schedule, num_ranks, num_micro, num_virtual)
    num_stages = sum(map(len, stages_of(schedule, num_ranks, num_virtual)))
    return simulate(programs, Costs((stage,) * num_stages, **whole))


def of_instruction(timeline: Timeline, text: str) -> Event:
    (found,) = (event for event in timeline.events if str(event.instruction) == text)
    return found


seconds = st.integers(1, 40).map(lambda number: number / 8)


FORMS = {
    "gpipe": (lambda p: 1, lambda f, b, w: True, lambda f, b, w: f + b + w),
    "1f1b": (lambda p: 1, lambda f, b, w: True, lambda f, b, w: f + b + w),
    "interleaved": (lambda p: p, lambda f, b, w: b + w >= f / 2, lambda f, b, w: f + b + w),
    "breadth-first": (lambda p: p, lambda f, b, w: True, lambda f, b, w: f + b + w),
    "zero-bubble-h1": (lambda p: p, lambda f, b, w: w <= f, lambda f, b, w: f + b - w),
    "zero-bubble-h2": (lambda p: 2 * p - 1, lambda f, b, w: w <= min(f, b), lambda f, b, w: f + b - 2 * w),
    "zero-bubble-v": (lambda p: 2 * p - 1, lambda f, b, w: f == b == w, lambda f, b, w: 0),
}
"""Fewest micro-batches and the costs for which the form holds, and the bubble for each rank but one."""


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.integers(1, 5), st.integers(0, 6), st.integers(2, 3), st.data())
def test_bubbles_are_the_closed_forms(
    schedule: str, num_ranks: int, more: int, num_virtual: int, data: st.DataObject
) -> None:
    fewest, holds, form = FORMS[schedule]
    equal = seconds.map(lambda each: (each, each, each))
    f, b, w = data.draw(equal if schedule == "zero-bubble-v" else st.tuples(seconds, seconds, seconds))
    assume(holds(f, b, w))
    num_micro = fewest(num_ranks) + more
    virtual = num_virtual if schedule in ANY_VIRTUAL else None
    timeline = timed(schedule, num_ranks, num_micro, StageCosts(f, b, w), virtual)
    # Eighths of seconds add up exactly.
    assert timeline.bubble == (num_ranks - 1) * form(f, b, w)
    if "zero" not in schedule:
        ratio = (num_ranks - 1) / ((virtual or 1) * num_micro)
        assert timeline.bubble == pytest.approx(timeline.ideal * ratio)
        assert timeline.makespan == timeline.ideal + timeline.bubble


def test_an_update_together_costs_the_way_in_as_well() -> None:
    """Zero-bubble forms count each rank from its own first pass; `step` has all of them meet."""
    timeline = timed("zero-bubble-h2", 4, 8)
    assert timeline.bubble == 0
    assert timeline.makespan - timeline.ideal == 3
    assert [timeline.idle(rank) for rank in range(4)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        ("gpipe", (12,) * 4),
        ("1f1b", (4, 3, 2, 1)),
        ("zero-bubble-h1", (4,) * 4),
        ("zero-bubble-h2", (7,) * 4),
    ],
)
def test_memory_is_that_of_the_papers(schedule: str, peak: tuple[int, ...]) -> None:
    """In bytes of one micro-batch of one stage, in the queue as large as before."""
    stage = StageCosts(activation_bytes=1, queue_bytes=1)
    assert timed(schedule, 4, 12, stage).peak_bytes == peak


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_the_zigzag_needs_no_more_memory_than_one_forward_one_backward(num_ranks: int) -> None:
    stage = StageCosts(activation_bytes=1, queue_bytes=1)
    timeline = timed("zero-bubble-v", num_ranks, 3 * num_ranks, stage)
    # Stages of half the size, and so two bytes where 1F1B has one.
    assert timeline.peak_bytes == (2 * num_ranks,) * num_ranks


def test_memory_of_every_kind_is_counted() -> None:
    forward = simulate(evaluation("1f1b", 1, 3), Costs((StageCosts(activation_bytes=5),)))
    assert forward.peak_bytes == (5,)
    stage = StageCosts(persistent_bytes=1000, gathered_bytes=100, activation_bytes=10)
    programs = training("1f1b", 1, 2, longest_window=1)
    assert simulate(programs, Costs((stage,))).peak_bytes == (1110,)
    # The second activation is on its way while the first is used; the last stage holds both and its own.
    stages = (StageCosts(output_bytes=7), StageCosts(3, 3, 3, activation_bytes=20))
    first, last = simulate(training("1f1b", 2, 2), Costs(stages)).peak_bytes
    assert (first, last) == (7, 27)
    # What is on its way is there already.
    slow = Costs((StageCosts(output_bytes=7), StageCosts()), bandwidth=7.0)
    assert simulate(evaluation("1f1b", 2, 1), slow).peak_bytes == (0, 7)


def test_transfers_take_time_on_both_ranks() -> None:
    stage = StageCosts(output_bytes=100)
    timeline = timed("1f1b", 2, 1, stage, latency=0.5, bandwidth=200.0)
    send, receive = (
        of_instruction(timeline, f"{t}-activation {s}.0") for t, s in [("send", 0), ("receive", 1)]
    )
    assert (send.rank, send.lane, send.start, send.stop) == (0, "send-activation", 1.0, 2.0)
    assert (receive.rank, receive.lane, receive.start, receive.stop) == (1, "receive-activation", 1.0, 2.0)
    assert of_instruction(timeline, "forward 1.0").start == 2.0
    assert timeline.makespan == 1 + 1 + 3 + 1 + 2


def test_transfers_hide_behind_computation_where_they_may() -> None:
    """An activation travels while the one before it is computed on."""
    stage = StageCosts(output_bytes=1)
    hidden, shown = (
        timed("gpipe", 2, 6, stage, bandwidth=2.0, overlap=overlap).makespan for overlap in (True, False)
    )
    # Way in and way back, each behind one transfer; the others run beside the passes.
    assert hidden == 6 * 3 + 3 + 2 * 0.5
    assert shown > hidden + 6 * 0.5


def test_reduction_runs_under_the_last_backward() -> None:
    def makespan(num_units: int, **whole) -> float:
        stage = StageCosts(1, 2, 2, reduce=2, publish=0.5, num_units=num_units)
        return simulate((accumulation(2),), Costs((stage,), step=1.0, **whole)).makespan

    assert makespan(1) == 10 + 2 + 1 + 0.5
    # Four units: the first is complete after a second; what is left after the last one is half a second.
    assert makespan(4) == 10 + 0.5 + 1 + 0.5
    # Nothing is hidden where nothing overlaps.
    assert makespan(4, overlap=False) == 10 + 2 + 1 + 0.5


def test_reductions_without_a_weight_part_are_paid_as_well() -> None:
    stage = StageCosts(reduce=2)
    timeline = simulate((accumulation(0, 3),), Costs((stage,)))
    assert [(each.start, each.stop) for each in timeline.events[:3]] == [(0, 2), (2, 4), (4, 6)]
    assert timeline.makespan == 6
    assert (timeline.ideal, timeline.bubble) == (0, 0)


def test_a_window_that_opens_ahead_hides_its_gather() -> None:
    stage = StageCosts(gather=1.0)
    costs = Costs((stage,) * 4)

    def makespan(**how) -> float:
        return simulate(training("breadth-first", 2, 4, 2, **how), costs).makespan

    whole = makespan(longest_window=0)
    assert whole < makespan(longest_window=None, ahead=1) < makespan(longest_window=None)
    assert makespan(longest_window=None) < makespan(longest_window=1)


def test_shifts_come_before_what_they_serve() -> None:
    programs = training("1f1b", 1, 1, longest_window=None, shifts=True)
    timeline = simulate(programs, Costs((StageCosts(gather=1, shift=2, publish=1),), step=1))
    order = [str(event.instruction) for event in sorted(timeline.events, key=lambda e: (e.start, e.stop))]
    moments = [text for text in order if not text.startswith(("drop", "reduce", "backward"))]
    before, after = ["shift-in 0", "gather 0", "forward 0.0", "shift-out 0"], ["step", "publish 0"]
    assert moments == [*before, "shift-in 0", *after, "shift-out 0"]
    assert timeline.makespan == 2 + 1 + 3 + 2 + 2 + 1 + 1 + 2


def test_a_rank_hands_over_and_asks_between_its_passes() -> None:
    timeline = timed("gpipe", 2, 2, StageCosts(send=0.25, receive=0.5))
    starts = [of_instruction(timeline, f"forward {each}").start for each in ("0.0", "0.1", "1.0", "1.1")]
    # The first one sends what rank 1 has asked for meanwhile; that asks for the next before it computes.
    assert starts[:3] == [0, 1.25, 1]
    assert starts[3] == max(1.25 + 1, 2 + 0.5)
    blocking = timed("gpipe", 2, 2, StageCosts(send=0.25, receive=0.5), overlap=False)
    assert of_instruction(blocking, "forward 0.1").start == 1


def test_the_update_waits_for_the_slowest_rank() -> None:
    timeline = simulate(training("1f1b", 2, 1), Costs((StageCosts(), StageCosts(1, 1, 9)), step=1.0))
    steps = [event for event in timeline.events if event.instruction == Instruction(Op.STEP)]
    assert [(event.start, event.stop) for event in steps] == [(14.0, 15.0), (14.0, 15.0)]


def test_uneven_stages_are_measured_against_the_busiest() -> None:
    timeline = simulate(training("1f1b", 2, 4), Costs((StageCosts(), StageCosts(2, 2, 2))))
    assert timeline.ideal == timeline.busy(1) == 24
    assert timeline.idle(0) == timeline.makespan - 12
    assert timeline.makespan >= 24 + 1 + 2


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(0, 6), st.booleans(), st.data())
def test_every_lane_does_one_thing_at_a_time(
    schedule: str, num_ranks: int, num_micro: int, overlap: bool, data: st.DataObject
) -> None:
    num_stages = sum(map(len, stages_of(schedule, num_ranks)))
    numbers = st.integers(0, 9)
    stages = tuple(
        StageCosts(*data.draw(st.tuples(*[numbers] * 9)), 2, *data.draw(st.tuples(*[numbers] * 5)))
        for _ in range(num_stages)
    )
    programs = training(schedule, num_ranks, num_micro, longest_window=None, shifts=True)
    costs = Costs(stages, step=1, latency=0.5, bandwidth=3.0, overlap=overlap)
    timeline = simulate(programs, costs)
    assert timeline == simulate(programs, costs)
    assert sorted(str(event.instruction) for event in timeline.events) == sorted(
        str(each) for program in programs for each in program.instructions
    )
    for rank in range(num_ranks):
        for lane in LANES:
            own = sorted((e.start, e.stop) for e in timeline.events if (e.rank, e.lane) == (rank, lane))
            assert all(before[1] <= after[0] for before, after in pairwise(own))
        assert timeline.ideal <= timeline.makespan
        assert timeline.peak_bytes[rank] >= sum(
            stages[stage].persistent_bytes for stage in stages_of(schedule, num_ranks)[rank]
        )


def test_the_drawing_shows_who_waits() -> None:
    assert timed("1f1b", 2, 3).drawing() == "rank 0  01..aa2bb.cc\nrank 1  .0aa1bb2cc.."
    assert timed("zero-bubble-h1", 2, 2).drawing() == "rank 0  01.aAbB\nrank 1  .0a1bAB"
    assert timed("gpipe", 1, 1, StageCosts(2, 2, 2)).drawing(2.0) == "rank 0  0aa"


def test_the_text_fits_one_screen() -> None:
    text = str(timed("1f1b", 2, 3, StageCosts(activation_bytes=1024)))
    assert text.splitlines()[0] == "makespan 12 s, ideal 9 s, bubble 3 s"
    assert text.splitlines()[1].startswith("rank 0: busy 9 s, idle 3 s, peak 2")
    # Costs without memory say nothing of it.
    assert "peak" not in str(timed("1f1b", 2, 3))


def test_the_trace_is_one_for_chrome() -> None:
    timeline = timed("1f1b", 2, 1, latency=0.25)
    trace = json.loads(chrome_trace({"predicted": timeline, "measured": timeline}))["traceEvents"]
    boxes = [each for each in trace if each["ph"] == "X"]
    assert len(boxes) == 2 * len(timeline.events)
    (box,) = (each for each in boxes if each["name"] == "forward 1.0" and each["pid"] == 2)
    assert (box["ts"], box["dur"], box["args"]) == (1.25e6, 1e6, {"stage": 1, "micro": 0})
    names = {each["pid"]: each["args"]["name"] for each in trace if each["name"] == "process_name"}
    assert names == {0: "rank 0 predicted", 1: "rank 0 measured", 2: "rank 1 predicted", 3: "rank 1 measured"}


class Page(HTMLParser):
    """What stands in a page: its boxes, its titles, and whatever it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.boxes: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "rect":
            self.boxes.append(dict(attrs))
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & dict(attrs).keys():
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_draws_every_pass_and_loads_nothing() -> None:
    timeline = timed("1f1b", 2, 3)
    measured = Timeline(tuple(e for e in timeline.events if e.rank == 0))
    page = Page(html_page({"predicted": timeline, "measured <1>": measured}, title="a & b"))
    # Whatever takes no time is left out: the passes of both ranks, and those of one again.
    assert len(page.boxes) == 2 * 6 + 6
    assert not page.loads
    told = "".join(page.text)
    assert "a & b" in told
    assert "rank 0 measured <1> compute" in told
    assert "backward 1.2: 8 s to 10 s, 2 s" in told
    widths: dict[str | None, float] = {each["fill"]: float(each["width"] or 0) for each in page.boxes}
    narrow, wide = widths.values()
    assert wide == pytest.approx(2 * narrow, rel=1e-3)
    assert not Page(html_page({"empty": Timeline(())})).boxes


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_costs_of_a_recorded_step_give_its_makespan_back(schedule: str) -> None:
    programs = training(schedule, 2, 4)
    costs = Costs((StageCosts(1, 2, 1), StageCosts(1, 1, 1, publish=0.5)), step=1.5)
    timeline = simulate(programs, costs)
    recorded = Timeline(tuple(as_recorded(timeline, event) for event in timeline.events))
    assert simulate(programs, measured_costs([recorded] * 2)).makespan == timeline.makespan


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_served", [0, 2])
def test_a_recorded_step_is_simulated_from_itself_alone(schedule: str, num_served: int) -> None:
    """Also where receives were posted ahead of their place, and through a file."""
    virtual = 2 if schedule in ANY_VIRTUAL else None
    programs = training(schedule, 2, 4, virtual, num_served=num_served, longest_window=None)
    costs = Costs((StageCosts(1, 2, 1), StageCosts(1, 1, 1, publish=0.5)) * (virtual or 1), step=1.5)
    if schedule == "zero-bubble-v":
        costs = replace(costs, stages=costs.stages * 2)
    timeline = simulate(programs, costs)
    times = {(each.rank, each.instruction): as_recorded(timeline, each) for each in timeline.events}
    recorded = Timeline(
        tuple(
            times.get((rank, each), Event(rank, "reduce", each, 0.0, 0.0))
            for rank, program in enumerate(map(post_ahead, programs))
            for each in program.instructions
        )
    )
    again = simulated_again(Timeline.of_rows(json.loads(json.dumps(recorded.rows()))))
    assert again.makespan == timeline.makespan
    assert [again.busy(rank) for rank in range(2)] == [timeline.busy(rank) for rank in range(2)]


def test_a_recording_is_aligned_by_its_first_pass() -> None:
    rows = [(0, "receive-activation 1.0", 2.0, 2.5), (0, "forward 1.0", 3.0, 4.0), (0, "backward 1.0", 5, 7)]
    assert Timeline.of_rows(rows).aligned().rows() == [
        (0, "receive-activation 1.0", 0.0, 0.0),
        (0, "forward 1.0", 0.0, 1.0),
        (0, "backward 1.0", 2.0, 4.0),
    ]


def as_recorded(timeline: Timeline, event: Event) -> Event:
    """`event` as a player records it: a rank's `step` begins when the rank is at it, and waits in it."""
    if event.instruction.op is not Op.STEP:
        return event
    return replace(event, start=timeline.passes(event.rank)[-1].stop)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: StageCosts(forward=-1.0),
        lambda: StageCosts(forward=float("nan")),
        lambda: StageCosts(num_units=0),
        lambda: Costs((StageCosts(),), latency=-1.0),
        lambda: Costs((StageCosts(),), bandwidth=0.0),
        lambda: simulate(training("1f1b", 2, 1), Costs((StageCosts(),) * 3)),
        lambda: simulate((Program.parse("backward 0.0"),), Costs((StageCosts(),))),
    ],
)
def test_what_makes_no_sense_is_refused(wrong) -> None:
    with pytest.raises(ProgramError):
        wrong()
