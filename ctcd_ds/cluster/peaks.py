"""What GPUs do at best, as their makers state it."""

from __future__ import annotations

# Dense matrix-multiply peaks in FLOP/s as the makers state them: (16-bit, fp32 without TF32). The first name that is
# part of the device's name counts.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
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


def stated_peak(name: str, precision: str) -> float | None:
    """FLOP/s of one GPU by its name, as its maker states it; None where the table does not know it."""
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    return None if known is None else known[precision == "fp32"]
