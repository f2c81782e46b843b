"""Servers that the tests of a file share; imported by those fixtures alone, since streaming needs no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.models import pair, talkative, trained

import dawhisper

if TYPE_CHECKING:
    from helpers.server import Running


@pytest.fixture(scope="module")
def random_server() -> Iterator[Running]:
    """Random models: one with and one without second branch."""
    from helpers.server import running

    models = {"plain": pair(eot_bias=6.0)[0], "dual": talkative(trained(dawhisper.DualOptions()), eot_bias=6.0)}
    with running(models, max_upload=2.0) as made:
        yield made


@pytest.fixture(scope="module")
def real_server(tiny_en_path: Path) -> Iterator[Running]:
    from helpers.server import running

    with running({"tiny.en": dawhisper.load_model(str(tiny_en_path), device="cpu")}, brief=False) as made:
        yield made
