"""Sends committed vectors to the basis actor while fine-tuning goes on."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from raytvb.bases.messages import BuilderStatus, WrittenBases
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.orchestration.failures import Failure, explain
from raytvb.orchestration.ray_actors import basis_actors
from raytvb.orchestration.ray_tasks import patiently

ATTEMPTS = 30
"""How often a call is repeated, once a second, while an actor is being restarted."""

BATCH = 32
"""Most vectors in one call. The actor reads its earlier vectors once a call, not once a vector."""


class Stream:
    """Feeds committed vectors to the basis actor, with one call in flight.

    Calls that overlap could run out of order when the actor is restarted.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._actor, self._actors = basis_actors(experiment)
        self._waiting: list[str] = []
        self._call: Any = None
        self._sent: list[str] = []
        self._unavailable = 0
        self.offered = set[str]()
        """The tasks whose vectors were offered."""
        self.failed: dict[str, Failure] = {}
        """Tasks whose vectors cannot be used, with the reason."""
        self.errors: dict[str, Failure] = {}
        """Failures of the actor itself, by the tasks that it was to take in."""
        self.status = BuilderStatus()
        """The last status that the actor returned."""

    def offer(self, task: str) -> None:
        """Queue a committed vector to be sent to the actor."""
        self.offered.add(task)
        self._waiting.append(task)
        self.pump()

    def pump(self, timeout: float = 0.0) -> None:
        """If the call in flight has been answered, take its answer and send the queued vectors.

        timeout: seconds to wait for the answer.
        """
        if self._call is not None and ray.wait([self._call], timeout=timeout)[0]:
            self._take_answer()
        if self._call is None and self._waiting:
            self._sent, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            self._call = self._actor.add.remote(self._sent)

    def _take_answer(self) -> None:
        try:
            self.status = ray.get(self._call)
            for task, reason in self.status.failed.items():
                self.failed[task] = Failure(reason)
            self._unavailable = 0
        except ActorUnavailableError as error:
            self._send_again(error)
        except RayError as error:
            self.errors |= dict.fromkeys(self._sent, Failure(explain(error)))
        self._call = None

    def _send_again(self, error: ActorUnavailableError) -> None:
        """Queue the last vectors again: the actor's node died, and Ray is restarting the actor.

        An actor that has taken in a vector ignores it the second time.
        """
        self._unavailable += 1
        if self._unavailable > ATTEMPTS:
            self.errors |= dict.fromkeys(self._sent, Failure(explain(error)))
        else:
            self._waiting = self._sent + self._waiting
            time.sleep(1.0)

    def floor_notes(self) -> list[str]:
        """Notes with the least relative error of a basis of each size, for the vectors so far."""
        notes = []
        for size, error in self.status.floor.items():
            notes.append(f"M={size} error {error:.3f}")
        return notes

    def finish(self) -> None:
        """Wait until the actor has taken in every vector that was offered, or it has failed."""
        while self._call is not None or self._waiting:
            self.pump(timeout=1.0)

    def write_bases(self, experiment: Experiment | None = None) -> WrittenBases:
        """Call `BasisBuilder.write_bases`, then end the actors. Raises UserError on failure."""

        def written() -> WrittenBases:
            bases: WrittenBases = ray.get(self._actor.write_bases.remote(experiment))
            return bases

        try:
            return patiently(written, ATTEMPTS)
        except RayError as error:
            raise UserError(f"the bases could not be written: {explain(error)}") from error
        finally:
            self.close()

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
