"""The server: the page, a picture for each link, and a stream of news of a picture that is being drawn."""

import asyncio
import gzip
import hmac
import io
import json
import re
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from tools.browse.recipe import NUMBERS
from tools.browse.species import known_ranks, real_strip
from tools.browse.studio import Job, Studio

LOCAL = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?", re.IGNORECASE)
SILENT_SECONDS = 20  # after which a connection without a request is closed
HEADERS = {  # of each answer
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again: the model may change
}


class Guard:
    """Passes requests to an app if their path begins with the token or, without a token, if they name this machine as host.

    A page of another site, whose name a name server may have given to this machine, thus gets nothing.
    """

    def __init__(self, app: Starlette, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send):
        answer, headers, (first, slash, rest) = self.app, Headers(scope=scope), scope["path"][1:].partition("/")
        if self.token and not hmac.compare_digest(first.encode(), self.token.encode()):
            answer = PlainTextResponse("The address lacks its token.\n", 403)
        elif self.token:
            scope = scope | {"path": f"/{rest}"}
            answer = self.app if slash else RedirectResponse(f"/{self.token}/")
        elif not LOCAL.fullmatch(headers.get("host", "")):
            answer = PlainTextResponse("This page is for this machine alone.\n", 403)
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            answer = PlainTextResponse("Other sites may link here, but not draw here.\n", 403)
        await answer(scope, receive, send)


class PatientProtocol(H11Protocol):
    """uvicorn's connection, which is closed if no complete request comes for a while."""

    def connection_made(self, transport: asyncio.Transport):
        super().connection_made(transport)
        self.loop.call_later(SILENT_SECONDS, self.watch, None)

    def watch(self, earlier: object):
        if self.cycle is earlier and (earlier is None or earlier.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(SILENT_SECONDS, self.watch, self.cycle)


async def news_of(job: Job, studio: Studio) -> AsyncIterator[str]:
    """Yield the news of a job as lines of JSON; the last line has the recipe and the command, or an error."""
    drawing = asyncio.create_task(studio.wait_for(job))
    drawing.add_done_callback(lambda _: job.changed.set())
    try:
        while not drawing.done():
            await job.changed.wait()
            job.changed.clear()
            news, job.news = job.news, {}
            yield json.dumps(news) + "\n"
        drawing.result()
        last = dict(recipe=job.recipe, command=studio.command(job.recipe))
    except (ValueError, asyncio.QueueFull) as error:
        last = dict(error=str(error))
    finally:
        drawing.cancel()
    yield json.dumps(last) + "\n"


def build_server(studio: Studio, token: str = "") -> uvicorn.Server:
    """Return the server of the page, with as many connections as this process may open files."""
    about = dict(model=studio.adapters[0].about.model, names=studio.names, tiers=known_ranks(studio.hierarchy))
    about |= dict(defaults=studio.defaults, limits={name: limits for name, (_, *limits) in NUMBERS.items()})
    about |= dict(real=bool(studio.images), adapters=[Path(each.about.file).name for each in studio.adapters])
    about |= {name: list(studio.choices[name]) for name in ("guidance", "guide", "sampler")}
    packed = gzip.compress(json.dumps(about).encode())

    async def show_about(_: Request) -> Response:
        return Response(packed, media_type="application/json", headers={"Content-Encoding": "gzip"})

    async def show_picture(request: Request) -> Response:
        recipe = studio.read(dict(request.query_params))
        headers = {"ETag": studio.tag(recipe)}
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        drawing = asyncio.create_task(studio.wait_for(Job(recipe)))
        while not drawing.done():
            await asyncio.wait({drawing}, timeout=0.1)
            if await request.is_disconnected():
                drawing.cancel()
                return Response()  # to nobody
        return Response(drawing.result(), media_type="image/png", headers=headers)

    async def stream_news(request: Request) -> Response:
        job = Job(studio.read(dict(request.query_params)), previews=True)
        return StreamingResponse(news_of(job, studio), media_type="application/x-ndjson")

    def show_real(request: Request) -> Response:
        label, file = studio.read(dict(request.query_params))["class"], io.BytesIO()
        if label not in studio.images:
            return PlainTextResponse("There are no real images.\n", 404)
        real_strip(studio.images[label]).save(file, "JPEG", quality=90)
        return Response(file.getvalue(), media_type="image/jpeg")

    routes = {"/about.json": show_about, "/image.png": show_picture, "/draw": stream_news, "/real.jpg": show_real}
    page = Mount("/", StaticFiles(directory=Path(__file__).parent / "page", html=True))
    codes = {ValueError: 400, asyncio.QueueFull: 503}
    errors = {kind: lambda _, error, code=code: PlainTextResponse(f"{error}\n", code) for kind, code in codes.items()}
    app = Starlette(routes=[*map(Route, routes, routes.values()), page], exception_handlers=errors)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    options = dict(http=PatientProtocol, ws="none", lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
    options |= dict(headers=list(HEADERS.items()), server_header=False, proxy_headers=False)
    return uvicorn.Server(uvicorn.Config(Guard(app, token), **options))
