"""`nugget2d serve`: an OpenAI-compatible server that reads stored memories."""

import os
import re
from typing import Annotated

import typer

from nugget2d.cli.options import DEFAULT_MODEL, DEFAULT_STORE, ModelName, StorePlace, finite
from nugget2d.cli.shared import load_model, safe_to_interrupt
from nugget2d.errors import InputError

_KEYS = "NUGGET2D_API_KEYS"


def serve(
    store: StorePlace = DEFAULT_STORE,
    model: ModelName = DEFAULT_MODEL,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=_KEYS,
            help="Who may ask; repeatable. Other users of this machine can see it here: the variable is safer.",
            show_default="everyone may",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Another name that this server is asked by, or whose pages may ask it; repeatable.",
            show_default="those of loopback",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            min=8,
            help="Tokens of a prompt that are read uncompressed; longer ones are compressed but for their last part.",
            show_default="the model's context",
        ),
    ] = None,
    ratio: Annotated[
        float, typer.Option("--ratio", min=1, callback=finite, help="Tokens for each nugget, unless asked otherwise.")
    ] = 10,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 1024,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", min=1, help="Requests that run side by side.")] = 16,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait; more get 429.")] = 64,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0.1, callback=finite, help="Seconds for a request.")
    ] = 120,
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1024, help="Largest request.")] = 16 << 20,
    max_input: Annotated[
        int, typer.Option("--max-input", min=8, help="Tokens of a request's texts, compressed or not; more get 413.")
    ] = 1 << 17,
    max_memory: Annotated[
        int | None,
        typer.Option(
            "--max-memory",
            min=1 << 20,
            help="Bytes that all requests may hold together; more get 429, one that is too large alone 413.",
            show_default="half of the machine's",
        ),
    ] = None,
    max_stored: Annotated[
        int | None,
        typer.Option(
            "--max-stored", min=0, help="Bytes of memories that a key may keep; more get 413.", show_default="no limit"
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, callback=finite, help="Seconds for running requests at shutdown.")
    ] = 30,
) -> None:
    """Serve a model and its memories over HTTP, as the OpenAI API does (docs/SERVING.md)."""
    with safe_to_interrupt():
        from nugget2d.server.settings import NAME, is_loopback

    keys = api_key or []
    if not all(key.strip() for key in keys):
        raise InputError("an API key is empty, so that everyone would have it; leave it out or give another")
    if not keys and _KEYS in os.environ:
        raise InputError(f"{_KEYS} is set, but has no key in it: everyone might ask; unset it, or put keys into it")
    allowed = [name.lower() for name in allow_host or []]
    for name in allowed:
        if not re.fullmatch(NAME, name):
            raise InputError(f"--allow-host takes a name without scheme and port, as chat.example.com, not {name!r}")
    if not keys and not is_loopback(host):
        raise InputError(
            f"{host} can be reached from other machines: give keys (NUGGET2D_API_KEYS), or stay on 127.0.0.1"
        )
    with safe_to_interrupt():
        try:
            import fastapi  # noqa: F401 - of the extra, as all that follows
        except ImportError as error:
            raise InputError("serving needs more packages: pip install 'nugget2d[server]'") from error

        from nugget2d.server.limits import default_memory
        from nugget2d.server.run import listen, served_name
        from nugget2d.server.run import serve as run
        from nugget2d.server.settings import Keys, Settings
        from nugget2d.store import MemoryStore

    with listen(host, port) as listener, MemoryStore(store) as memories:
        served = load_model(model)
        settings = Settings(
            name=served_name(model),
            max_context=max_context or served.config.context,
            ratio=ratio,
            max_tokens=max_tokens,
            max_num_seqs=max_num_seqs,
            queue=queue,
            seconds=time_limit,
            max_bytes=max_bytes,
            max_input=max_input,
            max_memory=max_memory or default_memory(),
            max_stored=max_stored,
            grace=grace,
            host=host,
            allow_hosts=tuple(allowed),
        )
        run(served, memories, settings, Keys(keys), listener)
