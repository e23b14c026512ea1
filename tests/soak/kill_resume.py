"""Kills a run again and again, at random and at the worst moments, and goes on with --resume until it is finished.

The end must be that of a run nobody touched: every logged loss and norm, and the final weights of each peer, bit for
bit. A kill is SIGKILL of one rank or of the launcher. Moments: any time (start-up too), right after a row of
metrics.jsonl, and inside a save.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import deepspeed, deepspeed_line, environment
from runs import ROOT, bert, chain_corpus, final_weights, metrics

MOMENTS = ("any time", "after a row", "inside a save")


def write_run(folder: Path, steps: int, precision: str) -> list[object]:
    """Corpus, a frozen teacher, recipe and config: dropout, accumulation, several epochs, frequent saves."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    corpus = chain_corpus(folder / "corpus")
    sizes = {key: value for key, value in bert(32, 1).items() if key != "model_type"}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(folder / "finished")
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder / "finished")
    recipe = {
        "corpus": {"path": str(corpus), "sequence_length": 32},
        "peers": {
            "master": {"pretrained": str(folder / "finished"), "frozen": True},
            "teacher": {"model": bert(96, 3), "soft": {"student": 1.0}},
            "student": {"model": bert(64, 2), "soft": {"teacher": 2.0, "master": 2.0}},
        },
        "training": {
            "global_batch_rows": 64,
            "steps": steps,
            "log_every": 1,
            "valid_every": 10,
            "checkpoint_every": 4,
            "keep_checkpoints": 2,
        },
    }
    config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}
    config |= {"bf16": {"enabled": True}} if precision == "bf16" else {}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text(json.dumps(config))
    return ["launchers/pretrain.py", "--recipe", folder / "recipe.json", "--deepspeed_config", folder / "d.json"]


class Launched:
    """`deepspeed …` in a session of its own: what is left of it can always be found and ended."""

    def __init__(self, line: list[object], ranks: int, log: Path) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                deepspeed_line(ranks, *line),
                env=environment(),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def victims(self) -> list[int]:
        """The processes that run pretrain.py: the launcher's two and the ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    same = os.getsid(int(entry.name)) == self.process.pid
                    if same and b"pretrain.py" in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except (OSError, ProcessLookupError):
                    continue
        return found

    def wait_until_gone(self, seconds: float) -> None:
        """Ranks whose launcher died save and leave by themselves. Fails where one is still there in the end."""
        end = time.monotonic() + seconds
        while left := self.victims():
            if time.monotonic() > end:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"processes {left} were left {seconds:g} s after the kill")
            time.sleep(0.1)
        self.process.wait()


def strike(launched: Launched, run: Path, moment: str, chance: random.Random) -> str:
    """Waits for the moment, kills one process; says which. Says 'the end' where the run was over before."""
    rows, end = _rows(run), time.monotonic() + chance.uniform(1.0, 14.0)
    after = rows + chance.randint(1, 12)
    while launched.process.poll() is None:
        if moment == "any time" and time.monotonic() > end:
            break
        if moment == "after a row" and _rows(run) >= after:
            break
        if moment == "inside a save" and list((run / "checkpoints").glob(".step-*.tmp")) and chance.random() < 0.5:
            time.sleep(chance.uniform(0, 0.03))
            break
        time.sleep(0.001)
    victims = launched.victims()
    if launched.process.poll() is not None or not victims:
        return "the end"
    pid = chance.choice(victims)
    os.kill(pid, signal.SIGKILL)
    return f"killed one of {len(victims)} processes"


def _rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def end_of(run: Path) -> dict[str, Any]:
    """All that must be equal: losses and norms of every step, held-out values, sha256 of each peer's weights."""
    rows = {
        step: {k: v for k, v in row.items() if k.startswith(("loss/", "grad_norm/", "lr/", "valid/"))}
        for step, row in metrics(run).items()
    }
    weights = {}
    for peer, state in final_weights(run).items():
        digest = hashlib.sha256()
        for key, tensor in sorted(state.items()):
            digest.update(key.encode() + tensor.detach().numpy().tobytes())
        weights[peer] = digest.hexdigest()
    return {"rows": rows, "weights": weights}


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first thing that is not equal, in words."""
    if expected["weights"] != found["weights"]:
        return f"weights: {expected['weights']} and {found['weights']}"
    for step, row in expected["rows"].items():
        # Right after a resume, a row is logged that an untouched run would not log; all shared ones are equal.
        for key, value in row.items():
            if found["rows"].get(step, {}).get(key) != value:
                return f"step {step}, {key}: {value} and {found['rows'].get(step, {}).get(key)}"
    return None


def soak(
    kills: int, ranks: int, steps: int, precision: str, seed: int, folder: Path, undisturbed: Callable[..., Any]
) -> int:
    """Runs the whole thing; returns the number of kills. Ends with SystemExit where a promise is broken.

    `undisturbed`: what launches a run that is left alone, as `commands.deepspeed`.
    """
    chance = random.Random(seed)
    line = write_run(folder, steps, precision)
    undisturbed(ranks, *line, "--output_dir", folder / "whole")
    expected, done, part = end_of(folder / "whole"), 0, 0
    while done < kills:
        run, resume = folder / f"run{part}", False
        while True:
            arguments = [*line, "--output_dir", run, *(["--resume"] if resume else [])]
            if done < kills:
                launched, moment = Launched(arguments, ranks, folder / f"run{part}.log"), chance.choice(MOMENTS)
                said = strike(launched, run, moment, chance)
                done += said != "the end"
                print(f"kill {done} of {kills} ({moment}, {_rows(run)} rows): {said}", flush=True)
                launched.wait_until_gone(300)
            else:
                undisturbed(ranks, *arguments)
            state = json.loads((run / "exit.json").read_text())["state"] if (run / "exit.json").exists() else None
            if state == "finished":
                break
            resume = run.exists() and any(run.iterdir())
        if wrong := difference(expected, end_of(run)):
            raise SystemExit(f"after {done} kills, {run} differs: {wrong}")
        print(f"run {part} is finished and equal to the untouched one, bit for bit", flush=True)
        part += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120, help="of one run; a finished one is followed by a new one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        how = (arguments.kills, arguments.ranks, arguments.steps, arguments.precision, arguments.seed)
        done = soak(*how, Path(name), deepspeed)
    print(f"{done} kills survived: {arguments.ranks} ranks, {arguments.precision}, seed {arguments.seed}")


if __name__ == "__main__":
    main()
