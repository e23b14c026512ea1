"""CTCD-DS: language models that are trained together and teach each other (arXiv 2311.02849), on DeepSpeed.

For your own training loop (docs/own_loop.md): `CoTraining` holds the peers, `DistillationGraph` says who learns from
whom, `Batch` is what they are asked, `Losses` what comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctcd_ds.objective.batch import Batch, View
    from ctcd_ds.objective.fused import Losses
    from ctcd_ds.objective.graph import DistillationGraph
    from ctcd_ds.peers.cotrain import CoTraining

__version__ = "0.1.0"
__all__ = ["Batch", "CoTraining", "DistillationGraph", "Losses", "View"]

_MODULES = {
    "Batch": "ctcd_ds.objective.batch",
    "View": "ctcd_ds.objective.batch",
    "Losses": "ctcd_ds.objective.fused",
    "DistillationGraph": "ctcd_ds.objective.graph",
    "CoTraining": "ctcd_ds.peers.cotrain",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: `ctcd --help` needs no torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
