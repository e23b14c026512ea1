"""What a bare GPU machine lacks, as a folder of wheels: made where pip reaches an index, used where nothing does.

Only the standard library is imported here: it runs before anything is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Beside torch and transformers, which a GPU machine has: what we and DeepSpeed import.
PACKAGES = ("deepspeed", "hjson", "pydantic", "pydantic_core", "annotated-types", "typing-inspection")
PACKAGES += ("typing_extensions", "ruamel.yaml", "ClusterShell", "datasets", "multiprocess", "dill")
PACKAGES += ("xxhash", "zstandard")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
_FROM_SOURCE = (
    "deepspeed",
    "ClusterShell",
)  # there are no wheels of them on the index; pure Python as they are used here


def make(folder: Path, python: str) -> None:
    """Fills `folder` with wheels of this environment's versions for x86-64 Linux and a Python such as '3.12'.

    Raises CalledProcessError where pip cannot, with pip's words on stderr, and PackageNotFoundError where a package
    is not installed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wanted = {name: f"{name}=={version(name)}" for name in PACKAGES}
    sources = [wanted[name] for name in _FROM_SOURCE]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *sources]
    subprocess.run([*pip, *built], check=True, cwd=folder)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    ready = [spec for name, spec in wanted.items() if name not in _FROM_SOURCE]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(folder), *target, *ready], check=True)


def use(folder: Path) -> None:
    """Installs the wheels into a temporary folder and starts this process again with them; once is enough."""
    if "CTCD_WHEELS" in os.environ:
        return
    site = tempfile.mkdtemp(prefix="ctcd-wheels-")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        site,
    ]
    subprocess.run([*pip, "--target", site, *map(str, sorted(folder.glob("*.whl")))], check=True)
    paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"CTCD_WHEELS": site, "PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
