"""`/v1/models`: which models there are, and what each can be asked for."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from ..executor import ModelCard
from .answers import ModelList, ModelObject
from .context import Context, context_of
from .schema import refusals

router = APIRouter(prefix="/v1/models", tags=["models"], responses=refusals(401, 403))
The = Annotated[Context, Depends(context_of)]


@router.get("", response_model=ModelList)
def list_models(context: The) -> ModelList:
    """All models; the first one is what a request gets that names none."""
    return ModelList(data=[_object(card) for card in context.executor.models])


@router.get("/{model}", response_model=ModelObject, responses=refusals(404))
def get_model(model: str, context: The) -> ModelObject:
    """One model."""
    return _object(context.card(model, stills=False))


def _object(card: ModelCard) -> ModelObject:
    return ModelObject(id=card.id, created=card.created, tmd=card.options)
