"""Ray that does not start: what is tried, what is left behind, what users are told. Every failure
is a real one: the servers of Ray are killed or stopped while they start.
"""

import socket
from pathlib import Path

import pytest
import ray
from processes import nothing_is_left_of, start_python

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SCRIPT = """
import signal, sys, threading, time
from contextlib import suppress
import psutil
import ray
from raytvb.errors import UserError
from raytvb.orchestration.connect import connect

WHAT, HOW_OFTEN = getattr(signal, sys.argv[1]), int(sys.argv[2])

def strike():
    struck = set()
    while len(struck) < HOW_OFTEN:
        for child in set(psutil.Process().children()) - struck:
            with suppress(psutil.Error):  # it may have ended since it was listed
                if child.name() == "raylet":
                    child.send_signal(WHAT)
                    struck.add(child)
        time.sleep(0.01)

def servers():
    names = [child.name() for child in psutil.Process().children(recursive=True)]
    return [name for name in names if name in ("gcs_server", "raylet")]

threading.Thread(target=strike, daemon=True).start()
try:
    connect(cpus=1)
except UserError as error:
    print("error:", error)
    print("left:", servers())
else:
    print("answer:", ray.get(ray.remote(lambda: 42).remote()))
    print("running:", sorted(servers()))
"""


def run(folder: Path, signal: str, how_often: int, **environment: str) -> list[str]:
    """The lines that the script prints. Fails if it leaves a process behind."""
    output = folder / "output"
    process = start_python(["-c", SCRIPT, signal, str(how_often)], output, **environment)
    try:
        assert process.wait(400) == 0, output.read_text()
    finally:
        process.kill()
    assert nothing_is_left_of(process)
    return output.read_text().splitlines()


def test_after_three_tries_the_message_says_what_to_do(tmp_path: Path) -> None:
    first, second, *message = run(tmp_path, "SIGKILL", 3, RAYTVB_RAY_START_S="5")
    assert first.endswith("trying again, for up to 10 s")
    assert second.endswith("trying again, for up to 20 s")
    text = "\n".join(message)
    assert text.startswith("error: Ray did not start on this machine in 3 tries, the last of")
    for way_out in ("--num-cpus", "RAYTVB_RAY_START_S", "RAY_ADDRESS", "memory", "disk"):
        assert way_out in text
    assert message[-1] == "left: []"


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (line, left) = run(tmp_path, "SIGKILL", 0, RAYTVB_RAY_START_S="soon")
    assert line == "error: RAYTVB_RAY_START_S=soon is not a number of seconds above 0"
    assert left == "left: []"


@pytest.mark.parametrize("listens", [True, False])
def test_a_head_that_says_nothing_is_named(tmp_path: Path, listens: bool) -> None:
    """listens: the port takes connections, as that of a head that hangs does."""
    output = tmp_path / "output"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        process = start_python(["-c", SCRIPT, "SIGKILL", "0"], output, RAY_ADDRESS=address)
        try:
            assert process.wait(60) == 0, output.read_text()
        finally:
            process.kill()
    line, left = output.read_text().splitlines()
    assert line.startswith(f"error: nothing answers at RAY_ADDRESS={address} (")
    assert "check it and the cluster's head" in line and left == "left: []"


def test_a_healthy_head_is_joined(ray_cluster: None, tmp_path: Path) -> None:
    output, address = tmp_path / "output", ray.get_runtime_context().gcs_address
    settings = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    process = start_python(["-c", SCRIPT, "SIGKILL", "0"], output, **settings)
    try:
        assert process.wait(120) == 0, output.read_text()
    finally:
        process.kill()
    assert output.read_text().splitlines() == ["answer: 42", "running: []"]
