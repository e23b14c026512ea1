#!/usr/bin/env python
"""`ctcd experiment`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.experiment import main

if __name__ == "__main__":
    cli.run(main)
