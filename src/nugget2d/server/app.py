"""The ASGI application: routes and error handlers."""

import time

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from nugget2d import __version__
from nugget2d.errors import NuggetError
from nugget2d.server.api_errors import APIError, api_error, documented
from nugget2d.server.completions import completions, require_model
from nugget2d.server.context import RequestContext
from nugget2d.server.memories import memories
from nugget2d.server.middleware import Middleware
from nugget2d.server.schemas import Model, ModelList
from nugget2d.server.service import Service
from nugget2d.server.settings import Keys


def make_app(service: Service, keys: Keys) -> Middleware:
    """Everything that is served, inside its middleware."""
    # no pages about the API: they would load scripts from elsewhere
    app = FastAPI(title="nugget2d", version=__version__, docs_url=None, redoc_url=None, responses=documented(403))
    # the middleware checks the key: this is for the document
    documents_key = [Security(HTTPBearer(auto_error=False))] if keys.asked else []
    for routes in (_models(service), completions(service), memories(service)):
        app.include_router(routes, dependencies=documents_key)
    app.include_router(_upkeep(service))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _by_status)
    app.add_exception_handler(APIError, _failed)
    app.add_exception_handler(NuggetError, _failed)
    app.add_exception_handler(Exception, _failed)
    return Middleware(app, service.settings, keys, service.metrics, service.room)


def _models(service: Service) -> APIRouter:
    api = APIRouter(prefix="/v1/models")
    served = Model(id=service.settings.name, created=int(time.time()))

    @api.get("", responses=documented(401))
    async def listed() -> ModelList:
        """The one that is served."""
        return ModelList(data=[served])

    @api.get("/{name}", responses=documented(401, 404, 422))
    async def one(name: str) -> Model:
        """It, if that is its name."""
        require_model(service, name)
        return served

    return api


def _upkeep(service: Service) -> APIRouter:
    """For the server's operator; needs no key, and shows no data of clients."""
    api = APIRouter()

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        return {"status": "ok"}

    @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return api


async def _failed(request: Request, error: Exception) -> JSONResponse:
    answer = api_error(error)
    if answer.status >= 500:
        RequestContext.of(request).metrics["reason"] = f"{type(error).__name__}: {error}"
    return answer.response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What does not fit the schema: the first thing that is wrong, and where."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = ".".join(str(part) for part in first.get("loc", ())[1:])
    return APIError(422, f"{place or 'the body'}: {first.get('msg')}", "invalid_value", place or None).response()


async def _by_status(request: Request, error: Exception) -> JSONResponse:
    """What is no route, or no method of one."""
    status, reason = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
    headers = {"Allow": ", ".join(_methods(request))} if status == 405 else None
    return APIError(status, f"{request.method} {request.url.path}: {reason}", headers=headers).response()


def _methods(request: Request) -> list[str]:
    """All that the routes of this path take (FastAPI's own answer knows those of one route only)."""
    scope = {key: request.scope[key] for key in ("type", "path", "root_path")}
    routes = request.app.routes

    def taken(method: str) -> bool:
        return any(route.matches(scope | {"method": method})[0] is Match.FULL for route in routes)

    methods = [method for method in ("GET", "POST", "DELETE") if taken(method)]
    return ["HEAD", *methods] if "GET" in methods else methods  # the middleware makes a GET of it
