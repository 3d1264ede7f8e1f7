"""Where rules of the tensor axis come from: those that do not hold are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sixfold.base.errors import ConfigError, ModelError, PlanError
from sixfold.config import LayoutConfig
from sixfold.parallel.facts import block_names
from sixfold.parallel.tensor.crossing import COPIED, GATHERED, PARTED, SUMMED, Crossing
from sixfold.parallel.tensor.cut import Layer, Rules, TensorCut, decide_tensor
from sixfold.parallel.tensor.heads import Head
from sixfold.parallel.tensor.rules import find_rules
from sixfold.parallel.tensor.styles import IN, OUT, STYLES, Style
from sixfold.parallel.tensor.verify import Meeting, Seat, difference
from sixfold.parallel.tiny import tiny_of
from tests.architectures import BY_NAME


class Net(nn.Module):
    """Two pairs of layers; the second has a norm over the columns between."""

    dummy_inputs: Any

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.dummy_inputs = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(torch.relu(self.fc1(x)))
        out: Tensor = x + self.down(self.norm(self.up(x)))
        return out


HOLDS = ("fc1 = colwise", "fc2 = rowwise")
WRONG = {
    "a norm over cut columns": (("up = colwise", "down = rowwise"), "fails"),
    "the second of a pair alone": (("fc2 = rowwise",), "fc2 takes its part of the columns"),
    "the first of a pair alone": (("fc1 = colwise",), "fails"),
    "a sum of what is whole on every rank": (
        ("fc1 = colwise_gather_output", "fc2 = replicated_with_grad_allreduce"),
        "gradient of fc2",
    ),
    "a module that is none": (("fc9 = colwise",), "fits no module"),
    "a norm": (("norm = colwise",), "only linear layers and embeddings are cut"),
}


def layout(*rules: str, **more: Any) -> LayoutConfig:
    return LayoutConfig(tensor=2, tensor_rules=rules or None, **more)


def test_rules_of_the_user_that_hold_are_taken() -> None:
    assert find_rules(Net(), layout(*HOLDS)).styles == {"fc1": "colwise", "fc2": "rowwise"}


@pytest.mark.parametrize("case", WRONG)
def test_rules_that_do_not_hold_are_refused(case: str) -> None:
    rules, said = WRONG[case]
    with pytest.raises(ModelError, match=said) as caught:
        find_rules(Net(), layout(*rules))
    assert "layout.tensor = 1" in caught.value.fix


WRONG_STYLES: dict[str, dict[str, Any]] = {
    "a gradient that stays a summand": {"shares": OUT},
    "a summand that leaves": {"shares": IN},
    "a part where all is taken": {"shares": OUT, "entering": PARTED, "leaving": GATHERED},
    "a sum of parts": {"shares": OUT, "entering": COPIED, "leaving": SUMMED},
    "a gradient that stays whole": {"shares": OUT, "entering": COPIED, "leaving": Crossing("gather", "same")},
}


@pytest.mark.parametrize("name", WRONG_STYLES)
def test_a_style_whose_borders_do_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"partial|cut"):
        Style(**WRONG_STYLES[name])


def test_a_rule_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="colwize"):
        find_rules(Net(), layout("fc1 = colwize"))


def test_structure_takes_what_holds_and_leaves_the_rest() -> None:
    found = find_rules(Net(), layout())
    assert found.styles == {"fc1": "colwise", "fc2": "rowwise"}
    assert found.source == "its structure"


def test_what_cannot_be_tried_is_refused() -> None:
    net = Net()
    del net.dummy_inputs
    with pytest.raises(ModelError, match=r"model\.dummy_inputs"):
        find_rules(net, layout())
    with torch.device("meta"):
        large = Net()
    with pytest.raises(ModelError, match="on meta, are not copied"):
        find_rules(large, layout())


def test_rules_of_the_user_that_cannot_be_tried_are_taken_with_a_warning(caplog: Any) -> None:
    with torch.device("meta"):
        large = Net()
    assert find_rules(large, layout(*HOLDS)).styles == {"fc1": "colwise", "fc2": "rowwise"}
    assert "cut by layout.tensor_rules without a trial: 236" in caplog.text


def test_a_declared_rule_that_fits_nothing_is_refused() -> None:
    net: Any = Net()
    net.tensor_rules = {"fc1": "colwise", "fc3": "rowwise"}
    with pytest.raises(ModelError, match=r"'fc3' fits no module \(model\.tensor_rules\)"):
        decide_tensor(net, find_rules(net, layout()), 2, 0)


def test_what_is_not_in_the_small_copy_is_named(caplog: Any) -> None:
    model: Any = BY_NAME["Llama"].build()
    assert find_rules(model, layout()).styles
    assert not caplog.text
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    assert find_rules(model, layout()).styles
    assert "without 1 of its modules, first model.layers.*.mlp.act_fn" in caplog.text


class Block(nn.Module):
    """Two layers and a norm; or, without layers, the norm alone."""

    def __init__(self, has_layers: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc1, self.fc2 = (nn.Linear(6, 8), nn.Linear(8, 6)) if has_layers else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x if self.fc1 is None or self.fc2 is None else x + self.fc2(torch.relu(self.fc1(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(has_layers) for has_layers in (False, True, False))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_sequence_may_begin_and_end_in_blocks_that_are_not_cut() -> None:
    rules = Rules({"blocks.*.fc1": "colwise", "blocks.*.fc2": "rowwise"})
    names = [f"blocks.{number}" for number in range(3)]
    assert difference(Blocks(), {"x": torch.randn(2, 4, 6)}, rules, 2, names) is None


def test_the_vocabulary_is_that_of_the_head() -> None:
    layers = tuple(
        Layer(name, STYLES[style], size, ((0, size // 2),))
        for name, style, size in (("head", "scores", 10), ("kinds", "embedding_rowwise", 4))
    )
    model = nn.ModuleDict({"head": nn.Linear(3, 10), "kinds": nn.Embedding(4, 3)})
    found = Head.find(model, TensorCut(layers, {}, (), 2, ""), Seat(Meeting(2), 0))
    assert found is not None
    assert found.vocabulary.size == 10


def test_another_model_gets_another_answer() -> None:
    """Even where it has the place in memory of one that is gone."""
    net = Net()
    assert "fc1" in find_rules(net, layout()).styles
    del net
    changed: Any = Net()
    changed.fc1 = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    with pytest.raises(ModelError):
        find_rules(changed, layout())


@pytest.mark.parametrize("num_ranks", [3, 16])
def test_what_a_sequence_is_tried_on_divides(num_ranks: int) -> None:
    sizes = {
        **BY_NAME["Llama"].sizes,
        "num_attention_heads": 48,
        "num_key_value_heads": 48,
        "hidden_size": 48,
    }
    model = replace(BY_NAME["Llama"], sizes=sizes).build()
    asked = LayoutConfig(tensor=num_ranks, sequence_parallel=True)
    assert find_rules(model, asked).styles["model.layers.*.mlp.up_proj"] == "colwise"


def test_heads_that_do_not_divide_name_the_legal_degrees() -> None:
    model = BY_NAME["Llama"].build()
    rules = find_rules(model, layout())
    with pytest.raises(PlanError, match="4 heads") as caught:
        decide_tensor(model, rules, 3, 0)
    assert "1, 2, 4" in caught.value.fix


def test_a_wrong_sum_in_a_sequence_is_seen() -> None:
    """The trial tells a partial gradient from a whole one: without its mark a norm's would be half of it."""
    model, inputs = tiny_of(BY_NAME["Llama"].build())
    plan = Rules(find_rules(BY_NAME["Llama"].build(), layout()).styles)
    blocks = block_names(model, None)
    assert difference(model, inputs, plan, 2, blocks) is None
    swapped = Rules({**plan.styles, "model.layers.*.self_attn.v_proj": "replicated_with_grad_allreduce"})
    assert difference(model, inputs, swapped, 2, blocks) is not None


@pytest.mark.parametrize("sequence", [False, True])
def test_the_plan_of_a_model_cuts_experts_in_their_width(sequence: bool) -> None:
    model = BY_NAME["Mixtral"].build()
    asked = layout(sequence_parallel=sequence)
    rules = find_rules(model, asked).styles
    cut = decide_tensor(model, Rules(rules), 2, 1)
    place = cut.places["model.layers.0.mlp.experts.gate_up_proj"]
    width = model.config.intermediate_size
    assert place.spans == ((), ((width // 2, width), (3 * width // 2, 2 * width)), ())
    place = cut.places["model.layers.0.mlp.experts.down_proj"]
    assert place.spans == ((), (), ((width // 2, width),))
    turned = {"model.layers.*.mlp.experts.gate_up_proj": "packed_rowwise"}  # stacked the other way round
    place = decide_tensor(model, Rules(rules | turned), 2, 1).places[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    assert place.spans == ((), (), ((8, 16), (24, 32)))
    with pytest.raises(ModelError, match=rf"gate_up_proj is {width} wide"):
        decide_tensor(
            model, Rules({name: style for name, style in rules.items() if "experts" in name}), 2 * width, 0
        )


def test_experts_that_cannot_be_cut_so_stay_whole(caplog: Any) -> None:
    """Each rank would add what is beside the cut matrices once more."""
    model = BY_NAME["Mixtral"].build()

    class Beside(type(model.model.layers[0].mlp.experts)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
            return super().forward(hidden_states, *args) + hidden_states

    class Model(type(model)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for each in self.model.layers:
                each.mlp.experts.__class__ = Beside

    changed = Model(model.config)
    rules = find_rules(changed, layout())
    assert "moe_tp_experts" not in rules.styles.values()
    assert "every rank has the experts of the Model whole" in caplog.text
    assert not [name for name in decide_tensor(changed, rules, 2, 0).places if "experts" in name]
