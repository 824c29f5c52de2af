"""Pages in a browser of this machine: only those of the server itself, or allowed ones, are answered."""

import socket
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

from nugget2d import Nugget2D
from nugget2d.server.api_errors import APIError
from nugget2d.server.browsers import refuse_strangers
from nugget2d.server.settings import Settings, is_loopback
from serving import serving

LOCAL = Settings(name="tiny", max_context=8)
PROXIED = Settings(name="tiny", max_context=8, allow_hosts=("chat.example.com",))
PUBLIC = Settings(name="tiny", max_context=8, host="0.0.0.0")


def passes(settings: Settings, **headers: str) -> bool:
    """Whether a request is answered."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    try:
        refuse_strangers(Headers(raw=raw), settings)
    except APIError as error:
        assert error.status == 403 and "--allow-host" in error.detail
        return False
    return True


def test_a_server_on_loopback_has_names_of_loopback_only() -> None:
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.1", "[::1]", "[::1]:8000"):
        assert passes(LOCAL, host=host)
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "0.0.0.0:8000",
        "192.168.0.5",
        "[::2]",
        "[::1",
        "a@localhost",
        "localhost@evil.example",
        "localhost:8000:1",
        "localhost/x",
        "",
    ):
        assert not passes(LOCAL, host=host)
    assert passes(LOCAL)  # HTTP/1.0: no browser
    assert passes(PROXIED, host="Chat.example.com") and passes(PROXIED, host="chat.example.com:8443")
    assert not passes(PROXIED, host="example.com")
    assert passes(PUBLIC, host="any.example")  # whoever rebinds a name has no key


@pytest.mark.parametrize("settings", [LOCAL, PUBLIC])
def test_a_page_asks_the_server_it_came_from_only(settings: Settings) -> None:
    for host, origin in (
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000", "https://127.0.0.1:8000"),  # TLS ends at a proxy
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost"),
        ("localhost", "https://localhost:443"),
        ("localhost:80", "http://localhost"),
    ):
        assert passes(settings, host=host, origin=origin)
    for origin in (
        "http://evil.example",
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "https://localhost",
        "http://evil.example@localhost:8000",
        "localhost:8000",
        "http://",
        "file://",
        "null",
        "",
    ):
        assert not passes(settings, host="localhost:8000", origin=origin)
    assert not passes(settings, origin="http://localhost:8000")  # nobody said which server was meant


def test_a_page_can_be_allowed() -> None:
    for origin in ("https://chat.example.com", "http://chat.example.com:3000"):
        assert passes(PROXIED, host="127.0.0.1:8000", origin=origin, sec_fetch_site="cross-site")
    assert not passes(PROXIED, host="127.0.0.1:8000", origin="https://chat.example.com.evil.example")


def test_what_a_browser_says_of_a_page_without_origin() -> None:
    for site in ("same-origin", "same-site", "none"):
        assert passes(LOCAL, host="localhost", sec_fetch_site=site)
    assert not passes(LOCAL, host="localhost", sec_fetch_site="cross-site")


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "", "example.com", "127.0.0.1.example.com")))


@pytest.mark.e2e
def test_over_http(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path) as server:
        for path in ("/health", "/metrics", "/openapi.json", "/v1/memories"):
            refused = httpx.get(server.url + path, headers={"Host": "evil.example"})
            assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed"
        page = {"Origin": "https://evil.example"}
        planted = httpx.post(f"{server.url}/v1/memories/file", files={"file": ("a", b"Lies.")}, headers=page)
        assert planted.status_code == 403 and planted.json()["error"]["code"] == "origin_not_allowed"
        assert httpx.options(f"{server.url}/v1/memories", headers=page).status_code == 403
        assert httpx.get(f"{server.url}/v1/memories", headers={"Origin": server.url}).json()["data"] == []
        with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port)) as old:
            old.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert old.recv(100).startswith(b"HTTP/1.1 200 ")
