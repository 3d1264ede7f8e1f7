"""The reference decoder: its mathematics, its loss pair, its initialisation, its count of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sixfold.models import attention
from sixfold.models.attention import attend_written_out, rotary_tables, rotary_tables_at, rotate
from sixfold.models.decoder import (
    LOSS_ROWS,
    Decoder,
    DecoderConfig,
    num_flops,
)
from sixfold.models.generate import CachedDecoder, generate
from sixfold.models.layers import NORM_EPS, RMSNorm


def config(**changes: object) -> DecoderConfig:
    sizes: dict[str, object] = {
        "vocab_size": 97,
        "context_length": 32,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    return DecoderConfig.derive(**(sizes | changes))


def decoder(dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config(**changes)).to(dtype)


def tokens(batch: int, length: int, vocab_size: int = 97) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_later_token_changes_no_earlier_score(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", 5)
    model, before = decoder(dtype), tokens(2, 13)
    after = before.clone()
    after[:, 9] = (after[:, 9] + 1) % 97
    first, second = model.logits(before), model.logits(after)
    assert torch.equal(first[:, :9], second[:, :9])
    assert not torch.equal(first[:, 9:], second[:, 9:])


def test_fewer_key_heads_equal_the_same_heads_repeated() -> None:
    grouped = decoder(torch.float64)
    repeated = decoder(torch.float64, num_kv_heads=4)
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].view(2, 8, 32)
            state[name] = heads.repeat_interleave(2, 0).reshape(32, 32)
    repeated.load_state_dict(state)
    inputs = tokens(2, 11)
    torch.testing.assert_close(grouped.logits(inputs), repeated.logits(inputs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("block_rows", [1, 5, 13, 128])
def test_written_out_attention_is_the_fused_one(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", block_rows)
    torch.manual_seed(0)
    heads = [torch.randn(2, n, 13, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    fused = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    written = attend_written_out(*heads)
    torch.testing.assert_close(written, fused, rtol=0, atol=1e-14)
    weights = torch.randn_like(fused)
    for ours, theirs in zip(
        torch.autograd.grad((written * weights).sum(), heads),
        torch.autograd.grad((fused * weights).sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_long_contexts_leave_the_written_out_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.bfloat16) for _ in range(3))
    monkeypatch.setattr(attention, "WRITTEN_OUT_LENGTH", 8)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(attention.attend(q, k, v), fused)
    monkeypatch.setattr(attention, "WRITTEN_OUT_LENGTH", 9)
    assert torch.equal(attention.attend(q, k, v), attend_written_out(q, k, v))


def test_rotated_products_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = rotary_tables(20, 8, 100.0, query)
    everywhere = torch.ones(1, 1, 20, 1, dtype=torch.float64)
    products = rotate(everywhere * query, cos, sin)[0, 0] @ rotate(everywhere * key, cos, sin)[0, 0].T
    for distance in (0, 1, 7, -3):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-13)
    assert products[0, 0] != products[0, 1]
    torch.testing.assert_close(products[0, 0], query @ key)


def test_rotary_angles_stay_exact_under_bf16() -> None:
    cos, _ = rotary_tables(300, 8, 10_000.0, torch.empty(0, dtype=torch.bfloat16))
    assert cos.dtype == torch.float32
    # Position 299 has no bf16 representation; its angle must come from the number itself.
    assert cos[0, 299, 0].item() == pytest.approx(
        torch.tensor(299.0, dtype=torch.float64).cos().item(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6), (torch.float64, 1e-14)]
)
def test_norms_compute_in_fp32_at_least(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64).to(dtype)
    x = (torch.randn(5, 64) * 300).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + NORM_EPS).sqrt()
    out = norm(x)
    assert out.dtype == dtype
    # bf16 sums of squares would be off by percents; here only the last rounding shows.
    assert ((out.double() - exact).abs() <= bound * exact.abs()).all()


def test_gradients_that_are_written_out_are_those_of_the_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8).double()
    nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(lambda x, w: functional_call(norm, {"weight": w}, (x,)), (x, norm.weight))
    for positions in (torch.arange(5), torch.randint(99, (2, 5))):
        cos, sin = rotary_tables_at(positions, 8, 100.0, x)
        assert torch.autograd.gradcheck(lambda x, c=cos, s=sin: rotate(x.transpose(1, 2), c, s), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_pair_is_the_summed_loss_and_the_number_of_targets(dtype: torch.dtype) -> None:
    model, batch = decoder(dtype), tokens(3, LOSS_ROWS // 2 + 6)
    loss, num_targets = model(batch)
    logits = model.logits(batch[:, :-1]).to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    assert loss.dtype == logits.dtype
    assert num_targets.item() == 3 * (LOSS_ROWS // 2 + 5) > LOSS_ROWS
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_has_a_loss_of_zero_and_zero_gradients(dtype: torch.dtype) -> None:
    model = decoder(dtype)
    loss, num_targets = model(tokens(0, 9))
    loss.backward()
    assert loss.item() == 0 == num_targets.item()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bf16_stays_close_to_fp32() -> None:
    batch = tokens(4, 31)
    exact, rounded = decoder(), decoder(torch.bfloat16)
    (exact_loss, count), (rounded_loss, _) = exact(batch), rounded(batch)
    assert abs(exact_loss.item() - rounded_loss.item()) / count.item() < 0.02
    exact_loss.backward()
    rounded_loss.backward()
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.flatten(), q.grad.float().flatten(), 0) > 0.999, name


@pytest.mark.parametrize("tied", [True, False])
def test_an_independent_implementation_reads_the_weights_and_agrees(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = decoder(tie_embeddings=tied, rope_base=500.0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=model.config.ffn_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
        )
    )
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if tied else [])
    inputs = tokens(2, 17)
    torch.testing.assert_close(model.logits(inputs), theirs(inputs).logits, rtol=0, atol=2e-6)


def materialise(module: nn.Module) -> None:
    for child in module.children():
        materialise(child)
    if list(module.parameters(recurse=False)) or hasattr(module, "reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("from_meta", [True, False])
def test_initial_weights_have_the_stated_scale(from_meta: bool) -> None:
    torch.manual_seed(0)
    sizes = config(width=128, num_layers=3, tie_embeddings=False)
    if from_meta:
        with torch.device("meta"):
            model = Decoder(sizes)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, float("nan"))
        materialise(model)
    else:
        model = Decoder(sizes)
    # Nothing but parameters, so nothing that to_empty could leave as garbage.
    assert list(model.buffers()) == []
    for name, parameter in model.named_parameters():
        std = (parameter.shape[-1] * (1 if "embed" in name else 2)) ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * 3) ** 0.5
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(128)), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * std, name


def test_a_fresh_model_knows_nothing_and_learns() -> None:
    model, batch = decoder(vocab_size=97), tokens(8, 33)
    loss, count = model(batch)
    assert (loss / count).item() == pytest.approx(torch.tensor(97.0).log().item() + 0.5, abs=0.35)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss, count = model(batch)
        (loss / count).backward()
        optimizer.step()
    assert (loss / count).item() < 1.0


def test_dropout_acts_in_training_only() -> None:
    model, batch = decoder(dropout=0.5), tokens(2, 9)
    torch.manual_seed(1)
    assert model(batch)[0] != model(batch)[0]
    model.eval()
    assert model(batch)[0] == model(batch)[0] == decoder().eval()(batch)[0]


def test_tied_and_separate_heads() -> None:
    assert not any("lm_head" in name for name, _ in decoder().named_parameters())
    assert decoder(tie_embeddings=False).state_dict()["lm_head.weight"].shape == (97, 32)


def test_what_the_config_leaves_open_is_derived() -> None:
    open_config = DecoderConfig.derive(
        vocab_size=97, context_length=32, width=256, num_layers=1, num_heads=4, rope_base=50.0
    )
    assert (open_config.num_kv_heads, open_config.ffn_width, open_config.rope_base) == (4, 704, 50.0)
    assert config(ffn_width=48).ffn_width == 48


@pytest.mark.parametrize("changes", [{"width": 36}, {"num_heads": 3}, {"num_kv_heads": 3}])
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        config(**changes)


def continued(model: Decoder, prompts: list[list[int]], count: int, **options: Any) -> Tensor:
    return torch.stack(list(generate(CachedDecoder(model), prompts, count, **options)), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_continuation_takes_the_likeliest_token_of_the_whole_context(dtype: torch.dtype) -> None:
    model = decoder(dtype, tie_embeddings=False)
    prompts = [tokens(1, 9)[0].tolist(), [3, 1, 4], [5]]
    out = continued(model, prompts, 8)
    assert model.training
    for prompt, row in zip(prompts, out.tolist(), strict=True):
        whole = prompt + row
        scores = model.logits(torch.tensor([whole[:-1]]))[0, len(prompt) - 1 :]
        taken = scores.gather(1, torch.tensor(row)[:, None])[:, 0]
        # In a narrow type two tokens may be equally likely to the last digit.
        assert (scores.max(-1).values - taken <= (0 if dtype is torch.float64 else 0.06)).all()


def test_keys_are_kept_and_a_full_context_is_cut_to_its_newer_half() -> None:
    model, read = decoder(context_length=6), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].tolist()[0]))
    prompt = [3, 1, 4, 1]
    out = continued(model, [prompt], 6)[0].tolist()
    assert read == [prompt, out[:1], out[1:2], out[:3], out[3:4], out[4:5]]


def test_sampled_continuation_follows_its_generator() -> None:
    model, prompt = decoder().eval(), [tokens(1, 4)[0].tolist()]

    def draw(seed: int, temperature: float = 1.0, top_k: int | None = None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        options = {"temperature": temperature, "top_k": top_k, "generator": generator}
        return continued(model, prompt, 12, **options).tolist()

    assert draw(0) == draw(0) != draw(1)
    assert draw(0, 1e-4) == draw(0, top_k=1) == continued(model, prompt, 12).tolist()
    assert not model.training


def test_documents_that_share_a_sample_do_not_see_each_other() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = decoder(dtype)
        first, second = tokens(1, 6), tokens(1, 9)[:, 2:]
        joined = torch.cat((first, second), 1)
        documents = torch.tensor([[0] * 6 + [1] * 7])
        apart = torch.cat([model.logits(first), model.logits(second)], 1)
        close = {"rtol": 0, "atol": 1e-13 if dtype is torch.float64 else 0.1}
        torch.testing.assert_close(model.logits(joined, documents), apart, **close)
        loss, weight = model(joined, documents)
        assert weight == 12
        targets = joined[0, 1:]
        scores = apart[0, :-1].to(torch.promote_types(dtype, torch.float32))
        expected = F.cross_entropy(scores, targets, reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12 if dtype is torch.float64 else 0.3)
        assert not torch.equal(model.logits(joined), apart)


def test_another_loss_takes_the_place_of_cross_entropy() -> None:
    model = decoder()
    model.loss = lambda scores, targets: scores.gather(1, targets[:, None]).sum()
    loss, _ = model(tokens(2, 9))
    expected = model.logits(tokens(2, 9)[:, :-1]).gather(2, tokens(2, 9)[:, 1:, None]).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_operations_by_formula_are_those_torch_counts(tied: bool) -> None:
    # bf16, because torch's counter sees written-out attention and not the fused kernel of a CPU.
    model = decoder(torch.bfloat16, tie_embeddings=tied)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(tokens(3, 17))
    forward = counter.get_total_flops()
    assert 3 * forward == num_flops(model.config, 3, 16)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward
