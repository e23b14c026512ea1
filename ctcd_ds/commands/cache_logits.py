"""Writes down what a finished teacher predicts at all that a recipe asks: to be read as a frozen peer without a model.

A few drawn tokens of each prediction are kept, which give the same gradient on average. The recipe is that of the run
with the teacher as a frozen peer; the cache then stands in its place (cached_teachers).
The same command goes on after a kill. Runs on the GPU where there is one, with the micro-batch and the precision of the
DeepSpeed config.
"""

from __future__ import annotations

from ctcd_ds import cli
from ctcd_ds.recipe.reading import load_recipe


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_run_options(parser, "the directory of the cache")
    parser.add_argument("--peer", required=True, help="which frozen peer of the recipe")
    parser.add_argument(
        "--draws", type=cli.positive, default=64, help="tokens kept a position: 2 bytes each, 4 beyond 65,536 tokens"
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    place = arguments.output_dir.resolve()

    import torch

    from ctcd_ds.cluster.ranks import find_ranks
    from ctcd_ds.corpus.damage import refuse_damage
    from ctcd_ds.peers.build import quiet_transformers
    from ctcd_ds.training.caching import refuse_recipe, write_cache
    from ctcd_ds.training.deepspeed_config import read_config
    from ctcd_ds.training.engine import device_type
    from ctcd_ds.training.plan import make_plan

    ranks = find_ranks()
    if ranks.world > 1:
        raise cli.UserError(f"this is one of {ranks.world} ranks: a cache is written by one process; start it alone")
    torch.set_num_threads(ranks.threads())
    refuse_recipe(recipe, arguments.peer, place)
    plan = make_plan(recipe, read_config(arguments.deepspeed_config), 1, device_type(), place)
    for corpus in plan.corpus.parts.values():
        refuse_damage(corpus.path)
    with quiet_transformers():
        cache = write_cache(plan, arguments.peer, arguments.draws, place, torch.device(device_type()))
    print(f"{place}: {cache.rows:,} rows, {cache.describe(recipe.corpus.sequence_length)}")
    said = ["--recipe", arguments.recipe, "--deepspeed_config", arguments.deepspeed_config, "--output_dir", "RUN"]
    changed = [f"peers.{arguments.peer}=null", f"cached_teachers.{arguments.peer}={place}"]
    print(cli.next_command("pretrain", *said, "--set", *arguments.set, *changed))


if __name__ == "__main__":
    cli.run(main)
