"""A real S3 server on this machine: OpenStack Swift (in the `test` extra) with its S3 front end.

One replica in one folder, four processes bound to 127.0.0.1. It needs neither root nor docker nor
memcached. The tests and the benchmarks of faults start it.
"""

from __future__ import annotations

import base64
import hmac
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from email.utils import formatdate
from http.client import HTTPResponse
from pathlib import Path
from types import TracebackType

from raytvb.errors import UserError

BACKENDS = ("account", "container", "object")
USER, SECRET, REGION = "test:tester", "testing-secret", "us-east-1"
START_SECONDS = 60.0

COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {root}/etc
devices = {root}/node
mount_check = false
fallocate_reserve = 0
log_level = WARNING
[filter:healthcheck]
use = egg:swift#healthcheck
"""
# An object server answers a PUT only when the listing has the key, however slow the machine is:
# with the default of one second a busy machine answers first and a listing right after the PUT
# misses the key.
BACKEND = """\
[pipeline:main]
pipeline = healthcheck {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
container_update_timeout = 60
"""
# 10000 parts are what S3 itself allows. A server on a busy machine is slow, not gone: hence the
# long timeouts.
PROXY = """\
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth bulk copy slo \
versioned_writes symlink proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = {region}
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_{user_key} = {secret} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 60
recoverable_node_timeout = 60
conn_timeout = 5
"""
# In a process of its own because importing Swift brings eventlet along, which this process should
# not see.
MAKE_RINGS = """\
import sys
from swift.common.ring import RingBuilder
folder, *kinds = sys.argv[1:]
for kind, port in (k.split(":") for k in kinds):
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    device = dict(id=0, region=1, zone=1, ip="127.0.0.1", port=int(port), device="d1", weight=1)
    builder.add_dev(device)
    builder.rebalance(seed=1)
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""


class S3Server:
    """A Swift S3 server, and a context manager.

    Its data, configuration and logs are in the folder `root`.
    """

    def __init__(self, root: Path) -> None:
        """root: on a file system with extended attributes; created if it is missing."""
        self.root = root.resolve()
        self._ports: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint(self) -> str:
        """The server's URL; the server must have been started once."""
        return f"http://127.0.0.1:{self._ports['proxy']}"

    @property
    def environment(self) -> dict[str, str]:
        """What an S3 client needs; the server must have been started."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the processes and wait until each is healthy. After `stop` it starts again, with
        the same data.

        Raises UserError if Swift is not installed, and RuntimeError if the folder has no extended
        attributes or a process ends.
        """
        if importlib.util.find_spec("swift") is None:
            raise UserError(
                "the S3 server of the tests and benchmarks is OpenStack Swift, which is not "
                "installed: pip install 'raytvb[test]'"
            )
        if self._processes:
            raise RuntimeError("the S3 server runs already")
        for folder in ("etc", "node/d1", "log"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self._check_attributes()
        if not self._ports:  # kept over a restart: clients keep the endpoint
            self._ports = dict(zip((*BACKENDS, "proxy"), _free_ports(4), strict=True))
            self._configure()
        try:
            for kind in self._ports:
                self._processes[kind] = self._launch(kind)
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes that this object started. It is not an error if there are none."""
        for process in self._processes.values():
            _signal_group(process, signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                process.wait()
        self._processes.clear()

    def make_bucket(self, name: str) -> None:
        """Create a bucket. Only the storage room has an S3 client, so the request is signed here.

        Raises OSError if the server refuses it.
        """
        date = formatdate(usegmt=True)
        # Signature version 2, the short one: the method, two empty headers, the date, the path.
        text = f"PUT\n\n\n{date}\n/{name}".encode()
        signature = base64.b64encode(hmac.digest(SECRET.encode(), text, "sha1")).decode()
        headers = {"Date": date, "Authorization": f"AWS {USER}:{signature}"}
        url = f"{self.endpoint}/{name}"
        _open(urllib.request.Request(url, method="PUT", headers=headers)).close()

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _check_attributes(self) -> None:
        try:
            os.setxattr(self.root, "user.swift.probe", b"1")
        except OSError as error:
            raise RuntimeError(
                f"Swift keeps metadata in extended attributes, which {self.root} does not support "
                f"({error}); use a folder on another file system (pytest: --basetemp)"
            ) from error

    def _configure(self) -> None:
        etc = self.root / "etc"
        (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
        for kind, port in self._ports.items():
            server = PROXY if kind == "proxy" else BACKEND
            text = COMMON + server
            (etc / f"{kind}.conf").write_text(
                text.format(
                    port=port,
                    root=self.root,
                    user=_user_name(),
                    kind=kind,
                    region=REGION,
                    user_key=USER.replace(":", "_"),
                    secret=SECRET,
                )
            )
        kinds = [f"{kind}:{self._ports[kind]}" for kind in BACKENDS]
        made = subprocess.run(
            [sys.executable, "-c", MAKE_RINGS, str(etc), *kinds], capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(f"Swift does not work here\n{made.stderr}")

    def _launch(self, kind: str) -> subprocess.Popen[bytes]:
        program = Path(sys.executable).parent / f"swift-{kind}-server"
        with open(self.root / "log" / f"{kind}.log", "ab") as log:
            return subprocess.Popen(
                [str(program), str(self.root / "etc" / f"{kind}.conf"), "-v"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        waiting = dict(self._ports)
        while waiting:
            for kind in list(waiting):
                if self._processes[kind].poll() is not None or time.monotonic() > deadline:
                    log = (self.root / "log" / f"{kind}.log").read_text(errors="replace")
                    raise RuntimeError(f"swift-{kind}-server did not start:\n{log[-3000:]}")
                if _healthy(waiting[kind]):
                    del waiting[kind]
            time.sleep(0.05)


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    """Distinct ports that nothing listens on. All ports are held until the last one is chosen."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _open(request: urllib.request.Request, seconds: float = 60.0) -> HTTPResponse:
    """The answer to a request. A proxy that the environment names is not used."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer: HTTPResponse = opener.open(request, timeout=seconds)
    return answer


def _healthy(port: int) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/healthcheck")
    try:
        with _open(request, 5.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the whole session of a process. We started the process and have not waited
    for it yet, so no other process can have its id.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
