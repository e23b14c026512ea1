#!/usr/bin/env python
"""`ctcd glue`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.glue import main

if __name__ == "__main__":
    cli.run(main)
