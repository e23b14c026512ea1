"""What libraries say while a run starts and goes on stands in RUN/logs, not between the lines meant for the user.

These are Python warnings and DeepSpeed's messages. DeepSpeed's own warnings and errors come to the console as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

FOLDER = "logs"  # in a run directory


@contextmanager
def library_log() -> Iterator[Callable[[Path, int], None]]:
    """Keeps what libraries say from here on; what it yields, called with a run directory and a rank, writes it there.

    To be entered before they are imported: importing is when they say most.
    """
    kept = MemoryHandler(capacity=2**16, flushLevel=logging.CRITICAL + 1)
    warned, deepspeed = logging.getLogger("py.warnings"), logging.getLogger("DeepSpeed")

    def write_to(run: Path, rank: int) -> None:
        with suppress(OSError):  # a run that cannot write says so better itself
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(run / FOLDER / f"rank-{rank}.log", encoding="utf-8")
            file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
            kept.setTarget(file)
            kept.flush()
            kept.capacity = 1  # from now on each message is written at once
            deepspeed.setLevel(logging.INFO)  # for the file; its handler for the console stays at WARNING

    logging.captureWarnings(True)
    warned.propagate = False
    for logger in (warned, deepspeed):
        logger.addHandler(kept)
    try:
        yield write_to
    finally:
        for logger in (warned, deepspeed):
            logger.removeHandler(kept)
        logging.captureWarnings(False)
        if kept.target is not None:
            kept.target.close()
        kept.close()
