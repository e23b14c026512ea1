#!/usr/bin/env python
"""`ctcd cache-logits`, from a checkout."""

from ctcd_ds import cli
from ctcd_ds.commands.cache_logits import main

if __name__ == "__main__":
    cli.run(main)
