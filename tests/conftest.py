"""Fixtures that all tests share: where the real text is, and a small corpus made by the project's own commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import forks

ROOT = Path(__file__).resolve().parents[1]
# What takes longest comes first: a worker that began with it at the end would leave the others nothing to do.
LONGEST = (
    *(
        "cluster/test_slurm",
        "cluster/test_ssh",
        "test_training",
        "test_benchmarks",
        "test_stopping",
        "test_experiments",
    ),
    *("test_pretrain_command", "test_readme", "test_install", "test_checkpoints", "test_architectures", "test_report"),
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads beyond the cores wait for each other, and burn what they wait
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # two ranks on a machine with one GPU, or none
os.environ.setdefault(forks.OWNER, str(os.getpid()))  # all workers of one pytest share the servers that fork


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command that runs in this process may tell its ranks by variables: they are not the next file's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and GLUE files beside the project; tests marked `data` skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder}")
    return folder
