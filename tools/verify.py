#!/usr/bin/env python
"""`ctcd verify`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.verify import main

if __name__ == "__main__":
    cli.run(main)
