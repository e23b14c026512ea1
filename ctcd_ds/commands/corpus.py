"""Makes a corpus of your text: token shards that training (and Megatron) reads, with a manifest and the tokenizer.

A run that was killed goes on when the same command is given again. The corpus is the same for any --workers.
With --adopt in place of --input, it takes over .bin/.idx pairs that Megatron's own preprocess_data made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.corpus import options, sources
from ctcd_ds.corpus.prepare import Settings, cores, prepare
from ctcd_ds.recipe.mistakes import set_name_mistake


def main() -> None:
    default = Settings()
    parser = cli.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", nargs="+", metavar="F", help=f"{sources.READABLE}; globs")
    what.add_argument("--adopt", nargs="+", metavar="PREFIX", help="PREFIX.bin and PREFIX.idx that Megatron made")
    parser.add_argument(
        "--tokenizer", required=True, help="a tokenizer directory, BERT vocab.txt, SentencePiece .model, or hub name"
    )
    parser.add_argument(
        "--lowercase",
        type=options.true_or_false,
        metavar="true|false",
        help="for a vocab.txt; left out: true where it holds no capital letter",
    )
    parser.add_argument(
        "--add_special_tokens",
        type=options.true_or_false,
        default=True,
        metavar="true|false",
        help="a .model gets what a masked language model needs and it lacks; false leaves it as it is, for causal ones",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the corpus directory to make")
    parser.add_argument("--workers", type=int, default=cores(), help="threads that tokenise")
    parser.add_argument("--fraction", type=float, default=default.fraction, help="share of the documents to take")
    parser.add_argument("--valid_fraction", type=float, default=default.valid_fraction, help="share of those held out")
    parser.add_argument(
        "--valid_input",
        nargs="+",
        default=[],
        metavar="NAME=F",
        help="held-out sets of other text, measured as valid/NAME/PEER/loss; a NAME may come several times",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="decides which documents these are")
    parser.add_argument(
        "--shard_megabytes", type=float, default=default.shard_megabytes, help="2**20 characters of text in a shard"
    )
    options.add_reading_options(parser)
    arguments = parser.parse_args()
    settings = Settings(
        seed=arguments.seed,
        fraction=arguments.fraction,
        valid_fraction=arguments.valid_fraction,
        shard_megabytes=arguments.shard_megabytes,
    )
    sets = held_out_sets(arguments.valid_input)
    if arguments.adopt:
        if sets:
            raise cli.UserError("--valid_input is text for --input; with --adopt it cannot be read")
        from ctcd_ds.corpus.adopt import adopt

        adopt(
            arguments.adopt,
            arguments.tokenizer,
            arguments.output_dir,
            settings,
            arguments.lowercase,
            arguments.add_special_tokens,
        )
    else:
        prepare(
            arguments.input,
            arguments.tokenizer,
            arguments.output_dir,
            settings,
            options.reading(arguments),
            lowercase=arguments.lowercase,
            workers=arguments.workers,
            add_special_tokens=arguments.add_special_tokens,
            valid_inputs=sets,
        )
    files = ["--recipe", "R.yaml", "--deepspeed_config", "D.json", "--output_dir", "RUN", "--dry_run"]
    print(cli.next_command("pretrain", *files, "--set", f"corpus.path={arguments.output_dir}"))


def held_out_sets(given: Sequence[str]) -> dict[str, list[str]]:
    """NAME → what is to be read, of words NAME=F. Raises UserError."""
    sets: dict[str, list[str]] = {}
    for word in given:
        name, equals, source = word.partition("=")
        if not equals or not source:
            raise cli.UserError(f"--valid_input {word}: write NAME=FILE, e.g. news=news.txt")
        if said := set_name_mistake(name):
            raise cli.UserError(f"--valid_input {word}: {said}")
        sets.setdefault(name, []).append(source)
    if same := cli.one_folder(sets):
        raise cli.UserError(f"--valid_input: {same} would be one file where a disk does not tell capitals; rename one")
    return sets


if __name__ == "__main__":
    cli.run(main)
