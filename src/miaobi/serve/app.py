"""The application: paths, and what they answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from miaobi import __version__
from miaobi.serve import answers, judging, openai_api, responses, runs, schemas
from miaobi.serve.config import Serve, is_loopback
from miaobi.serve.errors import APIError, ErrorBody, json_response, of_validation, on_api_error, on_http_error, refused
from miaobi.serve.guard import Guard, Named
from miaobi.serve.metrics import Metrics
from miaobi.serve.served import Served, ServedModel
from miaobi.serve.sse import EventStream
from miaobi.serve.text_request import model_of

PAGE = Path(__file__).with_name("page")
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
          "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
GUARDED = ("/v1/", "/metrics", "/tokenize", "/detokenize", "/classify", "/api/", "/openapi.json")
FAILURES = (400, 401, 403, 404, 408, 413, 429, 500, 503)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in FAILURES}
# Before OpenAPI 3.2, the schema of a stream is read as that of each of its events.
TEXT = {"type": "string"}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": TEXT, "event": TEXT}}
STREAM = {"text/event-stream": {"schema": EVENT}}


def make_app(server: Serve, served: Served | None = None, is_stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    """The application; where `served` is None it answers 503 until `app.state.served` is set.

    is_stopping: whether the server is about to end, so that streams without an end should.
    """
    app = FastAPI(title="miaobi", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
                  responses=ERRORS, redirect_slashes=False)  # fmt: skip
    app.state.served = served
    app.state.metrics = served.metrics if served is not None else Metrics()
    app.add_exception_handler(APIError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    local = is_loopback(server.host) and server.api_key is None
    app.add_middleware(Guard, key=server.api_key, only_local=local, guarded=GUARDED, metrics=app.state.metrics)
    if server.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(server.cors), allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["x-request-id", "retry-after"])  # fmt: skip
    app.add_middleware(Named)
    add_writing(app, server)
    add_others(app, is_stopping)
    add_page(app)
    app.openapi = lambda: document(app)
    return app


def current(request: Request) -> Served:
    """What is served. Raises APIError while it is being loaded."""
    if request.app.state.served is None:
        raise APIError(503, "the model is being loaded; try again soon", "loading", headers={"Retry-After": "2"})
    return request.app.state.served


Current = Annotated[Served, Depends(current)]


def add_writing(app: FastAPI, server: Serve) -> None:
    """OpenAI's paths, and vLLM's for tokens."""

    def streams(model: type) -> dict[int | str, dict[str, Any]]:
        return {200: {"model": model, "content": STREAM}}

    @app.post("/v1/chat/completions", responses=streams(answers.ChatCompletion))
    async def chat_completions(body: schemas.ChatRequest, request: Request, served: Current) -> Response:
        return await openai_api.chat_completions(body, request, served, server)

    @app.post("/v1/completions", responses=streams(answers.Completion))
    async def completions(body: schemas.CompletionRequest, request: Request, served: Current) -> Response:
        return await openai_api.completions(body, request, served, server)

    @app.post("/v1/responses", responses=streams(dict[str, Any]))
    async def new_response(body: schemas.ResponseRequest, request: Request, served: Current) -> Response:
        return await responses.responses(body, request, served, server)

    @app.get("/v1/models", response_model=answers.Models)
    async def models(served: Current) -> Response:
        return json_response(
            {"object": "list", "data": [model_entry(w) for w in (served.model or served.chat_model,) if w is not None]}
        )

    @app.get("/v1/models/{model:path}", response_model=answers.Model)
    async def one_model(model: str, served: Current) -> Response:
        return json_response(model_entry(model_of(served.model or served.for_chats, model)))

    @app.post("/tokenize", response_model=answers.Tokens)
    async def tokenize(body: schemas.TokenizeRequest, served: Current) -> Response:
        model = model_of(served.model if body.messages is None else served.for_chats, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise refused("give either prompt or messages", "prompt", "missing_required_parameter")
        if body.messages is not None:
            messages = [{"role": message.role, "content": message.words} for message in body.messages]
            ids = (await openai_api.conversation(model, messages, None, body.chat_template_kwargs))[0].ids
        else:
            prompt = await asyncio.to_thread(model.encode, body.prompt)
            ids = prompt.ids if body.prompt else []
            ids = ids[prompt.silent :] if body.add_special_tokens is False else ids
        strs = [model.names.name(id_) for id_ in ids] if body.return_token_strs else None
        return json_response({"count": len(ids), "max_model_len": model.block, "tokens": ids, "token_strs": strs})

    @app.post("/detokenize", response_model=answers.Prompt)
    async def detokenize(body: schemas.DetokenizeRequest, served: Current) -> Response:
        model = model_of(served.model, body.model)
        if any(id_ >= model.lm.model.cfg.vocab_size for id_ in body.tokens):
            raise refused(f"this model's tokens go to {model.lm.model.cfg.vocab_size - 1}", "tokens")
        return json_response({"prompt": model.lm.tokenizer.decode(body.tokens)})


def add_others(app: FastAPI, is_stopping: Callable[[], bool]) -> None:
    """Classifier, runs, health, metrics."""

    @app.post("/classify", response_model=answers.Labels)
    async def classify(body: schemas.ClassifyRequest, served: Current) -> Response:
        return json_response(await judging.classify(body, served))

    @app.get("/health")
    async def health(served: Current) -> Response:
        if not all(worker.is_alive() for worker in served.workers):
            raise APIError(503, "the thread that writes has ended; start the server again", "dead")
        return json_response({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/api/info")
    async def info(served: Current) -> Response:
        judge = served.judge
        classifier = None if judge is None else {"name": served.judge_name, "labels": judge.labels}
        model = None if served.for_chats is None else model_info(served.model or served.for_chats, served.for_chats)
        other = None if served.chat_model is None else model_info(served.chat_model, served.chat_model)
        return json_response({"model": model, "chat_model": other, "classifier": classifier,
                              "runs": served.runs is not None, "version": __version__})  # fmt: skip

    @app.get("/api/runs")
    async def all_runs(served: Current) -> Response:
        return json_response(await asyncio.to_thread(listed, served.runs))

    @app.get("/api/runs/{name}")
    async def one_run(name: str, served: Current, after: Annotated[int, Query(ge=-1, le=1 << 53)] = -1) -> Response:
        run = await asyncio.to_thread(runs.run_named, served.runs, name)
        return json_response(await asyncio.to_thread(runs.contents, name, run, after))

    @app.get("/api/runs/{name}/stream", response_class=PlainTextResponse, responses={200: {"content": STREAM}})
    async def run_stream(name: str, served: Current) -> Response:
        run = await asyncio.to_thread(runs.run_named, served.runs, name)
        return EventStream(runs.live_metrics(run, is_stopping), lambda: None)


def listed(root: Path | None) -> list[dict[str, Any]]:
    """All runs."""
    return [runs.summary(name, run) for name, run in runs.listing(root).items()] if root is not None else []


def model_entry(model: ServedModel) -> dict[str, Any]:
    """As OpenAI lists a model."""
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "miaobi"}


def model_info(model: ServedModel, for_chats: ServedModel) -> dict[str, Any]:
    """What the page tells of a model, and of what answers chats in its name."""
    lm, path = model.lm, model.lm.path
    step = re.fullmatch(r"step-(\d+)", path.resolve().name) if path is not None else None
    card = path / "README.md" if path is not None else None
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    settings = for_chats.chat_settings if for_chats.chat else model.completion_settings
    return {
        "name": model.name, "parameters": lm.model.num_parameters(), "family": lm.model.cfg.family,
        "block_size": model.block, "vocab_size": lm.model.cfg.vocab_size, "step": int(step[1]) if step else None,
        "chat": for_chats.chat is not None, "control_tokens": sorted(model.names.control.values()),
        "card": runs.beginning(card) if card and card.is_file() else None,
        "sampling": {name: getattr(settings, name) for name in names},
    }  # fmt: skip


class Page(StaticFiles):
    """The page's files: fetched anew each time (a 304 costs little), and allowed to load nothing from elsewhere."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        response.headers["content-security-policy"] = POLICY
        response.headers["referrer-policy"] = "no-referrer"
        return response


def add_page(app: FastAPI) -> None:
    """The page at /, its files at /page/."""
    files = Page(directory=PAGE)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.mount("/page", files)


async def on_invalid(_: Request, error: RequestValidationError) -> Response:
    """Handler: a body or a query that is not as the schemas say."""
    return of_validation(error.errors(), error.body).response()


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: without FastAPI's 422, which here is 400, and with the names that `model` may have."""
    made = FastAPI.openapi(app)
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    served = app.state.served
    if served is not None and served.for_chats is not None:
        for name, schema in made["components"]["schemas"].items():
            about = schema.get("properties", {}).get("model")
            if name.endswith("Request") and about is not None and name != "ClassifyRequest":
                served_name = served.for_chats.name
                about["enum"] = [served_name] if about.get("type") == "string" else [served_name, None]
    return made
