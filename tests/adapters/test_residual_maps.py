"""What is particular to ALoRE, ARC and KAdaptation: maps of what is read, factors that all layers train together."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import isotune
from isotune.adapters.budget import nearest_to, total_parameters
from isotune.errors import OptionError
from isotune.integrations.transformers import AdapterCallback
from isotune.model.catalogue import linear_site
from support import adapted, assert_same_output, minilm, move, output, stories

TARGETS = ["q_proj", "v_proj", "up_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "alore": {"rank": 2, "experts": 4},
    "arc": {"rank": 6},
    "kadaptation": {"parts": 4},
}
every = pytest.mark.parametrize("name", OPTIONS)


def method(name: str) -> Any:
    return isotune.method(name, **OPTIONS[name])


def one(name: str, n_in: int = 12, n_out: int = 8) -> tuple[Tensor, Any]:
    """A weight, and the adapter on the layer that has it."""
    torch.manual_seed(0)
    model = move(isotune.adapt(nn.Sequential(nn.Linear(n_in, n_out)), method(name), ["0"], seed=0), size=0.5)
    W = model[0]._parameters["weight"]
    assert isinstance(W, Tensor)
    return W.detach(), model[0].isotune["default"]


def test_alore_is_the_sum_of_kronecker_products() -> None:
    W, adapter = one("alore")
    H = sum(torch.kron(adapter.S[i], adapter.L[i] @ adapter.R[i]) for i in range(4))
    assert isinstance(H, Tensor)
    x = torch.randn(5, 12)
    torch.testing.assert_close(adapter.change(x), x @ H)
    torch.testing.assert_close(adapter.weight(W), W @ (torch.eye(12) + H).mT)
    B, _ = adapter.factors(W)
    assert B.shape[1] == 4 * 4 * 2
    # ViT-B with 4 experts of rank 4 before attention and MLP of 12 layers: the paper's 0.15 M.
    vit = {str(k): linear_site(768, 768) for k in range(24)}
    assert total_parameters(isotune.method("alore", rank=4, experts=4), vit) == 148_992


def test_arc_is_symmetric_and_its_projection_one_tensor(tmp_path: Path) -> None:
    W, adapter = one("arc")
    D = adapter.shared["arc_D_12"]
    H = D @ torch.diag(adapter.c) @ D.mT
    torch.testing.assert_close(H, H.mT)
    torch.testing.assert_close(adapter.weight(W), W @ (torch.eye(12) + H))
    model = adapted(stories(), method("arc"), TARGETS)
    adapters = [m.isotune["default"] for m in model.modules() if hasattr(m, "isotune")]
    shared = {id(a.shared["arc_D_64"]) for a in adapters}
    assert len(shared) == 1
    assert sum("arc_D_64" in name for name in model.state_dict()) == 1
    model(input_ids=torch.arange(5, 15)[None]).logits.square().mean().backward()
    whole = adapters[0].shared["arc_D_64"].grad.clone()
    assert whole.any()
    isotune.save(model, tmp_path)
    assert {row.trainable for row in isotune.describe(model)[1:]} == {6}


@every
def test_what_all_share_stays_tied_whatever_becomes_of_the_model(name: str, tmp_path: Path) -> None:
    model: Any = adapted(stories(), method(name), TARGETS, size=0.2)
    expected = output(model)
    isotune.save(model, tmp_path / "adapter")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        isotune.load(stories(), tmp_path / "adapter").eval(),
    ]
    fresh = isotune.adapt(stories(), method(name), TARGETS, seed=9).eval()
    fresh.load_state_dict(model.state_dict())
    for twin in (*twins, fresh):
        assert torch.equal(output(twin), expected)
        adapters = [m.isotune["default"] for m in twin.modules() if hasattr(m, "isotune")]
        if name != "alore":
            assert len({id(a.shared) for a in adapters}) == 1
            tensor = next(iter(adapters[0].shared.tensors().values()))
            with torch.no_grad():
                tensor.add_(0.5)
            assert not torch.allclose(output(twin), expected, atol=1e-4)
    isotune.export_lora(model, tmp_path / "lora")
    assert_same_output(output(isotune.load(stories(), tmp_path / "lora").eval()), expected)
    assert_same_output(output(isotune.fold(model)), expected)


def test_kadaptation_is_the_sum_of_kronecker_products() -> None:
    W, adapter = one("kadaptation")
    s, t = adapter.shared["kadaptation_s"], adapter.shared["kadaptation_t"]
    change = sum(torch.kron(torch.outer(t[i], s[i]), adapter.v[i].mT @ adapter.u[i]) for i in range(4))
    torch.testing.assert_close(adapter.weight(W) - W, change)
    sites = {str(k): linear_site(32, 64) for k in range(3)}
    sized = nearest_to(32 * 2 + 3 * 2 * 96, isotune.method("kadaptation", parts=4), sites)
    assert total_parameters(sized, sites) == 2 * 16 + 3 * sized.rank * 96


@pytest.mark.parametrize("name", ["alore", "arc"])
def test_before_a_block_it_is_in_all_layers_that_read_its_input(name: str) -> None:
    model: Any = adapted(stories(), method(name), ["self_attn"], size=0.3)
    if name == "arc":
        for layer in model.model.layers:
            layer.self_attn.isotune["default"].u.data.zero_()
    expected, twin = output(model), stories()
    for k, layer in enumerate(model.model.layers):
        adapter, plain = layer.self_attn.isotune["default"], twin.model.layers[k].self_attn
        L, R = adapter.thin()
        for linear in (plain.q_proj, plain.k_proj, plain.v_proj):
            linear.weight.data += linear.weight @ (L @ R).mT
    assert not torch.allclose(expected, output(stories()), atol=1e-3)
    assert_same_output(output(twin), expected)


def test_a_trainer_saves_what_is_shared_once_and_resumes(tmp_path: Path) -> None:
    def trainer(model: Any) -> Trainer:
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return Trainer(model, arguments, train_dataset=rows, callbacks=[AdapterCallback()])

    whole = isotune.adapt(stories(), method("arc"), TARGETS, seed=0)
    trainer(whole).train()
    again = isotune.adapt(stories(), method("arc"), TARGETS, seed=3)
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(output(again.eval()), output(whole.eval()))
    loaded = isotune.load(stories(), tmp_path / "checkpoint-4" / "adapter").eval()
    assert torch.equal(output(loaded), output(whole))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(OptionError, match="experts=5 does not divide the 384 numbers"):
        isotune.adapt(minilm(), isotune.method("alore", experts=5), ["query"])
    with pytest.raises(OptionError, match="parts=7 does not divide a layer of 384 inputs"):
        isotune.adapt(minilm(), isotune.method("kadaptation", parts=7), ["query"])
    with pytest.raises(OptionError, match="arc shares arc_D_384 among all layers, so that overrides cannot"):
        isotune.adapt(minilm(), isotune.method("arc"), ["query", "key"], overrides={"key": {"rank": 4}})
