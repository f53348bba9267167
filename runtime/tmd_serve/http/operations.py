"""`/healthz`, `/readyz`, `/metrics`: for whoever keeps the server running."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel

from ..errors import Refusal
from .context import Context, context_of
from .schema import refusals

router = APIRouter(tags=["operations"], responses=refusals(403))
The = Annotated[Context, Depends(context_of)]


class Health(BaseModel):
    status: str


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=Health, responses=refusals(503))
def readyz(context: The) -> Health:
    """The database answers, and jobs are run."""
    if not context.executor.is_ready():
        raise Refusal("no job is run here: the server is ending, or its worker has.", 503, "not_ready", retry_after=5)
    context.store.counts()
    return Health(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals(401)},
)
def metrics(request: Request, context: The) -> Response:
    """In the text format of Prometheus."""
    registry: CollectorRegistry = request.app.state.registry
    lines = ["# TYPE tmd_jobs gauge"]
    lines += [f'tmd_jobs{{status="{status}"}} {count}' for status, count in context.store.counts().items()]
    for name, value in context.executor.figures().items():
        lines += [f"# TYPE tmd_{name} gauge", f"tmd_{name} {value:g}"]
    lines += ["# TYPE tmd_watchers gauge", f"tmd_watchers {context.executor.board.watchers()}"]
    text = generate_latest(registry).decode() + "\n".join(lines) + "\n"
    return Response(text, media_type=CONTENT_TYPE_LATEST)
