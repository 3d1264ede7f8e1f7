"""Models of transformers as what a run trains: drawn, from local weights, with adapters beside them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sixfold.base.errors import CheckpointError, ConfigError, ModelError, SaveError
from sixfold.config import load
from sixfold.data.corpus import prepare
from sixfold.launch import current_session
from sixfold.models.decoder import Decoder, DecoderConfig
from sixfold.models.lora import adapters_of, add_adapters
from sixfold.monitor.journal import read_records
from sixfold.train import loop
from sixfold.train.adapters import adapt, write_adapter
from sixfold.train.completion import Sampling, continuations, load_run, reader_of
from sixfold.train.job import Request, resolve
from sixfold.train.samples import samples_of
from sixfold.train.subject import build_model, fields_of
from tests.one import lab

transformers = pytest.importorskip("transformers", reason="comes with the extras hf and test")
peft = pytest.importorskip("peft", reason="comes with the extra test")


def tiny(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bf16 in a folder, beside a corpus and its own tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    lab.write_corpus(folder / "text")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny(tie_word_embeddings=True)).bfloat16().save_pretrained(folder / "model")
    corpus = prepare(load(values=settings(folder)).config.data)
    (folder / "model" / "tokenizer.json").write_bytes((corpus.folder / "tokenizer.json").read_bytes())
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|document|>"}))
    return folder


def settings(folder: Path, **changes: object) -> dict[str, Any]:
    values = lab.settings(folder, **changes)
    return {path: value for path, value in values.items() if value is not None}


def hf_run(base: Path, into: Path, **changes: object) -> Path:
    sizes = dict.fromkeys(("model__width", "model__num_layers", "model__num_heads", "model__num_kv_heads"))
    asked = {"model__hf": base / "model", "data__vocab_size": None, **sizes, **changes}
    config = lab.write_config(into.with_suffix(".toml"), settings(base, **asked))
    loop.train(Request(config, into=into), current_session())
    return into


def scores(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = module(input_ids=tokens).logits
    return out


TOKENS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(3))


def test_a_run_starts_from_local_weights_and_its_result_loads_as_it_lies(base: Path, tmp_path: Path) -> None:
    run = hf_run(base, tmp_path / "run", train__steps=2)
    assert "tokenizer.json" in resolve(Request(tmp_path / "run.toml")).config.data.tokenizer
    newest = sorted((run / "checkpoints").iterdir())[-1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32).eval()
    ours, vocabulary = load_run(run)
    assert torch.equal(scores(theirs, TOKENS), scores(ours, TOKENS))
    before = transformers.AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    drift = (scores(theirs, TOKENS) - scores(before, TOKENS)).abs().max()
    assert 0 < drift < 1, "two small updates away from the weights it started from"
    texts = list(continuations(ours, vocabulary, ["def ", "class value"], 6, Sampling(temperature=0)))
    assert texts == list(
        continuations(theirs, vocabulary, ["def ", "class value"], 6, Sampling(temperature=0))
    )


def test_a_file_that_is_named_describes_the_model_whatever_lies_beside_it(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tiny(num_hidden_layers=1).to_json_file(tmp_path / "smaller.json")
    for name, num_layers in (("", 2), ("config.json", 2), ("smaller.json", 1)):
        config = load(values={"model.hf": str(tmp_path / name), "data.sequence_length": 16}).config
        module: Any = build_model(config, 300)
        assert len(module.model.layers) == num_layers


def unlimited(kind: str) -> Any:
    """Configurations of models that know no largest number of positions."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.5}
    if kind == "alibi":
        return transformers.BloomConfig(**sizes, n_head=4)
    return transformers.MambaConfig(**sizes, state_size=4, expand=2, conv_kernel=4, time_step_rank=4)


@pytest.mark.parametrize("kind", ["alibi", "state"])
def test_models_without_a_limit_of_positions_continue_texts(base: Path, tmp_path: Path, kind: str) -> None:
    """One that adds distances to its scores, and one without attention."""
    unlimited(kind).save_pretrained(tmp_path)
    tokenizer = str(base / "model" / "tokenizer.json")
    run = hf_run(
        base, tmp_path / "run", model__hf=tmp_path / "config.json", data__tokenizer=tokenizer, train__steps=1
    )
    assert any("sample" in one for one in read_records(run / "metrics.jsonl"))
    module, _ = load_run(run)
    rows = [[0, 7, 9], [0, 5, 290, 17, 3, 8]]
    reader = reader_of(module)
    with torch.no_grad():
        found = reader.start(torch.tensor([[0, 0, 0, *rows[0]], rows[1]]), torch.tensor([3, 0]))
        for following in ([4, 11], [290, 4], [17, 17]):
            for row, own in zip(rows, found, strict=True):
                torch.testing.assert_close(own, scores(module, torch.tensor([row]))[0, -1], rtol=0, atol=1e-4)
            rows = [[*row, token] for row, token in zip(rows, following, strict=True)]
            found = reader.read(torch.tensor(following))


def test_adapters_on_a_frozen_bf16_base_come_out_as_peft_has_them(base: Path, tmp_path: Path) -> None:
    lora = {"model__lora_rank": 4, "precision__compute": "bf16", "optimizer__lr": 1e-2}
    run = hf_run(base, tmp_path / "run", **lora)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert (newest / "model.safetensors").stat().st_size < 20_000, "adapters alone are saved"
    plain = transformers.AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    untouched = scores(plain, TOKENS)
    theirs = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    ours = load_run(run)[0].float()
    assert torch.equal(scores(theirs, TOKENS), scores(rounded(ours, run), TOKENS))
    assert not torch.equal(scores(theirs, TOKENS), untouched)
    loop.train(Request(resume=run, overrides=("train.steps=6",)), current_session())
    assert len(list((run / "checkpoints").iterdir())) == 2


def rounded(module: Any, run: Path) -> Any:
    """The module with its adapters as they were saved: `load_run` gives them in the type of computing."""
    tensors = peft.load_peft_weights(str(run / "adapter"))
    with torch.no_grad():
        for name, part in adapters_of(module):
            for factor in ("lora_A", "lora_B"):
                saved = tensors[f"base_model.model.{name}.{factor}.weight"]
                own = part.get_submodule(factor).get_parameter("weight")
                assert torch.equal(own, saved.bfloat16().float())
                own.copy_(saved)
    return module


def test_adapters_that_peft_wrote_are_read(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    asked = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(plain, asked).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = transformers.AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32).eval()
    adapt(ours, load(values={"model.lora_from": str(tmp_path / "adapter")}).config.model, seed=0)
    assert torch.equal(scores(ours, TOKENS), scores(theirs, TOKENS))
    write_adapter(tmp_path / "again", ours, None)
    again = transformers.AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "again").eval()
    assert torch.equal(scores(ours, TOKENS), scores(again, TOKENS))


def test_what_is_no_adapter_of_this_model_is_refused(base: Path, tmp_path: Path) -> None:
    def module() -> Any:
        return transformers.LlamaForCausalLM(tiny())

    def asked(**values: object) -> Any:
        return load(values={f"model.{key}": value for key, value in values.items()}).config.model

    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        adapt(module(), asked(lora_from=str(tmp_path)), 0)
    with pytest.raises(ConfigError, match="named query; it has"):
        adapt(module(), asked(lora_rank=2, lora_targets=["query"]), 0)
    donor = module()
    adapt(donor, asked(lora_rank=2), 0)
    write_adapter(tmp_path / "adapter", donor, None)
    wider = transformers.LlamaForCausalLM(tiny(hidden_size=64))
    with pytest.raises(CheckpointError, match="does not fit: 8"):
        adapt(wider, asked(lora_from=str(tmp_path / "adapter")), 0)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        adapt(module(), asked(lora_from=str(tmp_path / "adapter")), 0)


def test_an_adapter_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = transformers.LlamaForCausalLM(tiny())
    adapt(module, load(values={"model.lora_rank": 2}).config.model, 0)
    folder, before = tmp_path / "adapter", {"adapter_model.safetensors": b"old"}
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"old")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match=r"file/adapter_model\.safetensors cannot be written"):
        write_adapter(tmp_path / "file", module, None)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SaveError, match="No space left"):
        write_adapter(folder, module, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def full(path: Path, target: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_adapters_change_nothing_at_first_and_train_alone() -> None:
    sizes = {"vocab_size": 97, "context_length": 32, "width": 32, "num_layers": 2, "num_heads": 4}
    model = Decoder(DecoderConfig.derive(**sizes))
    names, before = set(model.state_dict()), model.logits(TOKENS % 97)
    found = add_adapters(model, ["q_proj", "down_proj"], rank=2, alpha=4.0, seed=0)
    assert found == [
        f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert torch.equal(model.logits(TOKENS % 97), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(model.state_dict()) - names
    assert len(trained) == 8
    other = Decoder(DecoderConfig.derive(**sizes))
    add_adapters(other, ["q_proj", "down_proj"], rank=2, alpha=4.0, seed=0)
    for (_, one), (_, two) in zip(adapters_of(model), adapters_of(other), strict=True):
        assert torch.equal(one.lora_A.weight, two.lora_A.weight)
    assert add_adapters(Decoder(DecoderConfig.derive(**sizes)), ["nothing"], 2, 4.0, 0) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_apart_are_seen_by_such_a_model(base: Path, attention: str) -> None:
    values = {**settings(base), "data.documents": "separate", "data.sequence_length": 60}
    sizes = {f"model.{key}" for key in ("width", "num_layers", "num_heads", "num_kv_heads")}
    plain = {path: str(v) if isinstance(v, Path) else v for path, v in values.items() if path not in sizes}
    config = load(values={**plain, "model.hf": str(base / "model")}).config
    corpus = prepare(config.data)
    rows = samples_of(config, corpus).batch(0, range(200))
    row = next(each for each in rows if (each[5:50] == corpus.document_mark).any())
    border = int((row[5:50] == corpus.document_mark).argmax()) + 5
    fields = fields_of(config, corpus, row[None])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base / "model", dtype=torch.float32, attn_implementation=attention
    ).eval()
    with torch.no_grad():
        together = model(**fields).logits[0]
        alone = model(input_ids=fields["input_ids"][:, border:]).logits[0]
    torch.testing.assert_close(together[border:], alone, rtol=0, atol=1e-5)


def test_what_cannot_be_built_is_said(base: Path, tmp_path: Path) -> None:
    def built(hf: Path, vocab_size: int = 300, **values: object) -> Any:
        return build_model(load(values={"model.hf": str(hf), **values}).config, vocab_size)

    assert built(base / "model" / "config.json", **{"data.sequence_length": 16}).config.hidden_size == 32
    with pytest.raises(ConfigError, match="there is no file"):
        built(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ConfigError, match="nothing"):
        built(tmp_path)
    with pytest.raises(ModelError, match="vocabulary of 300, the corpus one of 301"):
        built(base / "model", 301)
    with pytest.raises(ModelError, match="64 positions"):
        built(base / "model", **{"data.sequence_length": 64})
    with pytest.raises(ConfigError, match=r"model\.width is a size of the reference decoder"):
        load(values={"model.hf": str(base), "model.width": 64})


def test_weights_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        hf_run(base, tmp_path / "one", model__weights=tmp_path)
    config = tiny(num_hidden_layers=3, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "deeper")
    with pytest.raises(CheckpointError, match=r"extra: model\.layers\.2"):
        hf_run(base, tmp_path / "two", model__weights=tmp_path / "deeper")
