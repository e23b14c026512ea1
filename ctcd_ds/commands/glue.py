"""Fine-tunes models on GLUE or on your own tasks and compares them: a table, results.json, GLUE submissions.

--task_files brings tasks of your own (YAML, see docs/evaluation.md) and AdvGLUE's dev.json. A set that names a base,
like AdvGLUE's, is scored by the models fine-tuned on that task. Scores also go into the cards (README.md) of models
that `ctcd export` wrote.

Every model, task and seed is done once: the same command goes on where it was cut off; tasks and seeds may be
added later. Nothing is downloaded unless --data_dir is 'hub' or a model is named that is no directory here.
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
        help="directories of Hugging Face models, or their names on the hub; the first is the base",
    )
    add(
        "--tasks",
        type=cli.names,
        default="all",
        help="of cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte,wnli,ax; all: those whose files are there",
    )
    add("--data_dir", metavar="DIR|hub", help="folder with CoLA/train.tsv …, or 'hub' for nyu-mll/glue")
    add("--task_files", nargs="+", default=[], metavar="PATH", help="task.yaml, its folder, or AdvGLUE's dev.json")
    add(
        "--no_finetune_on",
        type=cli.names,
        default="",
        metavar="NAMES",
        help="tasks of files that are only scored, by the models of their base",
    )
    add("--output_dir", required=True, metavar="DIR", help="for results.json, submissions/ and models/")
    add("--seeds", type=cli.whole_numbers, default="1", help="one fine-tuning for each")
    add("--epochs", type=float, default=3.0, help="passes over the training rows")
    add("--learning_rate", type=float, default=5e-5, help="the peak, after 10 %% of the steps; then linear to 0")
    add("--batch_size", type=int, default=32, help="training rows of a step")
    add("--max_length", type=int, default=128, help="tokens of a row, at most what the model has positions for")
    add(
        "--train_examples",
        type=cli.whole_numbers,
        default=[],
        metavar="N,N",
        help="fine-tune on N rows, once for each N: drawn by the seed, evenly by label, the same for every model",
    )
    add("--max_train_samples", type=int, metavar="N", help="train on N rows drawn at random (the same for all)")
    add("--max_eval_samples", type=int, metavar="N", help="measure on N dev rows; then no submission is written")
    add("--keep_models", action="store_true", help="keep the fine-tuned models in OUTPUT_DIR/models")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread a batch over all GPUs

    from ctcd_ds.evaluation import glue, results
    from ctcd_ds.evaluation.finetune import FinetuneSettings

    content = glue.run(
        models=options.model,
        tasks=tuple(options.tasks),
        data_dir=options.data_dir,
        output_dir=Path(options.output_dir),
        seeds=options.seeds,
        settings=FinetuneSettings(
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            max_length=options.max_length,
            max_train_samples=options.max_train_samples,
            max_eval_samples=options.max_eval_samples,
        ),
        keep_models=options.keep_models,
        task_files=[Path(path) for path in options.task_files],
        no_finetune_on=options.no_finetune_on,
        train_examples=options.train_examples,
    )
    print(results.score_table(content))
    print(f"\nresults in {options.output_dir}/results.json")
    print(cli.next_command("speed", "--model", *options.model, "--output_dir", Path(options.output_dir) / "speed"))
    return cli.EXIT_DONE


if __name__ == "__main__":
    cli.run(main)
