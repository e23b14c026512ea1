"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ctcd_ds.recipe.sections import ScheduleSection


def lr_factor(schedule: ScheduleSection, step: int, steps: int) -> float:
    """What every peer's lr is multiplied by in step `step` of 0 … steps − 1.

    Rises linearly over the warm-up steps, reaching 1 in the last of them; then falls to 0 at step `steps`, along
    a line or half a cosine, or stays.
    """
    warmup = round(schedule.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.type == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1.0 - done if schedule.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
