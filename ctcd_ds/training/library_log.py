"""What libraries say while a run starts and goes on stands in RUN/logs, not between the lines meant for the user.

These are Python warnings and DeepSpeed's messages. DeepSpeed's own warnings and errors come to the console as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path


@contextmanager
def library_log() -> Iterator[Callable[[Path, int], None]]:
    """Keeps what libraries say from here on; what it yields, called with a run directory and a rank, says where to.

    To be entered before they are imported: importing is when they say most. A run that never begins has no log.
    """
    kept, before = _Kept(), logging.raiseExceptions
    warned, deepspeed = logging.getLogger("py.warnings"), logging.getLogger("DeepSpeed")

    def write_to(run: Path, rank: int) -> None:
        kept.place = run, rank
        deepspeed.setLevel(logging.INFO)  # for the file; its handler for the console stays at WARNING

    logging.raiseExceptions = False  # a full disk is the checkpoint's to tell
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
        logging.raiseExceptions = before
        kept.flush()
        if kept.target is not None:
            kept.target.close()
        kept.close()


class _Kept(MemoryHandler):
    """Messages, in memory until the run has begun and can be written to."""

    def __init__(self) -> None:
        super().__init__(capacity=1)
        self.place: tuple[Path, int] | None = None  # run directory, rank

    def flush(self) -> None:
        if self.target is None and self.place is not None:
            run, rank = self.place
            with suppress(OSError):
                if (run / "recipe.yaml").exists():  # the first file of a run
                    (run / "logs").mkdir(exist_ok=True)
                    file = logging.FileHandler(run / "logs" / f"rank-{rank}.log", encoding="utf-8")
                    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
                    self.setTarget(file)
        super().flush()
