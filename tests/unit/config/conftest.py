from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from moh_megatron.config.schema import Config


@pytest.fixture
def small(tiny_mapping: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The nested mapping of a small valid configuration of 100 steps."""
    return deepcopy(tiny_mapping)


@pytest.fixture(scope="session")
def configure(tiny: Callable[..., Config]) -> Callable[..., Config]:
    """configure({"parallel.tensor": 2, ...}): the small configuration with some values replaced."""
    return tiny
