"""Makes the demo's data without a download: English prose from the docstrings of the installed Python packages.

Writes text.txt (a paragraph a line, a blank line between documents) and glue/RTE/, a sentence-pair task in RTE's
file format from documents that are held out from text.txt (glue/RTE/README.txt says what it is).
"""

from __future__ import annotations

from pathlib import Path

from ctcd_ds import cli


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="for text.txt and glue/RTE")
    parser.add_argument("--size_megabytes", type=float, default=6.0, help="MB of text.txt; less where there is less")
    options = parser.parse_args()
    if not options.size_megabytes > 0:
        raise cli.UserError(f"--size_megabytes: {options.size_megabytes} is not above 0")

    from ctcd_ds.demo.data import make

    print(make(Path(options.output_dir), int(options.size_megabytes * 1e6)))
    return cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
