"""All laws, and the one function that makes a test of them for given methods.

A test file puts its own method under every law with one line: `test_law = laws_of(MyMethod)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis.strategies import SearchStrategy

from isotune import Settings
from laws import lifecycle, placement, statements
from laws.case import Case, drawn_case, registered
from laws.exemptions import EXEMPT
from laws.layers import KINDS, fits
from laws.options import drawn_settings

Law = Callable[[Case], None]

LAWS: dict[str, Law] = {law.__name__: law for law in (*statements.LAWS, *lifecycle.LAWS, *placement.LAWS)}

# Examples of the laws whose examples are slow; the others get the profile's number.
EXAMPLES = {
    "traces_without_a_break": 2,
    "dtype_is_kept": 4,
    "compiles_without_a_break": 2,
    "gradients_are_derivatives": 6,
    "layer_stays_what_and_where_it_is": 4,
    "paths_are_those_of_the_base_whatever_is_around_it": 3,
    "new_adapters_take_over_the_mode_of_their_layer": 3,
}


def laws_of(*methods: type[Settings]) -> Callable[..., None]:
    """A test that puts each method under each law, on each layer kind that it declares."""
    cases, families = [], set()
    for method in methods:
        family = method.__module__.rpartition(".")[0]
        kinds = [kind for kind in KINDS if fits(kind, method.kinds)]
        for kind in kinds:
            # They take a second: with the thorough tests, but for the first method of a family, or kind of a method.
            for law in LAWS:
                rare = law == "compiles_without_a_break" and family in families
                rare |= law == "traces_without_a_break" and kind != kinds[0]
                marks = [pytest.mark.thorough] if rare else []
                cases.append(pytest.param(method, kind, law, id=f"{method.name}-{kind}-{law}", marks=marks))
        families.add(family)

    @pytest.mark.parametrize(("method", "kind", "law"), cases)
    def test_law(method: type[Settings], kind: str, law: str) -> None:
        unknown = method.exempt.keys() - LAWS.keys()
        assert not unknown, f"{method.name} is exempt from what is no law: {unknown}"
        if law in method.exempt:
            pytest.skip(f"{EXEMPT}{method.name} from {law}: {method.exempt[law]}")
        check_law(method, kind, law)

    return test_law


def check_law(method: type[Settings], kind: str, law: str, options: SearchStrategy[Settings] | None = None) -> None:
    """Put one method under one law on one layer kind, over drawn options, layers, inputs and seeds."""
    count = EXAMPLES.get(law, profile().max_examples)
    with registered(method):
        for case in _cases(method, kind, options)[:count]:
            try:
                LAWS[law](case)
            except Exception:
                _put_to(LAWS[law], method, kind, options)  # draws the same again, and looks for a smaller case
                raise


@cache
def _cases(method: type[Settings], kind: str, options: SearchStrategy[Settings] | None) -> list[Case]:
    """Drawn once for all laws: what is drawn does not depend on the law."""
    cases: list[Case] = []
    _put_to(cases.append, method, kind, options)
    return cases


def _put_to(law: Law, method: type[Settings], kind: str, options: SearchStrategy[Settings] | None) -> None:
    @given(drawn_case(kind, drawn_settings(method) if options is None else options, method.kinds))
    def hold(case: Case) -> None:
        law(case)

    hold()
