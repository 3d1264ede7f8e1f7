"""Programs: the text form and the checker."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.base.errors import ProgramError
from sixfold.program import Instruction, Op, Program, check, evaluation, training
from tests.pure.programs import accumulation

OF_A_STAGE = (Op.REDUCE, Op.PUBLISH, Op.GATHER, Op.DROP, Op.SHIFT_IN, Op.SHIFT_OUT)
NUMBERS = dict.fromkeys(Op, 2) | dict.fromkeys(OF_A_STAGE, 1) | {Op.STEP: 0}


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    op = draw(st.sampled_from(Op))
    return Instruction(op, *(draw(st.integers(0, 99)) for _ in range(NUMBERS[op])))


@given(st.lists(instructions()))
def test_text_form_round_trips(items: list[Instruction]) -> None:
    program = Program(tuple(items))
    assert Program.parse(str(program)) == program
    assert len(program) == len(items)


def test_text_form_is_the_documented_one() -> None:
    assert str(accumulation(2)) == (
        "forward 0.0 | backward 0.0 | forward 0.1 | reduce 0 | backward 0.1 | step | publish 0"
    )
    assert str(accumulation(0)) == "reduce 0 | step | publish 0"
    assert str(evaluation("1f1b", 1, 2)[0]) == "forward 0.0 | forward 0.1"
    assert str(accumulation(2, 2)) == (
        "forward 0.0 | reduce 0 | backward 0.0 | forward 0.1 | reduce 0 | backward 0.1 | step | publish 0"
    )
    assert str(accumulation(1, 3)) == (
        "forward 0.0 | reduce 0 | backward 0.0 | reduce 0 | reduce 0 | step | publish 0"
    )
    assert str(accumulation(1, 2, num_served=1)) == (
        "forward 0.0 | reduce 0 | backward 0.0 | serve-forward 0.1 | reduce 0 | serve-backward 0.1 | step | "
        "publish 0"
    )
    assert str(evaluation("1f1b", 1, 1, num_served=1)[0]) == "forward 0.0 | serve-forward 0.1"
    assert str(training("1f1b", 1, 1, updates=False)[0]) == "forward 0.0 | reduce 0 | backward 0.0"


@pytest.mark.parametrize(
    "text",
    ["fly 0.1", "forward", "forward 0", "forward 0.1.2", "forward a.b", "step 1", "reduce 0.1", "forward 0."],
)
def test_what_is_no_instruction_is_refused(text: str) -> None:
    with pytest.raises(ProgramError):
        Program.parse(text)


@pytest.mark.parametrize("numbers", [{}, {"stage": 0}, {"micro": 0}])
def test_an_instruction_has_exactly_its_numbers(numbers: dict[str, int]) -> None:
    with pytest.raises(ProgramError):
        Instruction(Op.FORWARD, **numbers)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 10))
def test_generated_programs_are_accepted(num_micro: int, num_reduces: int, num_served: int) -> None:
    numbers = {"num_reduces": num_reduces, "num_served": num_served}
    (rehearsal,) = training("1f1b", 1, num_micro, updates=False, **numbers)
    for program in (accumulation(num_micro, **numbers), rehearsal):
        check(program)
        assert program.instructions.count(Instruction(Op.REDUCE, 0)) == num_reduces
    check(*evaluation("1f1b", 1, num_micro, num_served=num_served))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_ranks_that_serve_each_other_make_the_same_passes_and_windows(shares: list[int]) -> None:
    most = max(shares)
    serves = {Op.SERVE_FORWARD: Op.FORWARD, Op.SERVE_BACKWARD: Op.BACKWARD}

    def passes(num_micro: int) -> list[tuple[Op, int | None]]:
        program = accumulation(num_micro, max(1, most), most - num_micro)
        return [(serves.get(item.op, item.op), item.micro) for item in program.instructions]

    assert len({tuple(passes(num_micro)) for num_micro in shares}) == 1


@given(st.integers(1, 12), st.data())
def test_a_missing_or_doubled_instruction_is_refused(num_micro: int, data: st.DataObject) -> None:
    items = accumulation(num_micro).instructions
    place = data.draw(st.integers(0, len(items) - 1))
    doubled_at = data.draw(st.integers(0, len(items)))
    if items[place].op is not Op.STEP:
        # Without its step a program would be a rehearsal, but for its publish.
        with pytest.raises(ProgramError):
            check(Program(items[:place] + items[place + 1 :]))
    if items[place].op is not Op.REDUCE or doubled_at > num_micro * 2 + 1:
        # A further window is legal, as long as it opens before the step.
        with pytest.raises(ProgramError):
            check(Program((*items[:doubled_at], items[place], *items[doubled_at:])))


@pytest.mark.parametrize("op", ["forward", "serve-forward"])
def test_a_served_pass_is_followed_by_its_backward(op: str) -> None:
    good = f"{op} 0.0 | reduce 0 | {op.replace('forward', 'backward')} 0.0 | step | publish 0"
    check(Program.parse(good))
    other = {"forward": "serve-backward 0.0", "serve-forward": "backward 0.0"}[op]
    for bad in (
        good.replace(f"{op} 0.0 | ", ""),
        good.replace(f"{op.replace('forward', 'backward')} 0.0", other),
    ):
        with pytest.raises(ProgramError):
            check(Program.parse(bad))


def test_an_update_without_step_is_refused() -> None:
    for num_micro in range(3):
        items = tuple(item for item in accumulation(num_micro).instructions if item.op is not Op.STEP)
        with pytest.raises(ProgramError, match="without step"):
            check(Program(items))


def can_be_played(items: tuple[Instruction, ...]) -> bool:
    """The rules again, as a machine that plays one stage and looks no further than its own state."""
    opened, ended, waiting, after_opening = False, False, set[int | None](), 0
    for item in items:
        if ended and item.op is not Op.PUBLISH:
            return False
        if item.op is Op.FORWARD:
            waiting.add(item.micro)
        elif item.op is Op.BACKWARD:
            if item.micro not in waiting:
                return False
            waiting.remove(item.micro)
            after_opening += opened
        elif item.op is Op.REDUCE:
            opened, after_opening = True, 0
        elif item.op is Op.STEP:
            if waiting or not opened or after_opening > 1:
                return False
            ended = True
        elif not ended:
            return False
    return ended


def test_of_all_orders_exactly_the_playable_ones_are_accepted() -> None:
    num_accepted = 0
    for items in permutations(accumulation(2).instructions):
        if can_be_played(items):
            check(Program(items))
            num_accepted += 1
        else:
            with pytest.raises(ProgramError):
                check(Program(items))
    assert num_accepted > 5


def test_every_stage_is_reduced_and_published() -> None:
    forwards, backwards = "forward 0.0 | forward 1.0", "reduce 1 | backward 1.0 | reduce 0 | backward 0.0"
    good = f"{forwards} | {backwards} | step | publish 0 | publish 1"
    check(Program.parse(good))
    for part in ("reduce 1 | ", "reduce 0 | ", " | publish 1"):
        with pytest.raises(ProgramError, match="stage"):
            check(Program.parse(good.replace(part, "", 1)))
