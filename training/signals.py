"""SIGTERM and SIGUSR1 ask a run to save and leave, so that a scheduler can start it again."""

import signal
from pathlib import Path
from types import FrameType

# the scripts exit with this status when rank 0 left the file below; sysexits.h's EX_TEMPFAIL: try again later
REQUEUE_STATUS = 75
REQUEUE_FILE = "requeue"


class StopRequest:
    """Remembers that a signal asked this process to stop; the loop looks once a step."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        return self.signal_name is not None


def leave_requeue_note(run_dir: Path, step: int) -> None:
    """Launchers turn every exit status into 1, so the request to be started again is a file of the run."""
    (run_dir / REQUEUE_FILE).write_text(f"{REQUEUE_STATUS}\nstopped by a signal after step {step}\n")


def clear_requeue_note(run_dir: Path) -> None:
    (run_dir / REQUEUE_FILE).unlink(missing_ok=True)
