"""Every law can fail: for each there is a method, broken on purpose, that the law must catch."""

from __future__ import annotations

import pickle
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from isotune import LowRank, Settings
from isotune.adapters.contract import Thin
from isotune.sites import Site
from laws.suite import LAWS, check_law


class Broken(Settings):
    """A LoRA of rank 1 that breaks the law named by `breaks`."""

    name: ClassVar[str] = "broken"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_in + n_out"

    breaks: str = Field("", description="The name of the law to break.")

    def build(self, site: Site, generator: torch.Generator) -> BrokenAdapter:
        if self.breaks == "seeds_decide_the_start":
            generator = torch.Generator()
        A = torch.randn(1, site.in_features, generator=generator)
        B = torch.zeros(site.out_features, 1)
        if self.breaks == "identity_at_start":
            B += 0.1
        if self.breaks == "base_bits_are_never_changed":
            site.parameter.data.mul_(1.001)
        if self.breaks == "layer_stays_what_and_where_it_is":
            site.layer.__class__ = type("Mine", (type(site.layer),), {})
        return BrokenAdapter(A, B, self.breaks)

    def parameter_count(self, site: Site) -> int:
        return site.in_features + site.out_features + (self.breaks == "parameter_count_is_as_declared")


class BrokenAdapter(LowRank):
    """Holds A (1 x in) and B (out x 1)."""

    method = "broken"

    def __init__(self, A: Tensor, B: Tensor, breaks: str) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.breaks, self.saved = breaks, 0
        if breaks == "every_factor_moves_within_two_steps":
            self.A.register_hook(torch.zeros_like)
        if breaks == "copies_and_pickles_work":
            self.not_picklable = lambda: None

    def change(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if self.breaks == "only_the_adapter_trains":
            site.parameter.requires_grad_()
        if self.breaks == "state_is_that_of_the_base_and_the_adapters_beside_it":
            site.layer.register_buffer("left_behind", torch.zeros(1))
        y = super().forward(x, site)
        if self.breaks == "forward_equals_reference":
            y = y + 1e-6 * self.B.sum()
        if self.breaks == "fold_is_the_forward_and_unfold_restores":
            y = 1.01 * y
        if self.breaks == "gradients_are_derivatives":
            y = y.detach() + 2 * (y - y.detach())
        if self.breaks == "dtype_is_kept":
            y = y.to(torch.promote_types(y.dtype, torch.float32))
        if self.breaks == "default_dtype_changes_nothing":
            y = y + torch.finfo(torch.get_default_dtype()).eps
        if self.breaks in ("traces_without_a_break", "compiles_without_a_break"):
            torch._dynamo.graph_break()
        if self.breaks == "stack_is_the_product_of_its_parts":
            y = y + (y - site(x)) * isinstance(getattr(site, "adapter", None), BrokenAdapter)
        return y

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        B, A = super().factors(W)
        return (B, 2 * A) if self.breaks == "factors_reproduce_the_change" else (B, A)

    def thin_factors(self, site: Site) -> Thin:
        wrong = self.breaks == "rows_of_a_batch_use_their_own_adapters"
        return Thin("beside", self.A.mT, (1.1 if wrong else 1.0) * self.B.mT)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.B.to(W.dtype) @ self.A.to(W.dtype)

    def penalty(self, site: Site) -> Tensor:
        return self.B.norm().log() if self.breaks == "penalty_is_a_finite_scalar" else super().penalty(site)

    def train(self, mode: bool = True) -> BrokenAdapter:
        return super().train(mode or self.breaks == "new_adapters_take_over_the_mode_of_their_layer")

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        state = super().peft_state(site)
        if self.breaks == "paths_are_those_of_the_base_whatever_is_around_it":
            self.saved += 1
            state["broken_B"] = state["broken_B"] + self.saved
        if self.breaks == "save_and_load_repeat_the_output":
            state["broken_B"] = state["broken_B"].bfloat16().float()
        return state


CAUGHT_BY = {
    "gradients_are_derivatives": GradcheckError,
    "traces_without_a_break": torch._dynamo.exc.Unsupported,
    "compiles_without_a_break": torch._dynamo.exc.Unsupported,
    "copies_and_pickles_work": (AttributeError, pickle.PicklingError),
}
"""What a law raises where that is no failed assertion."""


@pytest.mark.parametrize("law", LAWS)
def test_law_catches_a_method_that_breaks_it(law: str) -> None:
    with pytest.raises(CAUGHT_BY.get(law, AssertionError)):
        check_law(Broken, "linear", law, st.just(Broken(breaks=law)))


@pytest.mark.parametrize("law", LAWS)
def test_law_lets_the_same_method_pass_when_it_is_whole(law: str) -> None:
    check_law(Broken, "linear", law, st.just(Broken()))
