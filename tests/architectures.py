"""Hugging Face architectures from tiny local configurations: what the tensor axis makes of each, and whether
it trains.

`python -m tests.architectures` writes the table into docs/models.md; a test keeps eight of its rows true, and
under `-m matrix` all. Nothing is asked of a network.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sixfold
from sixfold.base.errors import SixfoldError
from sixfold.config import LayoutConfig
from sixfold.parallel.tensor.cut import decide_tensor
from sixfold.parallel.tensor.rules import answer_for
from sixfold.parallel.tensor.verify import TOLERANCE
from sixfold.parallel.tiny import BATCH, inputs_of
from sixfold.testing import Pool

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **_IDS}
_SOUND = {
    **{key: value for key, value in _SIZES.items() if key != "max_position_embeddings"},
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **_IDS}
_WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_LATENT = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        kind: class of the model; its configuration is `config`.
    """

    name: str
    modality: str
    kind: str
    config: str
    sizes: dict[str, Any]

    def build(self) -> nn.Module:
        """The model, of a few thousand parameters."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.sizes)
        model: nn.Module = getattr(transformers, self.kind)(config)
        return model


def _causal(name: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(name, "text", f"{name}ForCausalLM", f"{name}Config", {**sizes, **more})


def _other(modality: str, name: str, kind: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(name, modality, name + kind, f"{name}Config", {**sizes, **more})


_FOR_IMAGES = "ForImageClassification"
ARCHITECTURES: tuple[Architecture, ...] = (
    _causal("Llama", _GROUPED),
    _causal("Mistral", _HEAD_DIM),
    _causal("Qwen2", _GROUPED),
    _causal("Qwen3", _HEAD_DIM),
    _causal("Gemma", _HEAD_DIM),
    _causal("Gemma2", _HEAD_DIM),
    Architecture("Gemma3", "text", "Gemma3ForCausalLM", "Gemma3TextConfig", _HEAD_DIM),
    _causal("Phi", _GROUPED),
    _causal("Phi3", _GROUPED),
    _causal("Olmo2", _GROUPED),
    _causal("Cohere", _GROUPED),
    _causal("StableLm", _GROUPED),
    _causal("Starcoder2", _GROUPED),
    _causal("GPTNeoX", _SIZES),
    _causal("Glm", _HEAD_DIM),
    _causal("Granite", _GROUPED),
    _causal("SmolLM3", _GROUPED),
    _causal("Helium", _HEAD_DIM),
    _causal("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2),
    _causal("Qwen2Moe", _GROUPED, shared_expert_intermediate_size=24, **_MOE),
    _causal("Qwen3Moe", _HEAD_DIM, **_MOE),
    _causal("DeepseekV3", _LATENT),
    Architecture("GPT2", "text", "GPT2LMHeadModel", "GPT2Config", _GPT),
    _causal("GPTJ", _GPT, rotary_dim=4),
    _causal("OPT", _SIZES, ffn_dim=48, word_embed_proj_dim=32),
    _causal("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}),
    _causal("Falcon", _SIZES),
    _other("text", "Bert", "ForMaskedLM", _SIZES),
    _other("text", "Roberta", "ForMaskedLM", _SIZES),
    _other("text", "Electra", "ForMaskedLM", _SIZES),
    _other("text", "ModernBert", "ForMaskedLM", _SIZES, cls_token_id=1, sep_token_id=2),
    _other("text", "DistilBert", "ForMaskedLM", _SIZES, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    _other("text", "DebertaV2", "ForMaskedLM", _SIZES, pos_att_type=["c2p", "p2c"], relative_attention=True),
    _other("text", "T5", "ForConditionalGeneration", _T5),
    _other("text", "Bart", "ForConditionalGeneration", _SIZES, d_model=32, **{
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }),
    _other("image", "ViT", _FOR_IMAGES, _IMAGE),
    _other("image", "DeiT", _FOR_IMAGES, _IMAGE),
    _other("image", "Beit", _FOR_IMAGES, _IMAGE),
    _other("image", "Dinov2", _FOR_IMAGES, _IMAGE),
    _other("image", "Swin", _FOR_IMAGES, _WINDOWS),
    _other("image", "ConvNext", _FOR_IMAGES, {}, image_size=32, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4),
    _other("speech", "Whisper", "ForConditionalGeneration", _IDS, **{
        "vocab_size": 64, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 8,
        "max_target_positions": 16, "decoder_start_token_id": 1, "suppress_tokens": None,
        "begin_suppress_tokens": None,
        **{
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
        },
    }),
    _other("speech", "Wav2Vec2", "ForCTC", _SOUND),
    _other("speech", "Hubert", "ForCTC", _SOUND),
)  # fmt: skip

KEPT_TRUE = ("Llama", "Qwen3", "Phi3", "GPT2", "ViT", "ConvNext", "Whisper", "Bloom")
"""Those whose rows every run of the suite sees."""


BY_NAME = {each.name: each for each in ARCHITECTURES}
NUM_UPDATES, RATE = 2, 0.1


def row(architecture: Architecture, pool: Pool) -> str:
    """A line of the table."""
    alone = trained(architecture.name, 1)
    state, part, why, together = pool.run(cut_and_trained, architecture.name, ranks=2, timeout_s=120)[0]
    faults = {"1": alone, "2": together}
    runs = " and ".join(ranks for ranks, fault in faults.items() if fault == "")
    said = (f"not on {ranks}: {_cell(fault)}" for ranks, fault in faults.items() if fault)
    name, modality = architecture.name, architecture.modality
    return f"| {' | '.join((name, modality, '; '.join((runs, *said)), state, part, _cell(why)))} |"


def cut_and_trained(name: str) -> tuple[str, str, str, str | None]:
    """On both of two ranks: what the tensor axis makes of a model and how much of it is cut; what is not, and
    why; and what goes wrong in training, None where it is refused."""
    model = BY_NAME[name].build()
    found = answer_for(model, LayoutConfig(tensor=2))
    if found.rules is None:
        return "refused", "", found.why, None
    cut = decide_tensor(model, found.rules, 2, 0)
    whole = sum(each.numel() for each in model.parameters())
    names = {name for name, place in cut.places.items() if place.axes}
    part = sum(each.numel() for name, each in model.named_parameters() if name in names) / whole
    state = "verified" if found.is_tried else "declared"
    source = found.rules.source.removeprefix("the model's ")
    return f"{state}, {source}", f"{part:.0%}", found.why, trained(name, 2)


def trained(name: str, tensor: int) -> str:
    """On every rank of the tensor axis: some updates through `sixfold.initialize`, and in plain torch.

    Returns:
        What differs, or why it is refused; empty where nothing does, and weights have changed.
    """
    architecture = BY_NAME[name]
    model: Any = architecture.build().eval()  # without dropout
    batch, plain = batch_of(model, architecture.kind), copy.deepcopy(model)
    optimizer, expected = torch.optim.SGD(plain.parameters(), lr=RATE), list[float]()
    for _ in range(NUM_UPDATES):
        optimizer.zero_grad()
        loss = plain(**batch).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    config = {"layout": {"tensor": tensor}, "optimizer": {"name": "sgd", "lr": RATE, "momentum": 0.0}}
    try:
        with closing(sixfold.initialize(model, config=config)) as engine:
            losses = [engine.train_step(batch) for _ in range(NUM_UPDATES)]
            after = engine.full_state_dict()
        model.zero_grad()  # caches of the library may keep it, and with it memory that ranks shared
    except SixfoldError as error:
        return f"{error.given}; {error.rule}"
    if not torch.tensor(losses).allclose(torch.tensor(expected), rtol=TOLERANCE, atol=0):
        return f"losses {losses} instead of {expected}"
    wanted = {name: each.detach() for name, each in plain.named_parameters()}
    largest = max(float((each - before[name]).abs().max()) for name, each in wanted.items())
    far = {name: float((after[name] - each).abs().max()) for name, each in wanted.items()}
    worst = max(far, key=lambda name: far[name])
    if not far[worst] <= TOLERANCE * largest:
        return f"{worst} differs by {far[worst] / (largest or 1.0):.1e} of the largest change"
    return "" if largest > 0 else "no weight changes"


def batch_of(model: Any, kind: str) -> dict[str, Tensor]:
    """Inputs of a tiny model, with labels for the loss that it computes."""
    given, draw = inputs_of(model), torch.Generator().manual_seed(2)
    labels = given.get("decoder_input_ids", given[model.main_input_name])
    if kind.endswith(_FOR_IMAGES):
        labels = torch.randint(model.config.num_labels, (BATCH,), generator=draw)
    elif kind.endswith("ForCTC"):
        labels = torch.randint(1, model.config.vocab_size, (BATCH, 4), generator=draw)
    return {**given, "labels": labels}


def _cell(text: str) -> str:
    short = text.replace("|", "/").replace("\n", " ")
    return short if len(short) <= 240 else short[:237] + "..."


def table(pool: Pool) -> Iterator[str]:
    """All rows, as they are in the docs."""
    yield "| architecture | of | trained on ranks | tensor 2 | parameters cut | what is not cut, and why |"
    yield "|---|---|---|---|---|---|"
    for architecture in ARCHITECTURES:
        yield row(architecture, pool)


def main() -> int:
    """Write the table into the docs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with Pool() as pool:
        PAGE.write_text(before + BEGIN + "\n" + "\n".join(table(pool)) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
