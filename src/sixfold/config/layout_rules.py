"""Rules between options of the layout: what is cut over how many ranks, and by which schedule.

`rules` has them in its table, behind the others. What needs the number of ranks is the plan's.
"""

from __future__ import annotations

from sixfold.config.ruling import Rules, Verdict, divisor_below

LAYOUT_RULES = Rules()
_rule = LAYOUT_RULES.rule

_CUT_FROM = {"layout.parameters": 3, "layout.gradients": 2, "layout.optimizer": 1}
"""The lowest preset `layout.zero` that cuts each kind of state."""


def _is_cut(kind: str, zero: int | None, own: str | None) -> bool:
    return own != "whole" if own is not None else (zero or 0) >= _CUT_FROM[kind]


@_rule("layout.shard", "layout.zero", *_CUT_FROM)
def _shard_cuts_something(shard: int | None, zero: int | None, *own: str | None) -> Verdict:
    if shard is None or any(_is_cut(kind, zero, word) for kind, word in zip(_CUT_FROM, own, strict=True)):
        return None
    works = "layout.zero = 3 (or 1 or 2)" if not any(own) else 'layout.optimizer = "group"'
    return (
        "layout.shard is the size of the groups that model state is cut over, and with layout.zero = "
        f"{zero or 0}{' (as when unset)' if not zero else ''} and these layout.parameters, gradients and "
        "optimizer nothing is cut",
        f"set {works}, or leave layout.shard unset",
    )


@_rule("layout.reduce", "layout.gradients")
def _one_word_on_gradients(reduce: str | None, gradients: str | None) -> Verdict:
    if reduce is None or gradients is None or (reduce == "last") == (gradients == "whole"):
        return None
    return (
        "gradients that are reduced once, after the last micro-batch, are held whole; those reduced after "
        "each are cut like the optimizer's state",
        "leave layout.gradients unset, or layout.reduce",
    )


@_rule("layout.prefetch_mb", "layout.zero", "layout.parameters")
def _prefetch_needs_cut_parameters(budget: float | None, zero: int | None, own: str | None) -> Verdict:
    if budget is None or _is_cut("layout.parameters", zero, own):
        return None
    works = "layout.zero = 3" if own is None else 'layout.parameters = "group"'
    return (
        "layout.prefetch_mb bounds what is gathered ahead, and whole parameters are never gathered",
        f"set {works}, or leave layout.prefetch_mb unset",
    )


@_rule("layout.shard", "layout.data", "layout.context")
def _shard_divides(shard: int | None, data: int | None, context: int) -> Verdict:
    if shard is None or data is None or data * context % shard == 0:
        return None
    return (
        f"layout.shard divides layout.data x layout.context = {data * context}",
        f"set layout.shard = {divisor_below(data * context, shard)}",
    )


@_rule("layout.expert", "layout.data", "layout.context")
def _expert_divides(expert: int, data: int | None, context: int) -> Verdict:
    if data is None or data * context % expert == 0:
        return None
    return (
        f"layout.expert divides layout.data x layout.context = {data * context}",
        f"set layout.expert = {divisor_below(data * context, expert)}",
    )


_OF_AXIS = {
    "pipe": ("schedule", "virtual_stages", "balance", "cost"),
    "tensor": ("tensor_rules", "sequence_parallel"),
}
"""Settings that say more of an axis."""


def _needs_an_axis(axis: str, keys: tuple[str, ...]) -> None:
    @_rule(f"layout.{axis}", *(f"layout.{key}" for key in keys))
    def check(degree: int, *given: object) -> Verdict:
        idle = [f"layout.{key}" for key, value in zip(keys, given, strict=True) if value not in (None, False)]
        if degree > 1 or not idle:
            return None
        return (
            f"{' and '.join(idle)} is about several ranks along the {axis} axis, and layout.{axis} = 1",
            f"leave it unset, or set layout.{axis} to the number of ranks along it",
        )


for _key, _keys in _OF_AXIS.items():
    _needs_an_axis(_key, _keys)


_NUM_VIRTUAL = {"interleaved": None, "breadth-first": None, "zero-bubble-v": 2}
"""Stages on each rank by schedule, None where any number is; those that are not named have one."""


@_rule("layout.virtual_stages", "layout.schedule")
def _schedule_has_its_stages(virtual: int | None, schedule: str | None) -> Verdict:
    name = schedule or "1f1b"
    own = _NUM_VIRTUAL.get(name, 1)
    if virtual is None or own is None or virtual == own:
        return None
    return (
        f'with layout.schedule = "{name}" each rank has {own} stage(s)',
        'leave layout.virtual_stages unset, or set layout.schedule = "interleaved"',
    )


@_rule("layout.virtual_stages", "layout.schedule")
def _interleaving_says_how_many(virtual: int | None, schedule: str | None) -> Verdict:
    if schedule != "interleaved" or virtual is not None:
        return None
    return (
        'layout.schedule = "interleaved" has as many stages on each rank as layout.virtual_stages says',
        "set layout.virtual_stages = 2, or leave layout.schedule unset",
    )


@_rule("layout.balance", "layout.pipe", "layout.virtual_stages", "layout.schedule")
def _one_number_a_stage(
    balance: tuple[int, ...] | None, pipe: int, virtual: int | None, schedule: str | None
) -> Verdict:
    num_stages = pipe * (virtual or _NUM_VIRTUAL.get(schedule or "1f1b", 1) or 1)
    if balance is None or pipe == 1 or len(balance) == num_stages:
        return None
    return (
        f"layout.balance gives the blocks of each of {num_stages} stages, and has {len(balance)} numbers",
        f"give {num_stages} numbers, or leave layout.balance unset",
    )


@_rule("layout.schedule", "layout.compile")
def _split_backward_is_not_compiled(schedule: str | None, compiled: str | None) -> Verdict:
    if compiled is None or schedule is None or not schedule.startswith("zero-bubble"):
        return None
    return (
        "a zero-bubble schedule puts off weight gradients, and a compiled block computes its backward as one",
        'leave layout.compile unset, or set layout.schedule to another, such as "1f1b"',
    )
