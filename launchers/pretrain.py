#!/usr/bin/env python
"""`ctcd pretrain`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.pretrain import main

if __name__ == "__main__":
    cli.run(main)
