"""docs/distil_an_encoder.md: its commands, run as they stand there on a small encoder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import forks
from commands import ROOT, environment
from glue_files import BAD, GOOD, write_glue, write_model
from runs import metrics

SMALLER = ("training.epochs=null", "training.steps=6", "training.global_batch_rows=8", "training.log_every=1")


def test_an_encoder_is_distilled_by_the_pages_commands(tmp_path: Path) -> None:
    """From an encoder of twelve layers to one of six, and a table with both. One rank, in fp32."""
    for name in ("tools", "launchers", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_model(tmp_path / "encoder", hidden_size=24, num_hidden_layers=12, max_position_embeddings=128)
    (tmp_path / "text").mkdir()
    documents = [" ".join((*GOOD[n % 5 :], *BAD[n % 7 :], "it", "was", "a", ".")) * 20 for n in range(60)]
    (tmp_path / "text" / "some.txt").write_text("\n\n".join(documents))
    write_glue(tmp_path / "glue_data")
    block = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "distil_an_encoder.md").read_text(), re.DOTALL)
    assert block is not None
    said = ""
    for line in block[1].replace("zero2_bf16.json", "cpu.json").strip().splitlines():
        starter, *words = shlex.split(line.replace("--tasks all", "--tasks rte --epochs 1"))
        words += ["--set", *SMALLER] if starter == "deepspeed" else []
        done = forks.run(words, environment(), tmp_path)
        said += f"$ {line}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, said[-4000:]
    assert "learns from teacher            weight 1: hidden states (even)" in said
    rows = metrics(tmp_path / "runs" / "small")
    assert rows[6].keys() >= {f"loss/student/{kind}" for kind in ("hard", "soft/teacher", "hidden/teacher")}
    assert rows[6]["loss/student/relations/teacher"] > 0
    from transformers import AutoModelForMaskedLM

    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "runs" / "small" / "hf").config.num_hidden_layers == 6
    results = json.loads((tmp_path / "runs" / "small" / "glue" / "results.json").read_text())
    assert len(results["models"]) == 2
