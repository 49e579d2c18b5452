"""Jobs on a real Ray head with token authentication: `raytvb submit`, and `ray job submit` with
jobs/raytvb_job.py.
"""

import http.server
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytvb.errors import UserError
from raytvb.experiment.parsing import parse_experiment
from raytvb.orchestration.job_client import job_client
from raytvb.orchestration.passed_variables import job_environment
from raytvb.orchestration.submit import job_command, submit
from raytvb.orchestration.upload import check_places, pack

ROOT = Path(__file__).parent.parent
TASKS = ["glyphs/greek-blur", "glyphs/latin-fog"]
EXPERIMENT = {
    "name": "t",
    "tasks": TASKS,
    "talos": {"images": 32, "rounds": 1},
    "finetune": {"epochs": 1},
    "basis": {"method": "svd"},
    "search": {"sizes": [1]},
    "resources": {"cpus_per_task": 2},
}  # one worker at a time: starting them is most of the work
RAY = str(Path(sys.executable).with_name("ray"))
START_S, JOB_S = 180, 580


def write_experiment(folder: Path, **fields: Any) -> Path:
    file = folder / "t.yaml"
    file.write_text(yaml.safe_dump({**EXPERIMENT, "store": str(folder / "store"), **fields}))
    return file


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


# Checks that are made before any cluster is contacted.


def test_only_the_allowed_variables_are_passed_on() -> None:
    env = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_ENDPOINT_URL": "http://s3",
        "AWS_PROFILE": "mine",
        "AWS_CA_BUNDLE": "/my/ca",
        "RAYTVB_CACHE": "/c",
        "HF_TOKEN": "h",
        "HOME": "/home/me",
        "RAY_AUTH_TOKEN": "t",
        "SECRET": "s",
    }
    assert job_environment(env) == {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_ENDPOINT_URL": "http://s3",
        "RAYTVB_CACHE": "/c",
        "HF_TOKEN": "h",
    }


@pytest.mark.parametrize(
    "store, notes", [("s3://bucket/x", 0), ("/data/x", 1), ("file:///data/x", 1), ("~/x", 1)]
)
def test_a_store_on_the_cluster_is_noted_where_it_is_local(store: str, notes: int) -> None:
    assert len(check_places(parse_experiment({**EXPERIMENT, "store": store}))) == notes


@pytest.mark.parametrize("store", ["runs/x", "./x"])
def test_a_relative_store_is_refused(store: str) -> None:
    with pytest.raises(UserError, match=r"relative to this machine.*s3://"):
        check_places(parse_experiment({**EXPERIMENT, "store": store}))


def test_a_relative_data_folder_is_refused() -> None:
    tasks = [{"name": "mine", "data": "data/mine"}]
    with pytest.raises(UserError, match="data of mine: data/mine"):
        check_places(parse_experiment({**EXPERIMENT, "store": "s3://b/x", "tasks": tasks}))


def test_the_upload_holds_the_experiment_and_the_source_alone(tmp_path: Path) -> None:
    folder = tmp_path / "upload"
    folder.mkdir()
    file = write_experiment(tmp_path)
    pack(file, folder)
    assert (folder / "experiment.yaml").read_bytes() == file.read_bytes()
    assert (folder / "raytvb" / "orchestration" / "submit.py").read_bytes() == (
        ROOT / "raytvb" / "orchestration" / "submit.py"
    ).read_bytes()
    assert not list(folder.rglob("__pycache__"))
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 20 << 20


def test_without_code_the_upload_is_the_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "upload"
    folder.mkdir()
    pack(write_experiment(tmp_path), folder, with_code=False)
    assert [f.name for f in folder.iterdir()] == ["experiment.yaml"]


def test_nobody_at_the_address() -> None:
    (port,) = free_ports(1)
    with pytest.raises(
        UserError, match=f"no Ray cluster answers at http://127.0.0.1:{port} .*port-forward"
    ):
        job_client(f"127.0.0.1:{port}/")


def test_something_else_at_the_address() -> None:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="not a Ray dashboard"):
            job_client(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_another_kind_of_address() -> None:
    with pytest.raises(UserError, match=r"such as http://127\.0\.0\.1:8265"):
        job_client("ray://127.0.0.1:10001")


@pytest.mark.parametrize("content", [None, " \n"])
def test_a_token_file_that_gives_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        job_client("http://127.0.0.1:1")


@pytest.mark.parametrize("script", [False, True])
def test_what_runs_in_the_upload_is_its_own_raytvb(tmp_path: Path, script: bool) -> None:
    """The command of `raytvb submit` and the script for `ray job submit`, without a cluster."""
    folder = tmp_path / "upload"
    folder.mkdir()
    pack(write_experiment(tmp_path), folder)
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "raytvb" / "cli" / "main.py").write_text(
        "import sys\n"
        "def main(args=None):\n"
        "    print('uploaded', *(args or sys.argv[1:]))\n"
        "    return 7\n"
    )
    command = job_command("run", "experiment.yaml")
    if script:
        command = ["python", "jobs/raytvb_job.py", "run", "experiment.yaml"]
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (7, "uploaded run experiment.yaml\n"), done.stderr


def test_the_experiment_must_be_in_the_working_directory(tmp_path: Path) -> None:
    file = write_experiment(tmp_path)
    with pytest.raises(UserError, match="not in the working directory"):
        submit(file, "http://127.0.0.1:1", env={}, working_dir=ROOT / "jobs")


# With a cluster. Ray reads its authentication mode once in a process, so clients are processes of
# their own.


@dataclass(frozen=True)
class Head:
    address: str
    token: str

    def environment(self, **changes: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {
            **clean,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PYTHONUNBUFFERED": "1",
            **changes,
        }

    def call(
        self, *command: str, timeout: float = JOB_S, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment(**env),
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=timeout,
        )

    def submit(self, experiment: Path, **env: str) -> subprocess.CompletedProcess[str]:
        return self.call(*submit_command(experiment, self.address), timeout=JOB_S, **env)


def submit_command(experiment: Path, address: str) -> list[str]:
    return [sys.executable, "-m", "raytvb", "submit", str(experiment), "--address", address]


def wait_until_up(process: subprocess.Popen[bytes], head: Head, log: Path) -> None:
    request = urllib.request.Request(
        f"{head.address}/api/version", headers={"Authorization": f"Bearer {head.token}"}
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(request, timeout=5) as reply:
                assert "ray_version" in json.load(reply)
                return
        time.sleep(0.5)
    raise RuntimeError(f"the Ray head did not come up:\n{log.read_text()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the processes of this head: Ray ends its own on SIGTERM, and the group holds whatever is
    left.
    """
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(
        prefix="rt", dir="/tmp", ignore_cleanup_errors=True
    ) as temp:  # sockets: 107 bytes
        head = Head(f"http://127.0.0.1:{dashboard}", secrets.token_hex(16))
        log, token = Path(temp, "log"), Path(temp, "token")
        token.write_text(head.token)
        env = head.environment(
            RAY_AUTH_TOKEN_PATH=str(token),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )
        del env["RAY_AUTH_TOKEN"]  # a file, as on a cluster
        command = [
            RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--port={port}",
            f"--temp-dir={temp}",
            "--node-ip-address=127.0.0.1",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--object-store-memory={200 << 20}",
            "--disable-usage-stats",
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=env, cwd="/", stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until_up(process, head, log)
            yield head
        finally:
            stop(process)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_job_submit_and_raytvb_submit_run_the_pipeline(head: Head, tmp_path: Path) -> None:
    folder, store = tmp_path / "work", tmp_path / "store"
    folder.mkdir()
    experiment = write_experiment(tmp_path)
    pack(experiment, folder)
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    done = head.call(
        RAY,
        "job",
        "submit",
        "--address",
        head.address,
        "--working-dir",
        str(folder),
        "--",
        "python",
        "jobs/raytvb_job.py",
        "run",
        "experiment.yaml",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((store / "report" / "summary.json").read_text())
    assert sorted(summary["tasks"]) == sorted(TASKS)
    shutil.rmtree(store / "report")  # the second job makes missing results again
    done = head.submit(experiment, AWS_REGION="us-west-2", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stderr
    assert "right only for one node" in done.stderr
    again = json.loads((store / "report" / "summary.json").read_text())
    assert again["addition"] == summary["addition"] and again["negation"] == summary["negation"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_that_fails_fails_the_submission(head: Head, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = head.submit(write_experiment(tmp_path, store=str(tmp_path / "file" / "store")))
    assert done.returncode not in (0, 130), done.stdout + done.stderr
    assert "failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    "env", [{"RAY_AUTH_TOKEN": "not-the-token-of-the-head"}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_a_wrong_or_missing_token_is_one_clear_message(
    head: Head, tmp_path: Path, env: dict[str, str]
) -> None:
    done = head.submit(write_experiment(tmp_path), **env)
    assert done.returncode not in (0, 130)
    assert "refused the authentication" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.ray
def test_an_address_in_the_environment_does_not_win(head: Head, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = head.submit(
        write_experiment(tmp_path),
        RAY_AUTH_TOKEN="not-the-token-of-the-head",
        RAY_ADDRESS=nobody,
        RAY_API_SERVER_ADDRESS=nobody,
    )
    assert f"{head.address} refused the authentication" in done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_leaves_the_job_running(head: Head, tmp_path: Path) -> None:
    experiment = write_experiment(tmp_path, finetune={"epochs": 1000})
    process = subprocess.Popen(
        submit_command(experiment, head.address),
        env=head.environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    submitted = next(line for line in process.stderr if line.startswith("Submitted "))
    job = submitted.split()[1].rstrip(".")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "No longer following" in errors
    assert f"ray job stop --address {head.address} {job}" in errors
    status = head.call(RAY, "job", "status", "--address", head.address, job)
    assert "RUNNING" in status.stdout + status.stderr or "PENDING" in status.stdout + status.stderr
    stopped = head.call(RAY, "job", "stop", "--address", head.address, job)
    assert "was stopped" in stopped.stdout + stopped.stderr


def test_an_address_where_nothing_listens_is_told_at_once(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_ADDRESS": nobody
    }
    done = subprocess.run(
        [sys.executable, "-m", "raytvb", "run", str(write_experiment(tmp_path))],
        env=env,
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert (
        f"nothing answers at RAY_ADDRESS={nobody}" in done.stderr and "Traceback" not in done.stderr
    )
