"""Head and loss of Hugging Face models in chunks: their own numbers, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import sixfold
from sixfold.base.errors import ModelError
from sixfold.models import chunks
from sixfold.parallel import causal_loss, chunk_loss

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))


def gemma() -> Gemma2ForCausalLM:
    """Scores are bent between its head and its loss."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0))


def fields() -> dict[str, Tensor]:
    tokens = torch.randint(29, (3, 8), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def gradients(model: torch.nn.Module, **given: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(**fields(), **given).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("given", [{}, {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 7}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_numbers_of_the_model_alone(tied: bool, given: dict[str, Any]) -> None:
    model = llama(tie_word_embeddings=tied)
    expected = gradients(model, **given)
    before = {**vars(model)}
    remove = chunk_loss(model, 5)
    output = model(**fields(), **given)
    assert output.logits is None
    (alone, *beside) = model(**fields(), **given, use_cache=False, return_dict=False)
    assert (alone.shape, beside) == ((), [])
    assert model(input_ids=fields()["input_ids"]).logits.shape == (3, 8, 29)
    torch.testing.assert_close(gradients(model, **given), expected, rtol=1e-5, atol=1e-7)
    shifted = torch.nn.functional.pad(fields()["labels"], (0, 1), value=-100)[:, 1:]
    again = model(**fields() | {"shift_labels": shifted}, **given).loss
    torch.testing.assert_close(again.detach(), expected[0])
    remove()
    assert vars(model).keys() - {"_loss_function"} == before.keys() - {"_loss_function"}
    assert model(**fields()).logits is not None


def test_scores_that_are_changed_on_the_way_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma()
    expected = gradients(model)
    remove = chunk_loss(model, 5)
    with pytest.raises(ModelError, match=r"loss_chunk = 5 with a Gemma2ForCausalLM.*behind the head"):
        model(**fields())
    remove()
    monkeypatch.setattr(chunks, "SCORES_BYTES", 100)
    remove = chunk_loss(model, None)
    forwards: list[object] = []
    model.model.register_forward_hook(lambda *given: forwards.append(given))
    for turn in range(2):
        torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)
        assert len(forwards) == turn + 1  # others may wait inside, once
    assert model(**fields()).logits is not None
    remove()


def test_ranks_with_a_part_of_the_head_chunk_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Exception):
        pass

    def tell(num_rows: int, num_entries: int, asked: int | None) -> int:
        raise Told(f"{num_entries} entries")

    model = llama()
    remove = chunk_loss(model, 5)
    model.lm_head.weight.data = model.lm_head.weight.data[:14]  # as the tensor axis cuts it afterwards
    monkeypatch.setattr(causal_loss, "rows_at_once", tell)
    with pytest.raises(Told, match="29 entries"):
        model(**fields())
    remove()


class Unlike(LlamaForCausalLM):
    """Bends its scores, and no copy of it is made by its configuration alone."""

    def __init__(self, config: LlamaConfig, bend: float) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda _head, _given, scores: bend * scores)


def test_what_cannot_be_tried_is_chunked_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And refused as it runs where its scores turn out to be changed."""
    model = Unlike(LlamaConfig(**SIZES), bend=2.0)
    remove = chunk_loss(model, 5)
    with pytest.raises(ModelError, match=r"loss_chunk = 5 with a Unlike: .*behind the head"):
        model(**fields())
    remove()
    monkeypatch.setattr(chunks, "SCORES_BYTES", 100)
    remove = chunk_loss(model, None)
    assert model(**fields()).logits is not None
    remove()


@pytest.mark.parametrize("takes_scores", [False, True])
def test_what_has_no_known_head_is_refused(takes_scores: bool) -> None:
    model = llama() if takes_scores else torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"layout.loss_chunk = 4"):
        chunk_loss(model, 4, takes_scores=takes_scores)
    chunk_loss(model, None, takes_scores=takes_scores)()


def test_an_engine_trains_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, sizes = [], []
    whole = causal_loss.in_chunks
    monkeypatch.setattr(causal_loss, "in_chunks", lambda *given: sizes.append(given[-1]) or whole(*given))
    for asked in (0, 5):
        config = {"layout": {"loss_chunk": asked}, "optimizer": {"lr": 0.01}}
        engine = sixfold.initialize(llama(), config=config)
        losses.append([engine.train_step(fields()) for _ in range(3)])
        engine.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert set(sizes) == {5}
    assert len(sizes) >= 3
