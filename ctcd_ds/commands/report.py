"""Makes a page of one experiment or of any runs: findings in plain words, learning curves, tables, settings.

ctcd report runs/ctcd runs/teacher_alone runs/student_alone --output_dir runs/report

One HTML file that needs no network, and its pictures as PNG files beside it. Runs that differ by their seed only are
taken together; each peer is compared to itself alone where such a run is given.
"""

from __future__ import annotations

from pathlib import Path

from ctcd_ds import cli


def main() -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="RUN|EXPERIMENT", help="run directories, or one experiment's directory")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="for report.html and the pictures")
    add(
        "--agreement_rows",
        type=int,
        default=256,
        metavar="N",
        help="held-out rows on which the peers' answers are compared; 0 leaves it out",
    )
    add("--speed", type=Path, metavar="DIR", help="what `ctcd speed` wrote; left out: EXPERIMENT/speed, if there")
    options = parser.parse_args()
    if options.agreement_rows < 0:
        raise cli.UserError(f"--agreement_rows {options.agreement_rows}: must be 0 or more")

    from ctcd_ds.experiments.report.build import write_report

    page = write_report(options.paths, options.output_dir, options.agreement_rows, options.speed)
    print(f"report in {page}")
    return cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
