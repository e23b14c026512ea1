#!/usr/bin/env python
"""`ctcd speed`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.speed import main

if __name__ == "__main__":
    cli.run(main)
