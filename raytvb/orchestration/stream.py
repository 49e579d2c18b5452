"""The stream of committed vectors to the basis actor."""

from __future__ import annotations

import time
from typing import Any

import ray

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.orchestration.actors import basis_actors
from raytvb.orchestration.tasks import explain, patiently

ATTEMPTS = 30  # a second apart, while an actor is being restarted


BATCH = 32  # vectors that the basis actor takes in with one sweep over those before


class Stream:
    """Feeds committed vectors to the basis actor, one call in flight, so that nothing arrives out
    of order.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._actor, self._actors = basis_actors(experiment)
        self._waiting: list[str] = []
        self._call: Any = None
        self._sent: list[str] = []
        self._attempts = 0
        self.failed: dict[str, str] = {}
        self.status: dict[str, Any] = {
            "vectors": 0,
            "floor": {},
            "cache": "memory",
            "cache_bytes": 0,
        }

    def offer(self, task: str) -> None:
        self._waiting.append(task)
        self.pump()

    def pump(self, timeout: float = 0.0) -> None:
        """Take the answer of the call in flight if it is there, and send all that has come
        since.
        """
        if self._call is not None and ray.wait([self._call], timeout=timeout)[0]:
            try:
                self.status = ray.get(self._call)
                self.failed |= self.status["failed"]
                self._attempts = 0
            except ray.exceptions.ActorUnavailableError as error:
                # Its node died; it is being restarted, and an offer that had come through changes
                # nothing.
                self._attempts += 1
                if self._attempts > ATTEMPTS:
                    self.failed |= dict.fromkeys(self._sent, explain(error))
                else:
                    self._waiting = self._sent + self._waiting
                    time.sleep(1.0)
            except ray.exceptions.RayError as error:
                self.failed |= dict.fromkeys(self._sent, explain(error))
            self._call = None
        if self._call is None and self._waiting:
            self._sent, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            self._call = self._actor.add.remote(self._sent)

    def finish(self) -> None:
        """Wait until all has been taken in, or has failed."""
        while self._call is not None or self._waiting:
            self.pump(timeout=1.0)

    def write_bases(self) -> dict[str, Any]:
        """See `BasisBuilder.write_bases`; the actors are not needed after it."""
        try:
            return patiently(lambda: ray.get(self._actor.write_bases.remote()), ATTEMPTS)
        except ray.exceptions.RayError as error:
            raise UserError(f"the bases could not be written: {explain(error)}") from error
        finally:
            self.close()

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
