#!/usr/bin/env python
"""`ctcd tokenizer`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.tokenizer import main

if __name__ == "__main__":
    cli.run(main)
