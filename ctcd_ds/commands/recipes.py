"""Lists the recipes, experiments and DeepSpeed configurations that come with the package, or copies them to edit.

ctcd recipes --output_dir configs
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import ctcd_ds
from ctcd_ds import cli

SHIPPED = Path(ctcd_ds.__file__).with_name("ds_configs")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output_dir", type=Path, help="copies them all into this new directory")
    target = parser.parse_args().output_dir
    if target is None:
        print(*_listed(), sep="\n")
    elif target.exists():
        raise cli.UserError(f"--output_dir {target} exists already: name a new directory")
    else:
        shutil.copytree(SHIPPED, target)
        print(f"copied to {target}: start with `ctcd pretrain --recipe {target / 'recipes' / 'paper.yaml'} …`")


def _listed() -> Iterator[str]:
    """A line for each file: its name below the copy, and the first sentence of its comment."""
    files = sorted(path for path in SHIPPED.rglob("*") if path.suffix in (".yaml", ".json"))
    for path in files:
        comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        first_sentence = re.split(r"(?<=[.?]) ", " ".join(line.removeprefix("# ") for line in comment))[0]
        yield f"{path.relative_to(SHIPPED)!s:<36}{first_sentence}".rstrip()


if __name__ == "__main__":
    cli.run(main)
