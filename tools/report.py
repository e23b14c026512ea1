#!/usr/bin/env python
"""`ctcd report`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.report import main

if __name__ == "__main__":
    cli.run(main)
