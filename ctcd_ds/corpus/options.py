"""The command-line options that `ctcd tokenizer` and `ctcd corpus` share."""

from __future__ import annotations

import argparse

from ctcd_ds.corpus.sources import Reading


def true_or_false(word: str) -> bool:
    """The value of an option such as `--lowercase true`."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how sources become documents."""
    default = Reading()
    group = parser.add_argument_group("how the input is read")
    group.add_argument(
        "--text_layout",
        choices=("paragraphs", "lines"),
        default=default.text_layout,
        help="txt: a document ends at a blank line (its lines stay joined by newlines), or with its line",
    )
    group.add_argument(
        "--format",
        choices=("txt", "jsonl", "parquet"),
        help="of files whose names do not end in one (default: by name)",
    )
    group.add_argument(
        "--text_field",
        default=default.text_field,
        help="jsonl, parquet, datasets: the field that holds the text; meta.text is the field text of meta",
    )
    group.add_argument("--dataset_config", default=None, help="hub datasets: the configuration, such as 20231101.en")
    group.add_argument("--dataset_split", default=default.dataset_split, help="datasets: the split to read")


def reading(arguments: argparse.Namespace) -> Reading:
    """The Reading that the parsed options say."""
    return Reading(
        text_field=arguments.text_field,
        text_layout=arguments.text_layout,
        format=arguments.format,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
    )
