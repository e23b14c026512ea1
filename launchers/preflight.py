#!/usr/bin/env python
"""`ctcd preflight`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.preflight import main

if __name__ == "__main__":
    cli.run(main)
