#!/usr/bin/env python
"""`ctcd submit`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.submit import main

if __name__ == "__main__":
    cli.run(main)
