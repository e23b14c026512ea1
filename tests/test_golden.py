"""The numbers of six small runs are what they were: a change of structure moves none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden import values


def test_losses_norms_and_held_out_values_are_what_they_were(tmp_path: Path) -> None:
    """Stored values of another processor: equal to 1e-6. Weight hashes are for comparisons on one machine."""
    stored = json.loads(Path(__file__).with_name("golden.json").read_text())
    found = values(tmp_path)
    assert found.keys() == stored.keys()
    for name, run in found.items():
        for step, (now, then) in enumerate(zip(run["rows"], stored[name]["rows"], strict=True), start=1):
            assert now == pytest.approx(then, rel=1e-6, abs=1e-6), f"{name}, step {step}"
