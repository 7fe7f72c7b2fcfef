"""Every registered method, on every layer kind that it declares, under every law."""

import pytest

from isotune.adapters.registry import method_class, method_names
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, NORM
from laws.suite import laws_of

test_law_holds = laws_of(*map(method_class, method_names()))


@pytest.mark.parametrize("name", method_names())
def test_method_declares_what_the_laws_need(name: str) -> None:
    method = method_class(name)
    assert method.name == name
    assert method.kinds
    assert method.kinds <= LINEAR | CONVOLUTIONS | EMBEDDING | NORM | {"block"}
    assert method.learning_rate > 0
    assert all(field.description for field in method.model_fields.values())
