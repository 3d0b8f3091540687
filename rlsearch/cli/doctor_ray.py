"""What ``rlsearch doctor`` looks at of Ray: who can reach it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

DASHBOARD_PORT = 8265
"""Where Ray's dashboard listens, unless it was told another port."""

_LISTENING = "0A"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``status`` is ``ok``, ``warning`` or ``error``."""

    what: str
    status: str
    found: str
    remedy: str = ""


def ray_findings(address: str | None, dashboard_port: int = DASHBOARD_PORT) -> list[Finding]:
    """Whether the cluster in reach, if there is one, and a dashboard on this machine are open to others.

    Args:
        address: ``HOST:PORT`` of a cluster's head; None: what ``RAY_ADDRESS`` says.
        dashboard_port: where a dashboard would listen.
    """
    return [_cluster(address), *_dashboard(dashboard_port)]


def listening() -> list[tuple[str, int, str]]:
    """Address, port and inode of all sockets of this machine that take connections; none where ``/proc`` is silent."""
    found = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path("/proc/net", name).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    host, _, port = fields[1].partition(":")
                    found.append((_readable(host), int(port, 16), fields[9]))
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    parsed = ipaddress.ip_address(host)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _cluster(address: str | None) -> Finding:
    given, source = address or os.environ.get("RAY_ADDRESS"), "--address" if address else "RAY_ADDRESS"
    if not given:
        return Finding("Ray", "ok", "a local cluster for each search, on loopback and with a token of its own")
    # Such an address may hold a password (ray://USER:PASSWORD@HOST), which is no business of a terminal's.
    place = given.rpartition("@")[2].rpartition("//")[2]
    found = f"{source} is {place}" + ("" if address else "; searches ignore it unless --address is given")
    if not place.rpartition(":")[2].isdecimal():
        return Finding("Ray", "ok", f"{found}; it names no HOST:PORT, and is not looked at")
    try:
        from rlsearch.search.cluster_access import OPEN_REMEDY, wants_token

        wanted = wants_token(place)
    except ImportError as error:
        return Finding("Ray", "warning", f"{found}; it cannot be looked at", f"bash launch/local.sh ({error})")
    if wanted is None:
        return Finding("Ray", "warning", f"{found}; no Ray answers there", "start its head, or unset RAY_ADDRESS")
    if not wanted:
        return Finding("Ray", "warning", f"{found}; it is open: it wants no token", OPEN_REMEDY)
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return Finding("Ray", "warning", f"{found}; it wants a token", "export RAY_AUTH_MODE=token here too")
    return Finding("Ray", "ok", f"{found}; it wants a token")


def _dashboard(port: int) -> list[Finding]:
    hosts = sorted({host for host, at, _ in listening() if at == port and not is_loopback(host)})
    if not hosts:
        return []
    found = f"something listens at port {port} of {', '.join(hosts)}, where Ray's dashboard is: others reach it"
    remedy = "start Ray with --dashboard-host 127.0.0.1, and reach it through ssh -L"
    return [Finding("Ray's dashboard", "warning", found, remedy)]


def _readable(host: str) -> str:
    """An address as ``/proc`` has it: words of four bytes, each in this machine's order, which is little-endian."""
    words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
