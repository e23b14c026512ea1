"""Every command starts as a user starts it: from another folder, with nothing imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, environment

SCRIPTS = sorted(path.relative_to(ROOT) for room in ("tools", "launchers") for path in (ROOT / room).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_true_start_knows_its_options(script: Path, tmp_path: Path) -> None:
    usage, wrong = f"usage: {script.name}", "error: --no_such_option: there is no such option"
    for option, code, stream, said in (("--help", 0, "stdout", usage), ("--no_such_option=1", 2, "stderr", wrong)):
        line = [sys.executable, str(ROOT / script), option]
        done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == code and said in getattr(done, stream), done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
