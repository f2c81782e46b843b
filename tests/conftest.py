"""Fixtures shared by all tests: real weights when there are any, the asset clips, and torch's thread count."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.sound import write_clips

from dawhisper.model import ModelDimensions, Whisper

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS_VARIABLE = "DAWHISPER_TEST_WEIGHTS"


def pytest_configure() -> None:
    # The models of the tests are tiny: more threads only wait for each other. Two processes share two cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of what the tests start
        torch.set_num_threads(1)
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is made


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what torch and the others consist of is not looked through again in every collection


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder with OpenAI checkpoints (base.pt, tiny.en.pt); without it the tests on real weights are skipped."""
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if not folder:
        pytest.skip(f"set {WEIGHTS_VARIABLE} to a folder with base.pt and tiny.en.pt to test with real weights")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"{WEIGHTS_VARIABLE}={folder} is not a folder")
    return path


def checkpoint(weights: Path, name: str) -> Path:
    path = weights / name
    if not path.is_file():
        pytest.skip(f"no {name} in {weights}: put OpenAI's file there to run this test")
    return path


@pytest.fixture(scope="session")
def base_path(weights: Path) -> Path:
    """OpenAI's multilingual `base` checkpoint."""
    return checkpoint(weights, "base.pt")


@pytest.fixture(scope="session")
def tiny_en_path(weights: Path) -> Path:
    """OpenAI's English-only `tiny.en` checkpoint."""
    return checkpoint(weights, "tiny.en.pt")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The project's own small clips."""
    return ROOT / "assets"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint in OpenAI's format, and manifests."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(80, 100, 32, 2, 3, 51865, 64, 32, 2, 3))
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, folder / "tiny.pt")
    return {
        "model": folder / "tiny.pt",
        "train": write_clips(folder / "train", 12, seed=1),
        "dev": write_clips(folder / "dev", 3, seed=2),
        "noise": write_clips(folder / "noise", 3, seed=3),
    }
