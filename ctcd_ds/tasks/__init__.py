"""The tasks: masked and causal language modelling, span corruption. A new one is one file here and one line below."""

from __future__ import annotations

from ctcd_ds.tasks.clm import CausalLM
from ctcd_ds.tasks.mlm import MaskedLM
from ctcd_ds.tasks.span import SpanCorruption
from ctcd_ds.tasks.task import Task

TASKS: dict[str, type[Task]] = {"mlm": MaskedLM, "clm": CausalLM, "span": SpanCorruption}
