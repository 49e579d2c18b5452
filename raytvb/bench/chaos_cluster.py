"""A real Ray cluster on this machine: a head without CPUs, and nodes that may be killed.

Every node is a process `ray start --block` with its own raylet, object store and workers. The
cluster has a token of its own, so that no other program can join it by mistake.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from raytvb.bench.chaos_processes import Family
from raytvb.errors import UserError

if TYPE_CHECKING:
    import psutil

READY = b"Ray runtime started."
"""What `ray start` prints once a node is up."""

START_S = 120.0
LOOK_S = 1.0
"""How often the processes of a node are looked up."""

OBJECT_STORE_BYTES = 100_000_000
NODE_CPUS = 1

WORKING = ("ray::finetune_task", "ray::score_task")
"""Titles of workers that do the work of a task."""

ACTOR = "ray::BasisBuilder"
"""Title of the worker that is the basis actor."""


def cluster_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The variables of a cluster's processes: those given, without settings of another Ray."""
    environment = {}
    for name, value in base.items():
        if not name.startswith("RAY_"):
            environment[name] = value
    return {
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


class Node:
    """One `ray start`, and what it has started."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Starts the process and does not wait for it."""
        self._log, self._is_up, self._started = log, False, time.monotonic()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command + arguments,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this benchmark only
            )
        self.family = Family(process)

    @property
    def is_up(self) -> bool:
        """Whether the node has joined. Its processes may have died since."""
        self._is_up = self._is_up or READY in self._log.read_bytes()
        return self._is_up

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, or has not come up in time."""
        late = not self.is_up and time.monotonic() - self._started > START_S
        return late or self.family.process.poll() is not None

    @property
    def last_words(self) -> str:
        """The end of its output."""
        return self._log.read_text(errors="replace")[-2000:]


class Cluster:
    """The head and several nodes with one CPU each; a context manager that ends them all."""

    def __init__(self, nodes: int, environment: Mapping[str, str]) -> None:
        """environment: of all processes, see `cluster_environment`."""
        self._count, self._environment = nodes, environment
        # Ray's sockets are in this folder, and their paths must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="rtvb-", dir="/tmp"))
        self._nodes: list[Node] = []
        self._head: Node | None = None
        self._started, self._looked = 0, 0.0
        self.address = ""

    def __enter__(self) -> Cluster:
        try:
            self._start_head()
            while len(self.nodes) < self._count:
                self.mend()
                time.sleep(0.1)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_head(self) -> None:
        arguments = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor"]
        arguments += [f"--temp-dir={self._folder}", f"--ray-client-server-port={_free_port()}"]
        self._head = self._start([*arguments, "--num-cpus=0"])
        while not self._head.is_up:
            if self._head.has_ended:
                raise UserError(f"the head of the cluster does not start:\n{self._head.last_words}")
            time.sleep(0.1)
        self.address = (self._folder / "ray_current_cluster").read_text().strip()

    def _start(self, arguments: list[str]) -> Node:
        self._started += 1
        common = ["--disable-usage-stats", "--include-log-monitor=false"]
        common += ["--dashboard-agent-listen-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        log = self._folder / f"start-{self._started}.log"
        return Node([*arguments, *common], self._environment, log)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that have joined, without the head."""
        return [node for node in self._nodes if node.is_up and not node.has_ended]

    def mend(self) -> None:
        """Start a node if one is missing. Call it often: one node starts at a time.

        Nodes that start at the same moment take each other's ports.
        """
        for node in [node for node in self._nodes if node.has_ended]:
            node.family.kill()
            self._nodes.remove(node)
        is_joining = any(not node.is_up for node in self._nodes)
        if len(self._nodes) < self._count and not is_joining:
            arguments = [f"--address={self.address}", f"--num-cpus={NODE_CPUS}"]
            self._nodes.append(self._start(arguments))
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            for node in [*self._nodes, *self._heads]:
                node.family.refresh()

    @property
    def _heads(self) -> list[Node]:
        return [] if self._head is None else [self._head]

    def workers(self, *titles: str) -> list[psutil.Process]:
        """The processes of the cluster whose titles begin in one of these ways."""
        found = []
        for node in [*self.nodes, *self._heads]:
            found += node.family.titled(*titles)
        return found

    def kill_node(self, node: Node) -> None:
        """SIGKILL a raylet with its workers, as if the machine had vanished."""
        node.family.kill()
        self._nodes.remove(node)

    def close(self) -> None:
        """End all processes, and remove Ray's files."""
        for node in [*self._nodes, *self._heads]:
            node.family.kill()
        self._nodes, self._head = [], None
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
