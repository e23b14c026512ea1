#!/usr/bin/env python
"""`ctcd lm-eval`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.lm_eval import main

if __name__ == "__main__":
    cli.run(main)
