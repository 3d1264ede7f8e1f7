"""A saved Hugging Face model loads in transformers as it lies, with equal logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sixfold.checkpoint import open_checkpoint, save, untie, whole

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 20_000], ids=["one file", "several files"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_from_pretrained_reads_the_folder(tmp_path: Path, tied: bool, max_file_bytes: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    stored, aliases = untie(model.state_dict())
    assert aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    adam = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in stored.items()}
    extra = {"config.json": config.to_json_string(use_diff=False).encode()}
    content = whole(stored, {"step": 1}, aliases, adam, extra)
    save(tmp_path / "c", content, max_file_bytes=max_file_bytes)
    assert len(list((tmp_path / "c").glob("model*.safetensors"))) == (
        1 if max_file_bytes > 20_000 else 5 - tied
    )

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "c", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)

    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    read = dict(open_checkpoint(tmp_path / "c").load_model(expected))
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
