#!/usr/bin/env python
"""`ctcd export`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.export import main

if __name__ == "__main__":
    cli.run(main)
