"""Servers that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.models import pair, talkative, trained
from helpers.server import Running, running

import dawhisper


@pytest.fixture(scope="module")
def random_server() -> Iterator[Running]:
    """Random models: one with and one without second branch."""
    models = {"plain": pair(eot_bias=6.0)[0], "dual": talkative(trained(dawhisper.DualOptions()), eot_bias=6.0)}
    with running(models, max_upload=2.0) as made:
        yield made


@pytest.fixture(scope="module")
def real_server(tiny_en_path: Path) -> Iterator[Running]:
    with running({"tiny.en": dawhisper.load_model(str(tiny_en_path), device="cpu")}, brief=False) as made:
        yield made
