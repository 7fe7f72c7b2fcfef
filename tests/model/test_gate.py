"""A gate over adapters: soft in training, one for each sequence in evaluation, and the same through a generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import isotune
from isotune import LoRA, SequenceGate
from isotune.errors import IsotuneError
from support import adapted, assert_same_output, output, stories

IDS = torch.arange(5, 25).view(4, 5)


def gated() -> tuple[Any, SequenceGate]:
    model: Any = stories()
    for seed, name in enumerate(("python", "java", "c")):
        adapted(model, LoRA(rank=2), ["q_proj", "down_proj"], name=name, seed=seed, size=0.3)
    gate = SequenceGate(model, seed=1)
    with torch.no_grad():  # each asks for a token that some of the rows have
        gate.R.copy_(10 * torch.linalg.pinv(model.get_input_embeddings()(IDS[:3].flatten())).mT.view(3, 5, -1).sum(1))
    return model, gate


def test_in_evaluation_every_sequence_has_the_adapter_that_its_tokens_ask_for() -> None:
    model, gate = gated()
    gate.eval()
    embedded = model.get_input_embeddings()(IDS)
    chosen = [gate.names[e] for e in (embedded @ gate.R.mT).amax(1).argmax(-1).tolist()]
    assert len(set(chosen)) > 1
    together = output(model, input_ids=IDS)
    shuffled = output(model, input_ids=IDS.flip(0)).flip(0)
    assert_same_output(shuffled, together)
    gate.remove()
    for row, name in enumerate(chosen):
        isotune.use(model, name)
        assert_same_output(output(model, input_ids=IDS[row : row + 1])[0], together[row])


def test_in_training_the_gate_alone_learns_through_the_mix_of_all() -> None:
    model, gate = gated()
    p = gate(model.get_input_embeddings()(IDS))
    y = output(model, input_ids=IDS)
    isotune.route(model, p.detach(), *gate.names)
    gate.remove()
    assert_same_output(output(model, input_ids=IDS), y)
    model, gate = gated()
    before, optimizer = gate.R.detach().clone(), torch.optim.AdamW(gate.parameters(), lr=0.05)
    assert len(list(gate.parameters())) == 1
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(gate.R, before)
    assert all(p.grad is None for p in model.parameters())
    model, gate = gated()
    with torch.no_grad():  # where one adapter has all the weight, soft and hard are the same
        gate.R.mul_(1e5)
    soft = output(model, input_ids=IDS)
    gate.eval()
    assert gate(model.get_input_embeddings()(IDS)).amax(-1).min() > 1 - 1e-6
    assert_same_output(output(model, input_ids=IDS), soft, 1e-4)


def test_padding_does_not_win_and_a_generation_keeps_its_adapter() -> None:
    model, gate = gated()
    gate.eval()
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    embedded = model.get_input_embeddings()(IDS[:1])
    assert_same_output(gate(embedded, mask), gate(embedded[:, :3]))
    prompt = IDS[:2]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    p = gate(model.get_input_embeddings()(prompt))
    gate.remove()
    for row, e in enumerate(p.argmax(-1).tolist()):
        isotune.use(model, gate.names[e])
        alone = model.generate(prompt[row : row + 1], attention_mask=torch.ones(1, 5, dtype=torch.long), **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


def test_what_a_gate_needs_is_said() -> None:
    model: Any = adapted(stories(), LoRA(rank=2), ["q_proj"], name="one")
    with pytest.raises(IsotuneError, match="chooses between adapters, and was given: one"):
        SequenceGate(model)
    with pytest.raises(IsotuneError, match="no adapter 'two'"):
        SequenceGate(model, "one", "two")
    bare = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for name in ("a", "b"):
        isotune.adapt(bare, LoRA(rank=2), ["0"], name=name)
    with pytest.raises(IsotuneError, match="reads the input embeddings"):
        SequenceGate(bare)
