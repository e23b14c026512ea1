"""Trains a tokenizer on your text: WordPiece as BERT has it, SentencePiece unigram or BPE, or GPT-2's byte-level BPE.

All but byte_bpe have the special tokens of a masked language model, and serve a causal one as well; byte_bpe has
<|endoftext|> only, for causal ones.

--output_dir becomes a Hugging Face tokenizer directory, for AutoTokenizer.from_pretrained(DIR) and for
`ctcd corpus --tokenizer DIR`. The SentencePiece types leave their native model there too (spiece.model).
The same text and options give the same tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from ctcd_ds import cli
from ctcd_ds.corpus import options, sources, tokenizer_training
from ctcd_ds.corpus.prepare import chosen_texts


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="F", help=f"{sources.READABLE}; globs")
    parser.add_argument("--type", choices=tokenizer_training.TYPES, default="wordpiece", help="what to train")
    parser.add_argument("--vocab_size", type=int, default=30522, help="tokens, the special ones included")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new directory")
    parser.add_argument(
        "--lowercase",
        type=options.true_or_false,
        metavar="true|false",
        help="fold case (default: true; byte_bpe: false)",
    )
    parser.add_argument(
        "--byte_fallback",
        type=options.true_or_false,
        default=False,
        metavar="true|false",
        help="unigram, bpe: characters that are no piece become their bytes, and nothing is unknown",
    )
    parser.add_argument(
        "--sentinels",
        type=int,
        default=0,
        help="<extra_id_0>, … of the --vocab_size tokens, for span corruption (T5: 100)",
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="train on this share of the documents")
    parser.add_argument("--seed", type=int, default=1, help="decides which documents --fraction takes")
    options.add_reading_options(parser)
    arguments = parser.parse_args()
    reading = options.reading(arguments)
    texts = chosen_texts(
        sources.find_sources(arguments.input, reading.format), reading, arguments.fraction, arguments.seed
    )
    lowercase = arguments.type != "byte_bpe" if arguments.lowercase is None else arguments.lowercase
    tokenizer_training.train_tokenizer(
        arguments.type,
        texts,
        arguments.vocab_size,
        lowercase,
        arguments.output_dir,
        arguments.byte_fallback,
        arguments.sentinels,
    )
    print(f"{arguments.output_dir}: {arguments.type} tokenizer, {arguments.vocab_size} tokens")


if __name__ == "__main__":
    cli.run(main)
