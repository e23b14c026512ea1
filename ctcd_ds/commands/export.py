"""Exports one peer of a run, or all, to Hugging Face model directories, and compares logits before it says done."""

from __future__ import annotations

from pathlib import Path

from ctcd_ds import cli


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN or RUN/checkpoints/TAG")
    parser.add_argument("--peer", default="all", help="a peer's name, or all (then DIR/<peer>/ each)")
    parser.add_argument("--output_dir", type=Path, required=True, help="must be new or empty")
    parser.add_argument("--data_license", metavar="TEXT", help="licence of the training text, for the model cards")
    arguments = parser.parse_args()

    from ctcd_ds.export.hf import export

    source, target = arguments.checkpoint.resolve(), arguments.output_dir.resolve()
    exported = export(source, arguments.peer, target, arguments.data_license)
    for name, place in exported.items():
        print(f"exported {name} to {place}: reloaded, logits agree")
    where = ["--data_dir", "glue_data", "--output_dir", target.with_name("glue")]
    print(cli.next_command("glue", "--model", *exported.values(), *where))


if __name__ == "__main__":
    cli.run(main)
