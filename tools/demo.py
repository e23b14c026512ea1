#!/usr/bin/env python
"""`ctcd demo`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.demo import main

if __name__ == "__main__":
    cli.run(main)
