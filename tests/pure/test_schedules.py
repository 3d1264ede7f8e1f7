"""Pipelines of several ranks: every schedule passes the checker, and what is broken does not.

A machine of its own plays programs on tokens instead of tensors: it knows what a pass uses up and leaves
behind, and nothing of the checker's rules. What the checker accepts must come to the same there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sixfold.base.errors import ProgramError
from sixfold.program import (
    PASSES,
    RECEIVES,
    SCHEDULES,
    SENDS,
    Instruction,
    Op,
    Peak,
    Program,
    Wiring,
    add_shifts,
    add_transfers,
    add_windows,
    check,
    evaluation,
    global_order,
    passes,
    peaks,
    post_ahead,
    results,
    stages_of,
    training,
)
from tests.pure.programs import accumulation

Programs = tuple[Program, ...]
ANY_VIRTUAL = ("interleaved", "breadth-first")
SPLIT = ("zero-bubble-h1", "zero-bubble-h2", "zero-bubble-v")


class Wrong(Exception):
    """The token machine cannot go on, or a rank's state makes no sense."""


class Machine:
    """Plays programs with buffered sends and receives that block, on tokens.

    Its outcome is what training is about: which (stage, micro-batch) reached the optimizer, how often, what
    was published, and that nothing is left lying about.
    """

    def __init__(
        self, programs: Programs, placed: tuple[tuple[int, ...], ...], is_cut: bool, at_home: bool
    ) -> None:
        self.queues = [deque(program.instructions) for program in programs]
        self.owned = [set(stages) for stages in placed]
        self.num_stages = sum(map(len, placed))
        self.channels: dict[tuple[Op, int], deque[int]] = {}
        self.is_cut, self.at_home = is_cut, at_home
        ranks = range(len(programs))
        self.tokens = [Counter[tuple[str, int, int]]() for _ in ranks]
        self.whole = [set[int]() for _ in ranks]
        self.present = [set[int]() for _ in ranks]
        self.sums = [dict[int, Counter[tuple[int, int]]]() for _ in ranks]
        self.windows = [dict[int, str]() for _ in ranks]
        self.updated = Counter[tuple[int, int]]()
        self.has_stepped = [False for _ in ranks]
        self.published = Counter[int]()

    def outcome(self) -> tuple[object, ...]:
        """Play to the end.

        Raises:
            Wrong: something was missing, doubled, or out of order.
        """
        moved = True
        while moved:
            moved = False
            for rank, queue in enumerate(self.queues):
                while queue and self.perform(rank, queue[0]):
                    queue.popleft()
                    moved = True
        left = [+tokens for tokens in self.tokens if +tokens]
        if any(self.queues) or left or any(self.channels.values()) or any(self.whole) or any(self.present):
            raise Wrong
        for rank in range(len(self.queues)):
            if not self.has_stepped[rank]:
                self.close(rank)
        return frozenset(self.updated.items()), frozenset(self.published.items()), tuple(self.has_stepped)

    def perform(self, rank: int, each: Instruction) -> bool:
        op, stage, micro = each.op, each.stage, each.micro
        if op is Op.STEP:
            self.require(not self.has_stepped[rank] and not self.whole[rank])
            self.require(not self.at_home or self.present[rank] == self.owned[rank])
            self.close(rank)
            self.has_stepped[rank] = True
            return True
        assert stage is not None
        if op in RECEIVES:
            sender = each.partner
            assert sender is not None
            channel = self.channels.setdefault((sender.op, sender.stage or 0), deque())
            if not channel:
                return False
            self.require(channel.popleft() == micro)
            self.tokens[rank]["input" if op is Op.RECEIVE_ACTIVATION else "gradient", stage, micro] += 1
        elif op in SENDS:
            self.take(rank, "output" if op is Op.SEND_ACTIVATION else "input gradient", stage, micro)
            self.channels.setdefault((op, stage), deque()).append(micro)
        elif op in PASSES:
            self.require(not self.has_stepped[rank])
            self.require(not self.is_cut or stage in self.whole[rank])
            self.run(rank, op, stage, micro)
        else:
            self.manage(rank, op, stage)
        return True

    def run(self, rank: int, op: Op, stage: int, micro: int | None) -> None:
        last = self.num_stages - 1
        if op is Op.FORWARD:
            if stage:
                self.take(rank, "input", stage, micro)
            self.require(not self.tokens[rank]["activation", stage, micro])
            self.require(("seen", stage, micro) not in self.tokens[rank])
            self.tokens[rank]["seen", stage, micro] = 0
            self.tokens[rank]["activation", stage, micro] += 1
            if stage < last:
                self.tokens[rank]["output", stage, micro] += 1
                self.hand_over(rank, "output", stage, "input", stage + 1, micro)
        if op in (Op.BACKWARD, Op.BACKWARD_INPUT):
            self.take(rank, "activation", stage, micro)
            if stage < last:
                self.take(rank, "gradient", stage, micro)
            if stage:
                self.tokens[rank]["input gradient", stage, micro] += 1
                self.hand_over(rank, "input gradient", stage, "gradient", stage - 1, micro)
            self.tokens[rank]["queued", stage, micro] += 1
        if op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            self.take(rank, "queued", stage, micro)
            sums = self.sums[rank].setdefault(stage, Counter())
            if self.windows[rank].get(stage) == "open":
                # The next weight part completes the units, and they are reduced at once.
                self.windows[rank][stage] = "used"
                self.updated.update([*sums.elements(), (stage, micro)])
                sums.clear()
            else:
                sums[stage, micro] += 1

    def hand_over(self, rank: int, have: str, stage: int, want: str, other: int, micro: int | None) -> None:
        """To a stage of the same rank nothing is sent."""
        if other in self.owned[rank]:
            self.take(rank, have, stage, micro)
            self.tokens[rank][want, other, micro] += 1

    def manage(self, rank: int, op: Op, stage: int) -> None:
        held = self.present[rank] if op in (Op.SHIFT_IN, Op.SHIFT_OUT) else self.whole[rank]
        if op in (Op.GATHER, Op.SHIFT_IN):
            self.require(stage not in held)
            held.add(stage)
        if op in (Op.DROP, Op.SHIFT_OUT):
            self.require(stage in held)
            held.remove(stage)
        if op in (Op.GATHER, Op.DROP, Op.PUBLISH):
            self.require(not self.at_home or stage in self.present[rank])
        if op is Op.SHIFT_OUT or op is Op.PUBLISH:
            self.require(op is Op.SHIFT_OUT or self.has_stepped[rank])
            self.published[stage] += op is Op.PUBLISH
        else:
            self.require(not self.has_stepped[rank])
        if op is Op.REDUCE:
            self.close_window(rank, stage)
            self.windows[rank][stage] = "open"

    def close(self, rank: int) -> None:
        for stage in self.owned[rank]:
            self.close_window(rank, stage)

    def close_window(self, rank: int, stage: int) -> None:
        if self.windows[rank].get(stage) == "open":
            self.updated.update(self.sums[rank].pop(stage, Counter()).elements())

    def take(self, rank: int, kind: str, stage: int, micro: int | None) -> None:
        self.require(self.tokens[rank][kind, stage, micro] > 0)
        self.tokens[rank][kind, stage, micro] -= 1

    def require(self, holds: bool) -> None:
        if not holds:
            raise Wrong


def virtuals(schedule: str) -> tuple[int | None, ...]:
    return (1, 2, 3) if schedule in ANY_VIRTUAL else (None,)


PRODUCT = [
    (schedule, num_ranks, num_micro, num_virtual, window)
    for schedule in SCHEDULES
    for num_ranks, num_micro, num_virtual, window in product(
        (1, 2, 3, 4), (1, 4, 7, 8), virtuals(schedule), (0, 1, None)
    )
]
"""Schedule x ranks x micro-batches x stages on a rank x how parameters are kept; the rest alternates."""


def test_every_schedule_passes_in_the_full_product() -> None:
    for number, (schedule, num_ranks, num_micro, num_virtual, window) in enumerate(PRODUCT):
        shifts = number % 4 > 1
        programs = training(
            schedule,
            num_ranks,
            num_micro,
            num_virtual,
            num_reduces=(1, num_micro)[number % 2],
            longest_window=window,
            shifts=shifts,
        )
        check(programs)
        placed = stages_of(schedule, num_ranks, num_virtual)
        num_stages = sum(map(len, placed))
        updated, published, _ = Machine(programs, placed, window != 0, shifts).outcome()
        assert updated == {((s, m), 1) for s in range(num_stages) for m in range(num_micro)}
        assert published == {(stage, 1) for stage in range(num_stages)}
    assert len(PRODUCT) > 500


@st.composite
def settings_of(draw: st.DrawFn) -> dict[str, object]:
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    num_micro = draw(st.integers(0, 13))
    return {
        "schedule": schedule,
        "num_ranks": draw(st.integers(1, 6)),
        "num_micro": num_micro,
        "num_virtual": draw(st.sampled_from(virtuals(schedule))),
        "num_served": draw(st.sampled_from([0, 0, 1, 3])),
        "num_reduces": draw(st.sampled_from([1, 2, num_micro or 1])),
        "longest_window": draw(st.sampled_from([0, 1, 2, None])),
        "ahead": draw(st.integers(0, 2)),
        "shifts": draw(st.booleans()),
        "updates": draw(st.booleans()),
    }


@settings(max_examples=200, deadline=None)
@given(settings_of())
def test_generated_programs_pass_and_round_trip(arguments: dict) -> None:
    programs = training(**arguments)
    check(programs)
    assert tuple(Program.parse(str(program)) for program in programs) == programs
    windows = {key: arguments[key] for key in ("num_served", "longest_window", "ahead")}
    forwards = evaluation(*list(arguments.values())[:4], **windows)
    check(forwards)
    ops = {each.op for program in forwards for each in program.instructions}
    assert ops <= {
        Op.FORWARD,
        Op.SERVE_FORWARD,
        Op.GATHER,
        Op.DROP,
        Op.SEND_ACTIVATION,
        Op.RECEIVE_ACTIVATION,
    }


SMALL = [
    (schedule, num_ranks, num_micro, window, shifts, num_reduces)
    for schedule in SCHEDULES
    for num_ranks, num_micro, window, shifts, num_reduces in product(
        (1, 2, 3), (1, 3), (0, 1), (False, True), (1, 2)
    )
]


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(SMALL), st.sampled_from(["drop", "double", "swap", "renumber", "retype"]), st.data())
def test_a_mutant_is_rejected_or_comes_to_the_same(given_: tuple, kind: str, data: st.DataObject) -> None:
    schedule, num_ranks, num_micro, window, shifts, num_reduces = given_
    num_virtual = 2 if schedule in ANY_VIRTUAL else None
    programs = training(
        schedule,
        num_ranks,
        num_micro,
        num_virtual,
        num_reduces=num_reduces,
        longest_window=window,
        shifts=shifts,
    )
    rank = data.draw(st.integers(0, num_ranks - 1))
    items = list(programs[rank].instructions)
    place = data.draw(st.integers(0, len(items) - 1))
    each = items[place]
    if kind == "drop":
        del items[place]
    elif kind == "double":
        items.insert(data.draw(st.integers(0, len(items))), each)
    elif kind == "swap":
        other = data.draw(st.integers(0, len(items) - 1))
        items[place], items[other] = items[other], items[place]
    elif kind == "renumber":
        assume(each.stage is not None)
        numbers = [each.stage, each.micro]
        which = data.draw(st.integers(0, 1)) if each.micro is not None else 0
        numbers[which] = data.draw(st.integers(0, 6))
        items[place] = Instruction(each.op, *(n for n in numbers if n is not None))
    else:
        alike = [op for op in Op if _size(op) == _size(each.op)]
        items[place] = Instruction(data.draw(st.sampled_from(alike)), each.stage, each.micro)
    mutant = (*programs[:rank], Program(tuple(items)), *programs[rank + 1 :])
    assume(mutant != programs)
    placed = stages_of(schedule, num_ranks, num_virtual)
    if is_accepted(mutant):
        expected = Machine(programs, placed, window != 0, shifts).outcome()
        assert Machine(mutant, placed, window != 0, shifts).outcome() == expected
        # What may be gone, come twice or change is a window for reductions; the rest is a matter of order.
        assert kind == "swap" or each.op is Op.REDUCE


def _size(op: Op) -> int:
    of_a_stage = (Op.REDUCE, Op.PUBLISH, Op.GATHER, Op.DROP, Op.SHIFT_IN, Op.SHIFT_OUT)
    return 0 if op is Op.STEP else 1 if op in of_a_stage else 2


def is_accepted(programs: Programs) -> bool:
    try:
        check(programs)
    except ProgramError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(settings_of())
def test_ranks_with_fewer_micro_batches_gather_and_reduce_in_the_same_order(arguments: dict) -> None:
    def collectives(num_micro: int, num_served: int) -> list[list[Instruction]]:
        programs = training(**{**arguments, "num_micro": num_micro, "num_served": num_served})
        return [[each for each in program.instructions if each.micro is None] for program in programs]

    total = arguments["num_micro"] + arguments["num_served"]
    assert collectives(arguments["num_micro"], arguments["num_served"]) == collectives(total, 0)


@settings(max_examples=60, deadline=None)
@given(settings_of())
def test_receives_that_are_posted_ahead_change_nothing_else(arguments: dict) -> None:
    for program in training(**arguments):
        ahead = post_ahead(program)
        assert Counter(ahead.instructions) == Counter(program.instructions)
        for moves in (True, False):
            kept = [
                [each for each in one.instructions if (each.op in RECEIVES) == moves]
                for one in (program, ahead)
            ]
            assert kept[0] == kept[1]
        place = {each: number for number, each in enumerate(ahead.instructions) if each.micro is not None}
        before = {each: number for number, each in enumerate(program.instructions) if each.micro is not None}
        for each in place:
            if each.op in RECEIVES:
                assert place[each] <= before[each]
            if each.op is Op.RECEIVE_GRADIENT:
                assert place[each] > place[Instruction(Op.FORWARD, each.stage, each.micro)]
        for each, following in pairwise(ahead.instructions):
            if each.op is Op.REDUCE:
                assert following.op not in RECEIVES


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_programs_end_where_all_transfers_of_a_pair_run_in_one_order(schedule: str, num_ranks: int) -> None:
    virtual = 2 if schedule in ANY_VIRTUAL else None
    assert ends_in_order(training(schedule, num_ranks, 8, virtual))
    assert ends_in_order(evaluation(schedule, num_ranks, 8, virtual))


def test_receives_that_are_posted_ahead_need_independent_directions() -> None:
    assert not ends_in_order(tuple(map(post_ahead, training("1f1b", 2, 8))))


def ends_in_order(programs: tuple[Program, ...]) -> bool:
    """Whether all ranks get through if transfers block nobody, but those of a pair run in the order in which
    each of the two has started them."""
    wiring, done = Wiring(programs), set[Instruction]()
    at = [0] * len(programs)
    started: dict[tuple[int, int], deque[Instruction]] = defaultdict(deque)
    before = None
    while before != (before := (tuple(at), len(done))):
        for rank, program in enumerate(programs):
            for each in program.instructions[at[rank] :]:
                if each.partner is not None and each.partner.stage is not None:
                    started[rank, wiring.ranks[each.partner.stage]].append(each)
                elif done.issuperset(wiring.needs(each)):
                    done.update(results(each))
                else:
                    break
                at[rank] += 1
        for (rank, other), mine in list(started.items()):
            theirs = started[other, rank]
            while mine and theirs and mine[0].partner == theirs[0]:
                done.update((mine.popleft(), theirs.popleft()))
    return not any(started.values()) and at == list(map(len, programs))


def test_what_is_served_is_not_sent() -> None:
    assert str(training("zero-bubble-h1", 2, 1, num_served=1)[1]) == (
        "receive-activation 1.0 | forward 1.0 | backward-input 1.0 | send-gradient 1.0 | serve-forward 1.1 | "
        "serve-backward 1.1 | backward-weight 1.0 | reduce 1 | step | publish 1"
    )


def test_one_stage_is_the_accumulation_step() -> None:
    for num_micro in (0, 1, 2, 5):
        for schedule in ("1f1b", "interleaved"):
            assert training(schedule, 1, num_micro)[0] == accumulation(num_micro)
    assert evaluation("gpipe", 1, 3)[0] == evaluation("1f1b", 1, 3)[0]


def test_transfers_stand_where_both_ranks_can_meet() -> None:
    first, second = training("1f1b", 2, 2)
    assert str(first) == (
        "forward 0.0 | send-activation 0.0 | forward 0.1 | send-activation 0.1 | receive-gradient 0.0 | "
        "backward 0.0 | receive-gradient 0.1 | reduce 0 | backward 0.1 | step | publish 0"
    )
    assert str(second) == (
        "receive-activation 1.0 | forward 1.0 | receive-activation 1.1 | backward 1.0 | send-gradient 1.0 | "
        "forward 1.1 | reduce 1 | backward 1.1 | send-gradient 1.1 | step | publish 1"
    )


def test_sends_that_wait_for_each_other_are_refused() -> None:
    """The order that a pipeline written by hand often has: it only works while sends are buffered."""
    first = "forward 0.0 | send-activation 0.0 | forward 0.1 | send-activation 0.1 | receive-gradient 0.0"
    second = "receive-activation 1.0 | forward 1.0 | backward 1.0 | send-gradient 1.0"
    programs = (
        Program.parse(f"{first} | backward 0.0 | receive-gradient 0.1 | backward 0.1"),
        Program.parse(f"{second} | receive-activation 1.1 | forward 1.1 | backward 1.1 | send-gradient 1.1"),
    )
    assert Machine(programs, ((0,), (1,)), False, False).outcome()
    with pytest.raises(
        ProgramError, match=r"rank 0 is at send-activation 0.1; rank 1 is at send-gradient 1.0"
    ):
        check(programs)


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["forward 0.0", "receive-activation 1.0 | forward 1.0"], "without send-activation 0.0"),
        (["forward 0.0 | send-activation 0.0", "forward 1.0"], "without receive-activation 1.0"),
        (["forward 0.0", "forward 0.1"], "rank 0's"),
        (["forward 0.0", "forward 2.0"], "stages"),
        (["forward 0.1"], "without forward 0.0"),
        (["forward 0.0 | send-activation 0.0"], "nothing asks for"),
        (["forward 0.0 | backward-input 0.0"], "without backward-weight 0.0"),
        (["forward 0.0 | backward-weight 0.0 | backward-input 0.0"], "can go on"),
        (["forward 0.0 | backward-input 0.0 | backward-weight 0.0 | backward 0.0"], "nothing asks for"),
        (["reduce 0 | step | publish 0", "reduce 1"], "step on 1 of 2"),
        (["gather 0 | forward 0.0"], "without drop 0"),
        (["gather 0 | drop 0 | forward 0.0"], "outside gather"),
        (["gather 0 | gather 0 | forward 0.0 | drop 0"], "so already"),
        (["gather 0 | reduce 0 | step | publish 0 | drop 0"], "drop 0 after step"),
        (["shift-in 0 | shift-out 0 | gather 0 | forward 0.0 | drop 0"], "outside shift-in"),
        (["shift-in 0 | shift-out 0 | reduce 0 | step | publish 0"], "step outside shift-in"),
    ],
)
def test_what_is_wrong_is_named(texts: list[str], match: str) -> None:
    with pytest.raises(ProgramError, match=match):
        check(tuple(map(Program.parse, texts)))


def test_stages_stand_where_the_schedule_says() -> None:
    assert stages_of("1f1b", 3) == ((0,), (1,), (2,))
    assert stages_of("interleaved", 2, 3) == ((0, 2, 4), (1, 3, 5))
    assert stages_of("zero-bubble-v", 3) == ((0, 5), (1, 4), (2, 3))
    middle = training("zero-bubble-v", 3, 4)[2]
    assert not {"send-activation 2.0", "receive-activation 3.0"} & {str(i) for i in middle.instructions}


@pytest.mark.parametrize(
    "arguments",
    [("2f2b", 2, 1), ("1f1b", 0, 1), ("1f1b", 2, -1), ("1f1b", 2, 1, 2), ("zero-bubble-v", 2, 1, 1)],
)
def test_impossible_schedules_are_refused(arguments: tuple) -> None:
    with pytest.raises(ProgramError):
        training(*arguments)


def peak_of(programs: Programs) -> list[dict[int, Peak]]:
    return [peaks(program) for program in programs]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_what_a_stage_holds_at_most(num_ranks: int) -> None:
    """In micro-batches: GPipe all of them; 1F1B and H1 at most as many as ranks; H2 twice that less one."""
    p, num_micro = num_ranks, 3 * num_ranks
    for rank in range(p):
        assert peak_of(training("gpipe", p, num_micro))[rank][rank] == Peak(num_micro, 0, num_micro)
        assert peak_of(training("1f1b", p, num_micro))[rank][rank] == Peak(p - rank, 0, p - rank)
        half = peak_of(training("zero-bubble-h1", p, num_micro))[rank][rank]
        assert (half.activations, half.together) == (p - rank, p)
        full = peak_of(training("zero-bubble-h2", p, num_micro))[rank][rank]
        assert (full.activations, full.together) == (2 * (p - rank) - 1, 2 * p - 1)


@pytest.mark.parametrize(("longest", "num_gathers"), [(1, 16), (None, 3)])
def test_breadth_first_gathers_once_where_others_gather_often(longest: int | None, num_gathers: int) -> None:
    programs = training("breadth-first", 2, 4, 2, longest_window=longest)
    for program in programs:
        gathers = [each for each in program.instructions if each.op is Op.GATHER]
        # Forwards of two stages and backwards of two, the second's back to back.
        assert len(gathers) == num_gathers
    often = training("interleaved", 2, 4, 2, longest_window=None)
    assert all(sum(i.op is Op.GATHER for i in program.instructions) > 3 for program in often)


def test_a_window_can_open_ahead() -> None:
    program = Program.parse("forward 0.0 | forward 1.0 | backward 1.0 | backward 0.0")
    assert str(add_windows(program, ahead=1)) == (
        "gather 0 | gather 1 | forward 0.0 | drop 0 | forward 1.0 | gather 0 | backward 1.0 | drop 1 | "
        "backward 0.0 | drop 0"
    )
    assert str(add_shifts(add_windows(Program.parse("forward 0.0")), [0])) == (
        "shift-in 0 | gather 0 | forward 0.0 | drop 0 | shift-out 0"
    )


@pytest.mark.parametrize("schedule", SPLIT)
def test_a_reduction_opens_right_before_a_weight_part(schedule: str) -> None:
    for program in training(schedule, 3, 5, num_reduces=2):
        items = program.instructions
        for place, each in enumerate(items):
            if each.op is Op.REDUCE:
                assert (items[place + 1].op, items[place + 1].stage) == (Op.BACKWARD_WEIGHT, each.stage)
        for stage in peaks(program):
            parts = [i for i in items if i.op in (Op.BACKWARD_WEIGHT, Op.REDUCE) and i.stage == stage]
            assert [i.op is Op.REDUCE for i in parts[-4:]] == [True, False, True, False]


def test_passes_that_cannot_follow_each_other_are_refused() -> None:
    with pytest.raises(ProgramError, match="can go on"):
        add_transfers((Program.parse("backward 0.0 | forward 0.0"),))


def test_the_order_of_everything_keeps_each_program() -> None:
    programs = training("interleaved", 3, 5, 2)
    order = list(global_order(Wiring(programs)))
    for rank, program in enumerate(programs):
        assert tuple(each for at, each in order if at == rank) == program.instructions
    for (_, each), (_, following) in pairwise(order):
        if each.op in SENDS:
            assert following == each.partner
    assert sum(map(len, passes("interleaved", 3, 5, 2))) == sum(each.op in PASSES for _, each in order)
