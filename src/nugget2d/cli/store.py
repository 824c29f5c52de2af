"""`nugget2d store`: adds, lists, searches and checks the memories of a store."""

import json as json_format
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nugget2d.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    ModelName,
    StorePlace,
    Tag,
    Tags,
    takes_compress_options,
)
from nugget2d.cli.shared import (
    load_model,
    one_line,
    progress,
    read_source,
    safe_to_interrupt,
    say,
    show_own_warnings,
    write_stdout,
)
from nugget2d.errors import InputError, UnknownMemoryError

if TYPE_CHECKING:
    from nugget2d.store import MemoryStore, Record

SHORT = 12  # digits of an id that are shown

store = typer.Typer(name="store", no_args_is_help=True, help="Store memories, and find them again.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SearchModel = Annotated[
    str | None,
    typer.Option("--model", help="Only memories that this model can read.", show_default="all"),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="An id, or its first digits.")]


@store.command()
@takes_compress_options
def add(
    files: Annotated[list[str], typer.Argument(metavar="FILES...|-", help="UTF-8 texts; - reads standard input.")],
    store: StorePlace = DEFAULT_STORE,
    tag: Tags = None,
    *,
    options: dict[str, Any],
    model: ModelName = DEFAULT_MODEL,
) -> None:
    """Compress texts into the store; one that it has already, made the same way, is not compressed again."""
    texts = [read_source(file) for file in files]
    compressor = load_model(model)
    with _open(store, create=True) as memories:
        for file, text in zip(files, texts, strict=True):
            start = datetime.now(timezone.utc).isoformat(timespec="microseconds")
            with progress("compressing") as on_progress:
                record = memories.add(
                    compressor,
                    text,
                    name="" if file == "-" else file,
                    tags=tag or (),
                    on_progress=on_progress,
                    **options,
                )
            known = " (was there)" if record.created < start else ""
            typer.echo(
                f"{record.id[:SHORT]}  {one_line(record.name)}  {record.num_tokens:,} tokens, "
                f"{record.num_nuggets:,} nuggets{known}"
            )


@store.command("list")
def list_records(store: StorePlace = DEFAULT_STORE, tag: Tag = None, json: Json = False) -> None:
    """List the memories, oldest first."""
    with _open(store) as memories:
        records = memories.records(tag=tag)
    if json:
        _print_json([record.model_dump(mode="json") for record in records])
        return
    head = ["id", "tokens", "nuggets", "bytes", "created", "name", "tags"]
    rows = [
        [
            record.id[:SHORT],
            f"{record.num_tokens:,}",
            f"{record.num_nuggets:,}",
            f"{record.nbytes:,}",
            record.created[:19],
            one_line(record.name),
            one_line(", ".join(record.tags)),
        ]
        for record in records
    ]
    _print_columns(head, rows, right={1, 2, 3})


@store.command()
def show(id: Id, store: StorePlace = DEFAULT_STORE, json: Json = False) -> None:
    """Show the record of a memory, and where its file is."""
    with _open(store) as memories:
        record = _find(memories, id)
        place = memories.place(record.id)
    if json:
        _print_json({**record.model_dump(mode="json"), "file": place})
        return
    settings = record.settings
    given = {} if settings is None else settings.model_dump(exclude={"method", "config"}) | settings.config
    lines = {
        "id": record.id,
        "name": one_line(record.name),
        "tags": one_line(", ".join(record.tags)),
        "owner": one_line(record.owner),
        "created": record.created,
        "model": f"{one_line(record.model.name)} {record.model.model[:SHORT]}",
        "method": "" if settings is None else settings.method,
        "settings": ", ".join(f"{name} {value}" for name, value in given.items() if value),
        "characters": f"{record.num_chars:,}",
        "tokens": f"{record.num_tokens:,}",
        "nuggets": f"{record.num_nuggets:,}",
        "ratio": f"{record.ratio:.2f}",
        "bytes": f"{record.nbytes:,}",
        "file": place,
    }
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:<12}{value}")


@store.command()
def rm(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or their first digits.")],
    store: StorePlace = DEFAULT_STORE,
) -> None:
    """Remove memories."""
    with _open(store) as memories:
        for whole in [_whole(memories, id) for id in ids]:
            memories.remove(whole)
            say("removed", whole)


@store.command()
def search(
    query: Annotated[str, typer.Argument(help="Words to search for.")],
    store: StorePlace = DEFAULT_STORE,
    tag: Tag = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many to show.")] = 10,
    model: SearchModel = None,
    json: Json = False,
) -> None:
    """Search the memories by words; shows the most relevant part of each."""
    with _open(store) as memories:
        hits = memories.search(query, top=top, tag=tag, model=None if model is None else load_model(model))
    if json:
        _print_json([{**hit._asdict(), "record": hit.record.model_dump(mode="json")} for hit in hits])
        return
    rows = [
        [f"{hit.score:.3f}", hit.record.id[:SHORT], f"{hit.start}:{hit.end}", one_line(hit.record.name)] for hit in hits
    ]
    _print_columns(["score", "id", "characters", "name"], rows, right={0, 2})


@store.command()
def verify(store: StorePlace = DEFAULT_STORE) -> None:
    """Read every memory, check it against its checksums, and name what is damaged."""
    with _open(store) as memories:
        with safe_to_interrupt():  # the first memory that is read brings torch
            damages = memories.verify()
        for damage in damages:
            say("error", f"{damage.id or 'index'}: {damage.reason}")
        if damages:
            raise typer.Exit(1)
        say("verified", f"{len(memories.matching('')):,} memories, nothing is damaged")


@store.command()
def gc(store: StorePlace = DEFAULT_STORE) -> None:
    """Remove files that interrupted writers left, if they are older than an hour."""
    with _open(store) as memories:
        swept = memories.gc()
    say("removed", f"{swept.files:,} files, {swept.nbytes:,} bytes")


def _open(place: str, *, create: bool = False) -> "MemoryStore":
    from nugget2d.store import MemoryStore

    show_own_warnings()
    return MemoryStore(place, create=create)


def _find(memories: "MemoryStore", id: str) -> "Record":
    return memories.record(_whole(memories, id))


def _whole(memories: "MemoryStore", id: str) -> str:
    """The id that begins with these digits.

    Raises:
        UnknownMemoryError: none does.
        InputError: several do.
    """
    found = memories.matching(id)
    if not found:
        raise UnknownMemoryError(f"no id in this store begins with {id!r}; see `nugget2d store list`")
    if len(found) > 1:
        raise InputError(f"{len(found)} ids begin with {id!r}; give more digits")
    return found[0]


def _print_columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int]) -> None:
    """Print aligned columns, of any width, for other programs."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        typer.echo("  ".join(cells).rstrip())


def _print_json(value: Any) -> None:
    """In UTF-8, whatever the terminal's encoding; bytes of a path that are not are escaped as JSON does."""
    write_stdout(json_format.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
