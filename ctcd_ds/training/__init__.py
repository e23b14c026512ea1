"""From a checked plan to a finished run. The only room that imports deepspeed."""

import os

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said before DeepSpeed looks around, finds none, and warns
