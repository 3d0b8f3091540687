"""What ``rlsearch doctor`` says of Ray: real clusters, real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rlsearch.cli.doctor_ray import is_loopback, listening, ray_findings

# An open cluster, as Ray starts it where its authentication is turned off; on a machine's own address.
OPEN = """
import ray, sys, tempfile
with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
    context = ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=folder, logging_level="ERROR",
                       object_store_memory=80_000_000)
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
"""


@pytest.fixture
def open_cluster() -> Iterator[str]:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", OPEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=60)


@pytest.mark.cluster
def test_an_open_cluster_is_told(open_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding, *_) = ray_findings(open_cluster)
    assert (finding.status, finding.found) == ("warning", f"--address is {open_cluster}; it is open: it wants no token")
    assert "RAY_AUTH_MODE=token" in finding.remedy
    monkeypatch.setenv("RAY_ADDRESS", open_cluster)
    (finding, *_) = ray_findings(None)
    assert finding.status == "warning"
    assert "it is open" in finding.found
    _, port = open_cluster.split(":")
    hosts = {host for host, at, _ in listening() if at == int(port)}
    assert hosts
    assert not any(map(is_loopback, hosts))  # why searches do not start Ray in this way


@pytest.mark.parametrize(
    ("address", "status", "told"),
    [
        ("", "ok", "a local cluster for each search"),
        ("127.0.0.1:1", "warning", "RAY_ADDRESS is 127.0.0.1:1; searches ignore it unless --address is given; no Ray"),
        ("ray://me:secret@127.0.0.1:1", "warning", "RAY_ADDRESS is 127.0.0.1:1; "),
        ("auto", "ok", "RAY_ADDRESS is auto; searches ignore it"),
        ("https://me:secret@cluster.example", "ok", "RAY_ADDRESS is cluster.example; searches ignore it"),
    ],
)
def test_what_is_said_of_an_address(monkeypatch: pytest.MonkeyPatch, address: str, status: str, told: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    (finding, *_) = ray_findings(None)
    assert finding.status == status
    assert told in finding.found
    assert "secret" not in str(finding)


@pytest.mark.parametrize(
    ("family", "host", "is_told"),
    [
        (socket.AF_INET, "0.0.0.0", True),
        (socket.AF_INET, "127.0.0.1", False),
        (socket.AF_INET6, "::", True),
        (socket.AF_INET6, "::1", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", False),
    ],
)
def test_a_dashboard_that_others_reach_is_told(family: socket.AddressFamily, host: str, is_told: bool) -> None:
    with socket.socket(family) as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        told = [finding for finding in ray_findings(None, port) if finding.what == "Ray's dashboard"]
    assert bool(told) == is_told
    assert all(finding.status == "warning" and f"port {port} of {host}" in finding.found for finding in told)
