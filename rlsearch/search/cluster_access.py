"""Who can reach Ray: a search's own cluster is for this process alone, and one that exists is asked for its token.

Whoever reaches a Ray cluster can run code on it. A cluster of this machine alone therefore listens on loopback only,
and wants a token besides, which no other user of the machine can read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

_TOKEN_FILE = "token"
# Answered by the head of a cluster; it changes nothing, and every client needs it.
_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ANSWER_SECONDS = 5.0

_HANDED_ON = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")

OPEN_REMEDY = (
    "whoever reaches it can run code on it: stop it, then `ray get-auth-token --generate` once, the same "
    "~/.ray/auth_token on every node, and RAY_AUTH_MODE=token wherever Ray or rlsearch is started"
)
"""What to do about a cluster that wants no token."""


@contextlib.contextmanager
def private_access(folder: Path) -> Iterator[None]:
    """What is started in the block and knows Ray only by its environment is Ray for this user's processes alone.

    The token is new, and stands in a file that only this user can read. The environment holds the file's path, never
    the token: any process's environment may end in a log. What the user has set for a cluster plays no part here, and
    is not handed on.

    Args:
        folder: of the cluster, readable by this user alone.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # of a compiled module

    path = folder / _TOKEN_FILE
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    values = {
        "RAY_AUTH_TOKEN": None,
        "RAY_AUTH_TOKEN_PATH": str(path),
        "RAY_AUTH_MODE": None,  # Ray itself turns it on for a cluster that it starts, and refreshes what it has cached
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    # Without "clusters", Ray takes 127.0.0.1 as its address and listens there alone; asked for that address by its
    # argument, it takes the machine's own and listens everywhere. It looks at the variable only when it is imported.
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    AuthenticationTokenLoader.instance().reset_cache()  # an earlier cluster's of this process
    try:
        with environment(values):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual
        AuthenticationTokenLoader.instance().reset_cache()


def nothing_handed_on() -> contextlib.AbstractContextManager[None]:
    """The environment of a driver while Tune starts its workers, without what Tune would hand on to them.

    It does so in the title of a process, which everyone on the machine can read, and Ray writes it into its logs. The
    workers have the environment of their node, which on this machine is that of the driver as it was before.
    """
    return environment(dict.fromkeys(_HANDED_ON))


def wants_token(address: str) -> bool | None:
    """Whether the cluster at an address refuses who brings no token.

    Args:
        address: ``HOST:PORT`` of its head.

    Returns:
        None where nothing answers there, or something else than Ray.
    """
    import grpc

    # A proxy is for the outside, and would be asked in vain.
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(_QUESTION)(b"", timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            return True if code == grpc.StatusCode.UNAUTHENTICATED else None
    return False


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the block alone; None: not set in it."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
