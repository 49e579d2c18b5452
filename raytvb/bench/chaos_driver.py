"""The driver of an experiment: a process that is started again until it has done its work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from raytvb.bench.chaos_processes import Family
from raytvb.errors import UserError

RUN = """
import sys
from raytvb import load_experiment, run
run(load_experiment(sys.argv[1]), ("finetune", "basis"))
"""
"""Everything up to the bases, in one run, as `raytvb run` does it."""

FAILURES = 5
"""A driver that fails so often by itself, without having been killed in between, is given up."""


class Driver:
    """Runs the stages `finetune` and `basis` of an experiment file."""

    def __init__(self, file: Path, environment: Mapping[str, str], log: Path) -> None:
        """Starts the process. environment: names the cluster in RAY_ADDRESS.

        log: gets the driver's output, of all starts.
        """
        self._command = [sys.executable, "-c", RUN, str(file)]
        self._environment, self._log = dict(environment), log
        self._log_start = 0
        self.failures: list[str] = []
        """The last line of output of each start that failed by itself."""
        self._in_a_row = 0
        self._start()

    def _start(self) -> None:
        with open(self._log, "ab") as log:
            self._log_start = log.tell()
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this benchmark only
            )
        self._family = Family(process)

    def is_done(self) -> bool:
        """Whether the driver has succeeded. If it failed, starts it again, as a user would.

        Raises UserError with the end of the output if it fails again and again.
        """
        code = self._family.process.poll()
        if code is None:
            return False
        if code == 0:
            return True
        output = self._log.read_bytes()[self._log_start :]
        lines = output.decode(errors="replace").splitlines()
        self.failures.append(lines[-1] if lines else f"exit code {code}")
        self._in_a_row += 1
        if self._in_a_row == FAILURES:
            end = "\n".join(lines[-40:])
            raise UserError(f"the run failed {FAILURES} times in a row, the last time with\n{end}")
        self._start()
        return False

    @property
    def is_running(self) -> bool:
        """Whether there is a process to kill."""
        return self._family.process.poll() is None

    def kill(self) -> None:
        """SIGKILL the driver, and start it again at once."""
        self._in_a_row = 0
        self.close()
        self._start()

    def close(self) -> None:
        """End the process."""
        self._family.kill()
