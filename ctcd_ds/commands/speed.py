"""Measures exported peers side by side on this machine: latency, throughput, size. Writes DIR/speed.json.

Models take turns and medians are compared, so that other work on the machine hits all of them alike. Threads on the CPU
are OMP_NUM_THREADS, else torch's choice.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctcd_ds import cli


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "--model", nargs="+", required=True, metavar="DIR", help="Hugging Face model directories; the first is the base"
    )
    add(
        "--batch_sizes",
        type=cli.whole_numbers,
        default="1,32",
        help="rows of a batch; 1 is the latency of a single request",
    )
    lengths = "tokens of a row; left out: 128, or what all models can read where that is less"
    add("--sequence_lengths", type=cli.whole_numbers, help=lengths)
    add("--device", choices=("cpu", "cuda"), help="left out: cuda where torch sees a GPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and computation")
    add("--seconds", type=float, default=20.0, help="seconds for each size of batch, at least 5 rounds")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="for speed.json")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports deepspeed, which else warns of no GPU
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise cli.UserError(f"--output_dir {options.output_dir} is a file")

    import torch

    from ctcd_ds.evaluation import speed

    for option in ("batch_sizes", "sequence_lengths"):
        if min(getattr(options, option) or [1]) < 1:
            raise cli.UserError(f"--{option}: whole numbers from 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype)
    paths = [Path(model) for model in options.model]
    found = speed.measure_speed(paths, options.batch_sizes, options.sequence_lengths, device, dtype, options.seconds)
    written = speed.write_speed(options.output_dir, found)
    print(speed.speed_table(found))
    print(f"\nrows in {written}")


if __name__ == "__main__":
    cli.run(main)
