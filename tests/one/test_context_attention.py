"""Attention across ranks: outputs and gradients of one process, for any degree, heads, length and packing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sixfold.base.errors import ModelError
from sixfold.parallel.context import kernels
from sixfold.parallel.context.attention import ContextAttention
from sixfold.parallel.context.kernels import Fused, Kernel, Public
from sixfold.parallel.context.lengths import length_limits
from sixfold.parallel.context.spans import Pair, Sequences, chunk, cut_rows, num_rows, spans_of
from sixfold.plan import attention_traffic
from tests.covering import Case, all_cases, covering, label
from tests.one.crowd import Member, together

BATCH, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 4
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(length: int, dtype: torch.dtype, kv_heads: int = KV_HEADS) -> Inputs:
    """Query, key, value and the gradient of the output."""
    torch.manual_seed(length)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    query, key, value, gradient = (
        torch.randn(BATCH, num, length, WIDTH, dtype=torch.float64).to(dtype) for num in heads
    )
    return query, key, value, gradient


def packed(length: int) -> Tensor:
    """Documents of several lengths, other ones in each sample; one begins and ends inside one chunk."""
    torch.manual_seed(1)
    return torch.stack([(torch.rand(length) < share).cumsum(0) for share in (0.1, 0.4)])


def padded(length: int) -> Tensor:
    """The first sample begins, the second one ends with padding."""
    place, few = torch.arange(length), length // 3
    return torch.stack([place >= few, place < length - few])


def alone(given: Inputs, sequences: Sequences, *, is_causal: bool) -> list[Tensor]:
    """Output and gradients as torch's own attention gives them over whole sequences."""
    query, key, value, gradient = given
    leaves = [each.clone().requires_grad_() for each in (query, key, value)]
    whole = ((0, sequences.length),)
    allowed = sequences.allowed(whole, whole)
    if allowed is not None and is_causal:
        allowed, is_causal = allowed.tril(), False
    output = F.scaled_dot_product_attention(
        *leaves, attn_mask=allowed, is_causal=is_causal, enable_gqa=key.shape[1] != HEADS
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def across(given: Inputs, sequences: Sequences, num_ranks: int, *, is_causal: bool) -> list[Tensor]:
    """The same over several ranks, put together again."""

    def work(group: Member) -> list[Tensor]:
        attention = ContextAttention(group)
        attention.sequences = sequences
        query, key, value, gradient = (cut_rows(each, attention.spans, 2) for each in given)
        leaves = [each.requires_grad_() for each in (query, key, value)]
        output = attention(*leaves, is_causal=is_causal, enable_gqa=True)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    found = together(num_ranks, work)
    wholes = [torch.empty_like(each) for each in (given[3], *given[:3])]
    for place, parts in enumerate(found):
        for whole, part in zip(wholes, parts, strict=True):
            start = 0
            for first, stop in spans_of(sequences.length, num_ranks, range(place, place + 1)):
                whole[:, :, first:stop] = part[:, :, start : start + stop - first]
                start += stop - first
            assert start == part.shape[2]
    return wholes


def farthest(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


FACTORS = {
    "num_ranks": (2, 3, 4, 6, 8),
    "kv_heads": (1, 2, 6),
    "is_causal": (True, False),
    "documents": (True, False),
    "padding": (True, False),
}
COVERED = covering(FACTORS, lambda case: True)


def check(case: Case) -> None:
    length, num_ranks, is_causal = 37, case["num_ranks"], case["is_causal"]
    sequences = Sequences(
        length,
        packed(length) if case["documents"] else None,
        padded(length) if case["padding"] else None,
    )
    given = inputs(length, torch.float64, case["kv_heads"])
    exact = alone(given, sequences, is_causal=is_causal)
    assert farthest(across(given, sequences, num_ranks, is_causal=is_causal), exact) < 1e-13
    query, key, value, gradient = (each.float() for each in given)
    expected = alone((query, key, value, gradient), sequences, is_causal=is_causal)
    found = across((query, key, value, gradient), sequences, num_ranks, is_causal=is_causal)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 5e-7


@pytest.mark.parametrize("case", COVERED, ids=label)
def test_it_is_attention_over_the_whole(case: Case) -> None:
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", all_cases(FACTORS, lambda case: case not in COVERED), ids=label)
def test_it_is_attention_over_the_whole_in_every_combination(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("length", [6, 7, 1000])
def test_any_length_is_cut(length: int) -> None:
    given, sequences = inputs(length, torch.float64), Sequences(length)
    found = across(given, sequences, 3, is_causal=True)
    assert farthest(found, alone(given, sequences, is_causal=True)) < 1e-12


def test_half_precision_is_as_near_as_torch_itself() -> None:
    sequences = Sequences(96)
    exact = alone(inputs(96, torch.float64), sequences, is_causal=True)
    given = inputs(96, torch.bfloat16)
    own = farthest(alone(given, sequences, is_causal=True), exact)
    found = farthest(across(given, sequences, 4, is_causal=True), exact)
    assert found < 1.5 * own < 0.05


def test_values_may_be_of_another_width() -> None:
    given, sequences = inputs(16, torch.float64), Sequences(16)
    query, key, value, gradient = given
    wider = (query, key, torch.cat([value, value + 1], -1), torch.cat([gradient, 2 * gradient], -1))
    expected = alone(wider, sequences, is_causal=True)
    assert farthest(across(wider, sequences, 4, is_causal=True), expected) < 1e-13


def test_without_a_ring_heads_are_as_in_one_process_to_the_bit() -> None:
    given, sequences = inputs(32, torch.float64), Sequences(32)
    expected, found = alone(given, sequences, is_causal=True), across(given, sequences, 2, is_causal=True)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("kernel", [Fused(), Public()], ids=["fused", "public"])
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_kernels_agree(kernel: Kernel, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 5)  # so that the public way has several
    query, key, value, gradient = inputs(11, torch.float64)
    mask = packed(11)[:, None, :, None] == packed(11)[:, None, None, :]
    mask[0, 0, 3] = False
    rows = slice(0, 11)
    pair = Pair(rows, rows, kind == "causal", mask if kind == "mask" else None)
    scores = query.unflatten(1, (KV_HEADS, -1)) @ key[:, :, None].transpose(-1, -2) / 7
    if kind == "mask":
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    if kind == "causal":
        scores = scores.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), float("-inf"))
    output, log_sum = kernel.forward(query, key, value, pair, 1 / 7)
    assert torch.allclose(log_sum, scores.logsumexp(-1).flatten(1, 2), rtol=0, atol=1e-14)
    leaves = [each.requires_grad_() for each in (query, key, value)]
    expected = F.scaled_dot_product_attention(
        *leaves, attn_mask=pair.mask, is_causal=pair.is_causal, scale=1 / 7, enable_gqa=True
    )
    assert torch.allclose(output, expected, rtol=0, atol=1e-14)
    grads = torch.autograd.grad(expected, leaves, gradient)
    with torch.no_grad():
        found = kernel.backward(gradient, query, key, value, output, log_sum, pair, 1 / 7)
    assert all(
        torch.allclose(one, other, rtol=0, atol=1e-13) for one, other in zip(found, grads, strict=True)
    )


def test_gradients_are_those_of_finite_differences() -> None:
    query, key, value, _ = (each[:1, :, :5, :2].contiguous() for each in inputs(5, torch.float64))
    attention = ContextAttention(Member(0, 1, {}))
    attention.sequences = Sequences(5)
    leaves = [each.requires_grad_() for each in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *given: attention(*given, is_causal=True, enable_gqa=True), leaves)


def test_chunks_cover_a_sequence_evenly() -> None:
    for length in (8, 13, 1000):
        chunks = [chunk(length, 4, number) for number in range(8)]
        assert [stop for _, stop in chunks[:-1]] == [start for start, _ in chunks[1:]]
        assert (chunks[0][0], chunks[-1][1]) == (0, length)
        sizes = [stop - start for start, stop in chunks]
        assert max(sizes) - min(sizes) <= 1
    assert spans_of(16, 4, range(1, 3)) == ((2, 6), (10, 14))
    assert spans_of(16, 4, range(3, 4)) == ((6, 10),)
    assert spans_of(16, 4, range(4)) == ((0, 16),)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_causal_attention_is_equally_much_for_all(num_ranks: int) -> None:
    length = 24 * num_ranks
    sequences, rows = (
        Sequences(length),
        [spans_of(length, num_ranks, range(place, place + 1)) for place in range(num_ranks)],
    )
    for step in range(num_ranks):
        work = []
        for place, mine in enumerate(rows):
            pairs = sequences.pairs(mine, rows[(place - step) % num_ranks], is_causal=True)
            assert len(pairs) <= 3 if step == 0 else len(pairs) == 1
            sizes = [
                (pair.queries.stop - pair.queries.start) * (pair.keys.stop - pair.keys.start)
                for pair in pairs
            ]
            work.append(sum(size / (1 + pair.is_causal) for size, pair in zip(sizes, pairs, strict=True)))
        assert max(work) == min(work)


def test_documents_that_do_not_meet_are_left_out() -> None:
    length = 16
    documents = (torch.arange(length) // 4).expand(BATCH, -1)
    sequences = Sequences(length, documents)
    rows = [spans_of(length, 4, range(place, place + 1)) for place in range(4)]
    met = [len(sequences.pairs(rows[0], rows[other], is_causal=True)) for other in range(4)]
    # Its chunks are rows 0-1 and 14-15; rows 2-3 and 12-13 of their documents are those of place 1.
    assert met == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dropout_p": 0.1}, "dropout 0.1"),
        ({"attn_mask": torch.ones(8, 8).triu(-2).tril().bool()}, "neither causal nor open"),
        ({"attn_mask": torch.rand(8, 8)}, "added to scores"),
        ({"key": torch.randn(BATCH, HEADS, 9, WIDTH)}, "over keys"),
        ({"key": torch.randn(BATCH, 2, 8, WIDTH)}, "over keys"),
    ],
)
def test_other_attention_is_refused(change: dict[str, object], word: str) -> None:
    attention = ContextAttention(Member(0, 1, {}))
    attention.sequences = Sequences(8)
    query = torch.randn(BATCH, HEADS, 8, WIDTH)
    call = {"query": query, "key": query, "value": query, **change}
    with pytest.raises(ModelError, match=word):
        attention(**call)


def test_a_mask_that_one_rank_refuses_keeps_nobody_waiting_while_it_is_tried() -> None:
    """Of 16 rows the first rank has the outermost, of which the last do not see the first any more."""

    def work(group: Member) -> int:
        attention = ContextAttention(group)
        attention.sequences, attention.refused = Sequences(16), []
        (place,) = cut_rows(torch.arange(16)[None], attention.spans, 1)
        distance = place[:, None] - place
        query = torch.randn(1, HEADS, 8, WIDTH)
        attention(query, query, query, attn_mask=(distance >= 0) & (distance < 8))
        return len(attention.refused)

    assert together(2, work) == [1, 0]


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("mask", [None, torch.zeros(8, 8)], ids=["no mask", "nothing added"])
def test_other_ways_to_say_the_same_are_taken(kv_heads: int, mask: Tensor | None) -> None:
    attention = ContextAttention(Member(0, 1, {}))
    attention.sequences = Sequences(8)
    query, key, value, _ = inputs(8, torch.float64, kv_heads)
    mask = None if mask is None else mask.double()
    found = attention(query, key, value, attn_mask=mask)
    assert torch.allclose(found, F.scaled_dot_product_attention(query, key, value), rtol=0, atol=1e-14)


def test_masks_over_own_rows_say_what_is_meant() -> None:
    length = 19
    given = inputs(length, torch.float64, HEADS)
    sequences = Sequences(length, packed(length), padded(length))

    def work(group: Member) -> list[Tensor]:
        attention = ContextAttention(group)
        attention.sequences = sequences
        spans = attention.spans
        query, key, value, _ = (cut_rows(each, spans, 2) for each in given)
        allowed = sequences.allowed(spans, spans)
        assert allowed is not None
        assert allowed.shape[-1] == num_rows(spans)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed.tril(), torch.finfo(torch.float32).min)
        by_mask = attention(query, key, value, attn_mask=allowed.tril())
        return [
            by_mask,
            attention(query, key, value, attn_mask=bias),
            attention(query, key, value, is_causal=True),
        ]

    for by_mask, by_bias, by_flag in together(2, work):
        assert torch.equal(by_mask, by_flag)
        assert torch.equal(by_bias, by_flag)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_sent_is_what_the_plan_says(num_ranks: int, dtype: torch.dtype) -> None:
    length = 24
    sequences, given = Sequences(length), inputs(length, dtype)
    priced = attention_traffic(
        num_ranks,
        samples=BATCH,
        length=length,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_width=WIDTH,
        item_bytes=dtype.itemsize,
    )

    def work(group: Member) -> tuple[int, int]:
        attention = ContextAttention(group)
        attention.sequences = sequences
        query, key, value, gradient = (cut_rows(each, attention.spans, 2) for each in given)
        output = attention(query.requires_grad_(), key, value, is_causal=True, enable_gqa=True)
        forward = group.num_bytes
        output.backward(gradient)
        return forward, group.num_bytes - forward

    for forward, backward in together(num_ranks, work):
        assert (forward, backward) == (priced.forward, priced.backward)
    assert (priced.forward > 0) == (num_ranks > 1)


def _limits(kind: str, **settings: object) -> dict[str, int]:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings)
    return length_limits(SimpleNamespace(config=config))  # type: ignore[arg-type]


def test_lengths_that_a_model_treats_otherwise_are_known() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    dynamic = {**yarn, "rope_type": "dynamic"}
    assert _limits("Llama") == _limits("Llama", rope_parameters=yarn) == {}
    assert _limits("Llama", rope_parameters=dynamic, max_position_embeddings=64) == {"rope_type dynamic": 64}
    assert _limits("Mistral", sliding_window=32) == {"sliding_window": 32}
    assert _limits("Mistral", sliding_window=None) == {}
    assert _limits("Qwen2", sliding_window=32) == {}
    whole = {"num_hidden_layers": 4, "max_window_layers": 4}
    assert _limits("Qwen2", use_sliding_window=True, sliding_window=32, **whole) == {}
    assert _limits("Qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1) != {}
    assert _limits("Gemma3", text_config={"sliding_window": 32}) == {"sliding_window": 32}
