"""The routes `/v1/memories`: the stored memories of an owner."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from pydantic import Json

from nugget2d.files import decode_text
from nugget2d.memory.states import StoreDtype
from nugget2d.server.api_errors import APIError, documented
from nugget2d.server.bodies import BoundedRoute
from nugget2d.server.context import RequestContext
from nugget2d.server.schemas import (
    DeletedMemory,
    MemoryList,
    MemoryQuery,
    MemoryRequest,
    MethodName,
    Name,
    Options,
    StoredMemory,
    Tag,
)
from nugget2d.server.service import Service
from nugget2d.store import Record, Wanted

REFUSED = documented(400, 401, 408, 413, 415, 422, 429, 500, 503, 504)
LISTED = documented(401, 404, 408, 413, 422, 429, 500, 503, 504)
# of the upload form; FastAPI would drop others in silence
FIELDS = {"file", "name", "tags", "method", "ratio", "nuggets", "nbytes", "dtype", "options"}
FOUND = documented(401, 404, 408, 413, 422, 429, 500, 503, 504)


def memories(service: Service) -> APIRouter:
    """The routes that keep memories."""
    api = APIRouter(prefix="/v1/memories", route_class=BoundedRoute)
    store = service.store

    @api.post("", status_code=201, responses=REFUSED)
    async def create(body: MemoryRequest, request: Request) -> StoredMemory:
        """Compress a text and keep the memory; the earlier one, if this text was compressed so before."""
        return shown(await service.remember(RequestContext.of(request), body))

    @api.post(
        "/file",
        status_code=201,
        responses=REFUSED,
        # 32 tags and some fields more, each as long as options may need
        form_limits={"max_files": 1, "max_fields": 64, "max_part_size": 1 << 16},
    )
    async def upload(
        request: Request,
        file: Annotated[UploadFile, File(description="A UTF-8 text.")],
        name: Annotated[Name | None, Form(description="The file's own, if left out.")] = None,
        tags: Annotated[list[Tag], Form(max_length=32)] = [],  # noqa: B006 - read only
        method: Annotated[MethodName | None, Form()] = None,
        ratio: Annotated[float | None, Form(ge=1, le=1e6)] = None,
        nuggets: Annotated[int | None, Form(ge=1)] = None,
        nbytes: Annotated[int | None, Form(ge=1)] = None,
        dtype: Annotated[StoreDtype | None, Form()] = None,
        options: Annotated[Json[Options] | None, Form(description="JSON, the method's own options.")] = None,
    ) -> StoredMemory:
        """The same for a text file, as a form."""
        if unknown := sorted(set(await request.form()) - FIELDS):
            raise APIError(
                422, f"{', '.join(unknown)}: no such field; there are {', '.join(sorted(FIELDS))}", param=unknown[0]
            )
        text = decode_text(await file.read(), "the file")
        title = (file.filename or "")[:200] if name is None else name
        body = MemoryRequest(
            text=text,
            name=title,
            tags=tags,
            method=method,
            ratio=ratio,
            nuggets=nuggets,
            nbytes=nbytes,
            dtype=dtype,
            options=options or {},
        )
        return shown(await service.remember(RequestContext.of(request), body))

    @api.get("", responses=LISTED)
    async def listed(request: Request, query: Annotated[MemoryQuery, Query()]) -> MemoryList:
        """A part of them, oldest first; those that are damaged are left out."""
        context = RequestContext.of(request)
        wanted = Wanted(context.owner, query.tag, query.after, query.limit, query.order == "desc")
        page = await service.in_thread(context, lambda: store.page(wanted))
        if page.damages:
            context.metrics["damaged"] = [damage.id for damage in page.damages]
        data = [shown(record) for record in page.records]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return MemoryList(data=data, first_id=first, last_id=last, has_more=page.more)

    @api.get("/{id}", responses=FOUND)
    async def one(id: str, request: Request) -> StoredMemory:
        """One of them."""
        context = RequestContext.of(request)
        return shown(await service.in_thread(context, lambda: store.record(id, owner=context.owner)))

    @api.delete("/{id}", responses=FOUND)
    async def forget(id: str, request: Request) -> DeletedMemory:
        """Forget one; requests that read it already continue."""
        context = RequestContext.of(request)
        await service.in_thread(context, lambda: store.remove(id, owner=context.owner))
        return DeletedMemory(id=id)

    return api


def shown(record: Record) -> StoredMemory:
    """What an owner is told of a memory."""
    return StoredMemory(
        id=record.id,
        created_at=int(datetime.fromisoformat(record.created).timestamp()),
        name=record.name,
        tags=list(record.tags),
        num_tokens=record.num_tokens,
        num_nuggets=record.num_nuggets,
        num_chars=record.num_chars,
        ratio=record.ratio,
        bytes=record.nbytes,
    )
