"""Head and loss in chunks: the same numbers, with scores of one chunk in memory."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sixfold.models.chunks import (
    CHUNK_BYTES,
    IGNORED,
    SCORES_BYTES,
    in_chunks,
    rows_at_once,
    summed_cross_entropy,
)
from sixfold.models.decoder import Decoder, DecoderConfig


class Peak(TorchDispatchMode):
    """Largest sum of bytes of living tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def parts(rows: int, width: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(-1, vocab_size, (rows,), generator=generator)
    return hidden, weight, targets.masked_fill(targets < 0, IGNORED)


@pytest.mark.parametrize("rows", [1, 7, 10, 23, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_all_rows_at_once(dtype: torch.dtype, rows: int) -> None:
    hidden, weight, targets = parts(23, 8, 31, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.cross_entropy((hidden @ weight.T).to(wide), targets, reduction="sum")
    found = in_chunks(lambda states: states @ weight.T, summed_cross_entropy, hidden, targets, rows)
    assert found.dtype == wide
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 6e-2}
    torch.testing.assert_close(found, expected, **close)
    ours = torch.autograd.grad(found / 5, (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(expected / 5, (hidden, weight)), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_at_64k_tokens_is_that_of_a_chunk(dtype: torch.dtype) -> None:
    tokens, vocab_size, chunk = 65_536, 256, 1024
    hidden, weight, targets = parts(tokens, 1, vocab_size, dtype)
    bound = chunk * vocab_size * 4 * 2
    with Peak() as peak:
        loss = in_chunks(lambda states: states @ weight.T, summed_cross_entropy, hidden, targets, chunk)
        forward, peak.most = peak.most, peak.now
        loss.backward()
    # Besides scores: gradients of the hidden states while chunks are put together, and numbers by row.
    others = 4 * 4 * tokens + 48 * chunk
    assert forward < bound + others
    assert peak.most < bound + others
    assert others < 0.6 * bound
    with Peak() as whole:
        F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum").backward()
    assert whole.most > 30 * bound


@pytest.mark.parametrize("target", [-1, 31, 1000])
def test_a_target_that_is_none_is_refused(target: int) -> None:
    """As torch's own loss does."""
    scores = torch.zeros(2, 31)
    with pytest.raises(IndexError, match=rf"{target} .*a vocabulary of 31: they lie in 0 to 30"):
        summed_cross_entropy(scores, torch.tensor([0, target]))


def test_on_by_default_above_a_size() -> None:
    vocab_size = 4096
    most = SCORES_BYTES // (4 * vocab_size)
    assert rows_at_once(most, vocab_size, None) == most
    assert rows_at_once(most + 1, vocab_size, None) == CHUNK_BYTES // (4 * vocab_size)
    assert rows_at_once(most + 1, vocab_size, 0) == most + 1
    assert rows_at_once(100, vocab_size, 7) == 7
    assert rows_at_once(100, 1 << 40, None) == 1


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_decoder_learns_the_same(own_loss: bool) -> None:
    torch.manual_seed(0)
    config = DecoderConfig.derive(vocab_size=31, context_length=8, width=16, num_layers=1, num_heads=2)
    model = Decoder(config).double()
    if own_loss:
        model.loss = lambda scores, targets: F.cross_entropy(
            scores, targets, label_smoothing=0.1, reduction="sum"
        )
    tokens = torch.randint(31, (3, 9))
    gradients = []
    for model.loss_chunk in (0, 5):
        loss, _ = model(tokens)
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
