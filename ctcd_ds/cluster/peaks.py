"""What GPUs do at best, as their makers state it."""

from __future__ import annotations

import re

# Dense matrix-multiply peaks in FLOP/s as the makers state them: (16-bit, fp32 without TF32).
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 31.5e12),
    "A10": (125e12, 31.2e12),
    "A40": (150e12, 37.4e12),
    "A6000": (155e12, 38.7e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}
# Words that make another GPU of a name in the table, or a part of one.
_NOT_IT = re.compile(r"\b(Ti|D|SUPER|Laptop|Max-Q|MIG|GRID)\b")


def stated_peak(name: str, precision: str) -> float | None:
    """FLOP/s of one GPU by its name, as its maker states it; None where the table does not know it.

    The first name of the table whose words stand in `name` counts: an L40 is no L4, an RTX A4000 no A40.
    """
    if _NOT_IT.search(name):
        return None
    known = next((peaks for words, peaks in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
    return None if known is None else known[precision == "fp32"]
