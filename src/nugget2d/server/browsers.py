"""Pages in a browser of this machine: a server on loopback answers them only if they are its own or were allowed.

A page of any site can send requests to loopback, and by a name that it lets point there (DNS rebinding) also read the
answers. What tells it apart is what a browser alone writes: `Host`, `Origin` and `Sec-Fetch-Site`.
"""

import re

from starlette.datastructures import Headers

from nugget2d.server.api_errors import APIError
from nugget2d.server.settings import NAME, Settings, is_loopback

_ADDRESS = re.compile(rf"({NAME})(?::(\d{{1,5}}))?")
_PORTS = {"http": 80, "https": 443}


def refuse_strangers(headers: Headers, settings: Settings) -> None:
    """Check who asks, and by which name.

    A request without `Host` (HTTP/1.0) is none of a browser; it passes.

    Raises:
        APIError: the name is none of this server's, or the page is of another origin.
    """
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    for host in hosts:
        if settings.local and not _known(_split(host, "http")[0], settings):
            raise APIError(
                403,
                f"this server has no name {host!r}; ask it as localhost, or start it with --allow-host and that name",
                "host_not_allowed",
            )
    for origin in origins:
        scheme, _, address = origin.partition("://")
        name, port = _split(address, scheme)
        own = name and (name, port) in [_split(host, scheme) for host in hosts]
        if not own and name not in settings.allow_hosts:
            raise _foreign(f"a page of {origin!r}")
    if not origins and headers.get("sec-fetch-site") == "cross-site":
        raise _foreign("a page of another site")


def _foreign(who: str) -> APIError:
    message = f"{who} may not ask this server; start it with --allow-host and the page's host to let it"
    return APIError(403, message, "origin_not_allowed")


def _known(name: str, settings: Settings) -> bool:
    return is_loopback(name.strip("[]")) or name in settings.allow_hosts


def _split(address: str, scheme: str) -> tuple[str, int | None]:
    """Name and port of a host; the name is empty if it is none."""
    found = _ADDRESS.fullmatch(address.lower())
    if found is None:
        return "", None
    return found[1], int(found[2]) if found[2] else _PORTS.get(scheme)
