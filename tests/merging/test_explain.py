"""How far models agree: cases in which every number is known, and the definitions, computed densely."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import isotune
from isotune import LoRA
from isotune.checkpoint.read import read_stored
from isotune.errors import OptionError
from isotune.linalg.change import Change
from isotune.linalg.low_rank import Factored
from isotune.merging import explain as module
from isotune.merging.adapters import agreement
from isotune.merging.adapters.merge import open_inputs
from isotune.merging.contract import Aligned, RotationRule, Rule
from isotune.merging.explain import Agreement, Explanation, explain
from isotune.merging.registry import rule
from support import adapted, stories


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def site(*changes: Change, path: str = "a", weights: tuple[float, ...] | None = None) -> Aligned:
    return Aligned(path, tuple("xyzuvw"[: len(changes)]), changes, weights or (1.0,) * len(changes))


def outer(b: list[float], a: list[float], size: float = 1.0) -> Factored:
    """`size b aᵀ` for b and a brought to length one."""
    B, A = torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64)
    return Factored(size * (B / B.norm())[:, None], (A / A.norm())[None])


def gauged(change: Factored) -> Factored:
    G = drawn(change.rank, change.rank)
    return Factored(change.B @ G, torch.linalg.inv(G) @ change.A)


def found(*changes: Change, weights: tuple[float, ...] | None = None) -> Agreement:
    """Of one layer, which is then also that of all."""
    explanation = explain([site(*changes, weights=weights)], "sum")
    assert explanation.sites[0].agreement == explanation.overall
    return explanation.overall


def test_models_that_are_the_same() -> None:
    change = Factored(drawn(12, 3), drawn(3, 9))
    agreement = found(change, gauged(change), gauged(change))
    size = float(change.dense().norm())
    assert agreement.norms == pytest.approx({"x": size, "y": size, "z": size})
    assert [pair.models for pair in agreement.pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    for pair in agreement.pairs:
        assert pair.cosine == pytest.approx(1)
        assert pair.sign_conflict == pytest.approx(0, abs=1e-12)
        assert pair.row_overlap == pytest.approx(1)
        assert pair.column_overlap == pytest.approx(1)
    assert agreement.outvoted == pytest.approx(0, abs=1e-12)
    assert agreement.interference == pytest.approx({"x": 2, "y": 2, "z": 2})
    assert agreement.truncation == {3: 0}


def test_models_that_are_opposites() -> None:
    change = Factored(drawn(12, 3), drawn(3, 9))
    agreement = found(change, gauged(change.scaled(-1)))
    (pair,) = agreement.pairs
    assert pair.cosine == pytest.approx(-1)
    assert pair.sign_conflict == pytest.approx(1)
    assert pair.row_overlap == pytest.approx(1)
    assert agreement.outvoted == pytest.approx(0.5)
    assert agreement.interference == pytest.approx({"x": 1, "y": 1})
    assert agreement.truncation == {}  # nothing is left of the sum


def test_models_that_have_nothing_in_common() -> None:
    agreement = found(outer([1, 1, 0, 0], [1, 2, 0], size=3), outer([0, 0, 1, -1], [0, 0, 1], size=4))
    (pair,) = agreement.pairs
    assert agreement.norms == pytest.approx({"x": 3, "y": 4})
    assert (pair.cosine, pair.sign_conflict) == (0, 0)
    assert pair.row_overlap == pytest.approx(0, abs=1e-12)
    assert pair.column_overlap == pytest.approx(0, abs=1e-12)
    assert agreement.outvoted == 0
    assert agreement.interference == pytest.approx({"x": 0, "y": 0}, abs=1e-12)
    assert agreement.truncation == pytest.approx({1: 0.6, 2: 0})


def test_models_that_read_the_same_and_write_elsewhere() -> None:
    agreement = found(outer([1, 0, 0], [1, 2], size=2), outer([0, 1, 0], [1, 2], size=5))
    (pair,) = agreement.pairs
    assert pair.cosine == 0
    assert pair.row_overlap == pytest.approx(1)
    assert pair.column_overlap == pytest.approx(0, abs=1e-12)
    assert agreement.interference == pytest.approx({"x": 5 / 2, "y": 2 / 5})
    assert agreement.truncation == pytest.approx({1: 0}, abs=1e-12)


def test_models_at_45_degrees() -> None:
    agreement = found(outer([1, 0], [1, 0]), outer([1, 0], [1, 1]))
    (pair,) = agreement.pairs
    assert pair.cosine == pytest.approx(sqrt(0.5))
    assert pair.row_overlap == pytest.approx(0.5)
    assert pair.column_overlap == pytest.approx(1)
    assert agreement.interference == pytest.approx({"x": sqrt(0.5), "y": sqrt(0.5)})


def test_signs_count_by_their_magnitude() -> None:
    agreement = found(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 3.0]]))
    (pair,) = agreement.pairs
    assert pair.sign_conflict == pytest.approx(6 / 7)
    assert agreement.outvoted == pytest.approx(2 / 7)
    weighted = found(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 3.0]]), weights=(1.0, -1.0))
    assert weighted.pairs == agreement.pairs
    assert weighted.outvoted == pytest.approx(1 / 7)


def test_weights_scale_what_others_do() -> None:
    change = Factored(drawn(12, 3), drawn(3, 9))
    assert found(change, gauged(change), weights=(0.25, 0.5)).interference == pytest.approx({"x": 0.5, "y": 0.25})


def test_the_definitions_computed_densely() -> None:
    weights = (0.5, 1.0, -2.0)
    changes = [Factored(drawn(14, r), drawn(r, 11)) for r in (2, 4, 3)]
    Ws = [change.dense() for change in changes]
    agreement = found(*changes, weights=weights)
    total = sum((w * W for w, W in zip(weights, Ws, strict=True)), torch.zeros(()))
    for number, (name, W) in enumerate(zip("xyz", Ws, strict=True)):
        _, S, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh[: changes[number].rank].mT
        assert agreement.norms[name] == pytest.approx(float(S.norm()))
        others = (total - weights[number] * W) @ V @ V.mT
        assert agreement.interference is not None
        assert agreement.interference[name] == pytest.approx(float(others.norm() / W.norm()))
    for pair in agreement.pairs:
        i, j = ("xyz".index(name) for name in pair.models)
        one, other = Ws[i], Ws[j]
        assert pair.cosine == pytest.approx(float((one * other).sum() / (one.norm() * other.norm())))
        both = one * other
        assert pair.sign_conflict == pytest.approx(float(both[both < 0].abs().sum() / both.abs().sum()))
        cosines = torch.linalg.svdvals(torch.linalg.qr(changes[i].A.mT).Q.mT @ torch.linalg.qr(changes[j].A.mT).Q)
        assert pair.row_overlap == pytest.approx(float(cosines.square().mean()))
        cosines = torch.linalg.svdvals(torch.linalg.qr(changes[i].B).Q.mT @ torch.linalg.qr(changes[j].B).Q)
        assert pair.column_overlap == pytest.approx(float(cosines.square().mean()))
    mass = sum((abs(w) * W.abs() for w, W in zip(weights, Ws, strict=True)), torch.zeros(()))
    against = sum(
        (float((w * W)[(w * W).sign() != total.sign()].abs().sum()) for w, W in zip(weights, Ws, strict=True)), 0.0
    )
    assert agreement.outvoted == pytest.approx(against / float(mass.sum()))
    S = torch.linalg.svdvals(total)
    assert agreement.truncation == pytest.approx(
        {rank: float(S[rank:].norm() / S.norm()) for rank in (4, 8, 9)}, abs=1e-12
    )


def two_layers() -> list[Aligned]:
    return [
        site(*(Factored(drawn(8, r), drawn(r, 6)) for r in (2, 1)), path="a"),
        site(*(Factored(drawn(5, r), drawn(r, 9)) for r in (1, 2)), path="b"),
    ]


def test_all_layers_together_are_one_block_diagonal_layer() -> None:
    layers = two_layers()
    explanation = explain(layers, "sum")
    blocks = [
        Factored(torch.block_diag(*(c.B for c in of)), torch.block_diag(*(c.A for c in of)))
        for of in zip(*(layer.changes for layer in layers), strict=True)
        if all(isinstance(c, Factored) for c in of)
    ]
    whole = found(*blocks)
    overall = explanation.overall
    assert overall.norms == pytest.approx(whole.norms)
    assert overall.interference == pytest.approx(whole.interference)
    assert overall.outvoted == pytest.approx(whole.outvoted)
    (pair,), (expected,) = overall.pairs, whole.pairs
    assert pair.cosine == pytest.approx(expected.cosine)
    assert pair.sign_conflict == pytest.approx(expected.sign_conflict)
    each = [of.agreement.pairs[0].row_overlap or 0 for of in explanation.sites]
    assert pair.row_overlap == pytest.approx(sum(each) / 2)
    Ss = [torch.linalg.svdvals(sum(c for c in layer.dense())) for layer in layers]
    size = sqrt(sum(float(S.square().sum()) for S in Ss))
    assert overall.truncation == pytest.approx(
        {rank: sqrt(sum(float(S[rank:].square().sum()) for S in Ss)) / size for rank in (2, 3)}, abs=1e-12
    )


def test_each_layer_is_told_by_itself() -> None:
    layers = two_layers()
    explanation = explain(iter(layers), "sum")
    assert [(of.path, of.shape, of.ranks) for of in explanation.sites] == [
        ("a", (8, 6), {"x": 2, "y": 1}),
        ("b", (5, 9), {"x": 1, "y": 2}),
    ]
    for layer, of in zip(layers, explanation.sites, strict=True):
        assert of.agreement.pairs == explain([layer], "sum").overall.pairs


def test_ranks_are_those_that_the_changes_have() -> None:
    change = Factored(drawn(12, 2), drawn(2, 9))
    twice = Factored(torch.cat([change.B, change.B], dim=1), torch.cat([change.A, change.A]))
    wide = Factored(drawn(12, 20), drawn(20, 9))
    explanation = explain([site(twice, wide, change)], "sum")
    assert explanation.sites[0].ranks == {"x": 2, "y": 9, "z": 2}
    assert explanation.overall.truncation == pytest.approx({9: 0})


def test_models_that_leave_a_layer_alone() -> None:
    nothing = Factored(torch.zeros(12, 0).double(), torch.zeros(0, 9).double())
    zero = Factored(torch.zeros(12, 2).double(), drawn(2, 9))
    change = Factored(drawn(12, 3), drawn(3, 9))
    agreement = found(change, nothing, zero)
    assert agreement.norms == pytest.approx({"x": float(change.dense().norm()), "y": 0, "z": 0})
    assert all(pair.cosine == 0 and pair.sign_conflict == 0 for pair in agreement.pairs)
    assert all(pair.row_overlap is None and pair.column_overlap is None for pair in agreement.pairs)
    assert agreement.interference == pytest.approx({"x": 0, "y": 0, "z": 0})
    assert found(nothing, zero).truncation == {}


def test_dense_changes_tell_what_needs_no_subspaces() -> None:
    one, other = (Factored(drawn(12, 2), drawn(2, 9)) for _ in range(2))
    factored, dense = found(one, other), found(one.dense(), other)
    assert dense.norms == pytest.approx(factored.norms)
    (pair,), (expected,) = dense.pairs, factored.pairs
    assert pair.cosine == pytest.approx(expected.cosine)
    assert pair.sign_conflict == pytest.approx(expected.sign_conflict)
    assert pair.row_overlap is pair.column_overlap is dense.interference is dense.truncation is None
    both = explain([site(one, other), site(torch.ones(6), torch.ones(6), path="bias")], "sum")
    assert both.overall.interference == pytest.approx(factored.interference)
    assert both.overall.truncation == pytest.approx(factored.truncation)
    assert both.sites[1].agreement.pairs[0].cosine == pytest.approx(1)


def test_large_layers_are_sampled_repeatably(monkeypatch: Any) -> None:
    layer = site(*(Factored(drawn(300, 4) + 0.5, drawn(4, 200) + 0.5) for _ in range(3)))
    full = explain([layer], "sum").overall
    monkeypatch.setattr(agreement, "SAMPLE", 20000)
    monkeypatch.setattr(agreement, "_BLOCK", 5000)
    some = explain([layer], "sum").overall
    assert some.pairs == explain([layer], "sum").overall.pairs
    assert some.norms == full.norms
    assert some.outvoted != full.outvoted
    assert some.outvoted == pytest.approx(full.outvoted, rel=0.1)
    for pair, expected in zip(some.pairs, full.pairs, strict=True):
        assert pair.cosine == expected.cosine
        assert pair.sign_conflict == pytest.approx(expected.sign_conflict, rel=0.15)


def test_single_precision_is_good_to_its_digits() -> None:
    changes = [Factored(drawn(60, 4), drawn(4, 50)) for _ in range(3)]
    full = found(*changes)
    some = found(*(Factored(c.B.float(), c.A.float()) for c in changes))
    for one, other in zip(asdict(some)["pairs"], asdict(full)["pairs"], strict=True):
        assert one == {
            key: pytest.approx(value, abs=1e-5) if key != "models" else value for key, value in other.items()
        }
    assert some.truncation == pytest.approx(full.truncation, abs=1e-5)


def test_the_result_is_ready_for_json() -> None:
    explanation = explain(two_layers(), "sum")
    text = json.dumps(asdict(explanation), allow_nan=False)
    assert json.loads(text)["overall"]["pairs"][0]["models"] == ["x", "y"]
    assert isinstance(explanation, Explanation)
    assert explanation.weights == {"x": 1.0, "y": 1.0}
    assert (explanation.rule, explanation.notes) == ("sum", [])


class Peculiar(Rule):
    """A rule of which there is much to say."""

    name: ClassVar[str] = "peculiar"
    symmetric = False
    random = True
    exact_rank = False
    equal_ranks = True
    statistic = "fisher"
    models = (3, 4)

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        raise AssertionError("explaining merges nothing")


class Turning(RotationRule):
    """A rule on rotations."""

    name: ClassVar[str] = "turning"
    models = (2, 2)

    def merge(self, *_: Any) -> Any:
        raise AssertionError("explaining merges nothing")


def test_notes_say_what_to_know_of_the_rule(monkeypatch: Any) -> None:
    rules = {"peculiar": Peculiar, "turning": Turning}
    monkeypatch.setattr(module, "rule_class", rules.__getitem__)
    assert explain(two_layers(), "peculiar").notes == [
        "peculiar takes 3 to 4 models; there are 2",
        "the order of the models matters to peculiar",
        "peculiar draws: its result depends on the seed",
        "peculiar works on single entries: its result has full rank, and is cut down to a rank",
        "peculiar needs changes of one rank at each layer",
        "peculiar needs a statistic of each model's weights: fisher",
    ]
    assert explain(two_layers(), "turning").notes == [
        "turning merges rotations, not changes; the figures are those of their changes"
    ]
    three = [site(*(Factored(drawn(4, 1), drawn(1, 4)) for _ in range(3)))]
    assert explain(three, "turning").notes[0] == "turning takes exactly 2 models; there are 3"


def test_unknown_rules_and_no_layers_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown rule 'sun'\. Did you mean 'sum'\?"):
        explain(two_layers(), "sun")
    with pytest.raises(OptionError, match="no layers to compare"):
        explain([], "sum")


def test_adapters_in_folders_are_explained(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        isotune.save(adapted(stories(), LoRA(rank=3), ["q_proj"], seed=seed), tmp_path / name)
    inputs, _ = open_inputs([tmp_path / "one", tmp_path / "two"], rule("sum"), [1.0, 1.0], ["one", "two"])
    explanation = explain(inputs, "sum")
    assert [of.path for of in explanation.sites] == [f"model.layers.{i}.self_attn.q_proj" for i in range(5)]
    assert {rank for of in explanation.sites for rank in of.ranks.values()} == {3}
    assert set(explanation.overall.truncation or {}) == {3, 6}
    for name in ("one", "two"):
        changes = [factors.dense() for factors in recovered(tmp_path / name)]
        assert explanation.overall.norms[name] == pytest.approx(float(torch.stack(changes).norm()))


def recovered(folder: Path) -> list[Factored]:
    state = read_stored(folder).state
    return [Factored(t["lora_B.weight"], t["lora_A.weight"]) for t in state.values()]


def test_seeds_move_the_sample_only() -> None:
    layers = two_layers()
    other = explain([replace(layer, seed=1) for layer in layers], "sum")
    assert other.overall == explain(layers, "sum").overall  # too small to be sampled
