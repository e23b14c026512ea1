#!/usr/bin/env python
"""`ctcd corpus`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.corpus import main

if __name__ == "__main__":
    cli.run(main)
