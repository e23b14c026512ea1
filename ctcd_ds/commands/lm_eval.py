"""Asks causal models the tasks of EleutherAI's lm-evaluation-harness, on files that lie here, without fine-tuning.

The rows of TASK are DATA_DIR/TASK/SPLIT.jsonl, with the columns and the split names of the task's data set on the hub
(docs/evaluation.md lists them). Needs `pip install 'ctcd-ds[lm-eval]'`. Every model and task is done once: the same
command goes on where it was cut off. Scores also go into the cards (README.md) of models that `ctcd export` wrote.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctcd_ds import cli


def main() -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        required=True,
        metavar="DIR|NAME",
        help="directories of causal models of Hugging Face, or their names on the hub",
    )
    add(
        "--tasks",
        type=cli.names,
        required=True,
        metavar="A,B",
        help="of the harness: hellaswag,piqa,arc_easy,lambada,wikitext …; or the path of a task file, PATH.yaml",
    )
    add("--data_dir", type=Path, help="folder with hellaswag/validation.jsonl …")
    add("--output_dir", type=Path, required=True, help="for results.json")
    add("--num_fewshot", type=int, default=0, metavar="N", help="solved rows before each question")
    add("--batch_size", type=cli.positive, default=8, help="rows that go through a model together")
    add("--max_eval_samples", type=cli.positive, metavar="N", help="ask the first N rows of each task")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one model on one GPU, as `ctcd glue` has it
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a thousand draws of a bootstrap need no processes

    from ctcd_ds.evaluation import harness

    content = harness.run(
        models=options.model,
        tasks=options.tasks,
        data_dir=options.data_dir,
        output_dir=options.output_dir,
        settings=harness.HarnessSettings(options.num_fewshot, options.batch_size, options.max_eval_samples),
    )
    print(harness.table(content))
    print(f"\nresults in {options.output_dir}/results.json")
    return cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
