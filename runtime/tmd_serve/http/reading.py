"""Reads the body of a request: JSON or a form, in bounds, into one of `bodies`."""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from ..errors import Refusal
from ..settings import Limits
from .bodies import ImageReference
from .sentences import refusal_of, short

Body = TypeVar("Body", bound=BaseModel)

_FIELDS = 40
_FIELD_BYTES = 1 << 17


async def read_body(request: Request, kind: type[Body], limits: Limits) -> tuple[Body, bytes | None]:
    """The request, and the file `input_reference` of a form. Raises Refusal."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "application/json":
        try:
            return kind.model_validate_json(await request.body()), None
        except ValidationError as error:
            raise _explained(error) from None
    if media in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(request, kind, limits)
    raise Refusal(
        "the body must be JSON (Content-Type: application/json) or a form (multipart/form-data).",
        415,
        "unsupported_media_type",
    )


async def _read_form(request: Request, kind: type[Body], limits: Limits) -> tuple[Body, bytes | None]:
    fields: dict[str, Any] = {}
    upload: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                if name in fields or (name == "input_reference" and upload is not None):
                    raise Refusal(f"the field {short(name)} comes twice: give it once.", param=short(name))
                if not isinstance(value, UploadFile):
                    fields[name] = value
                elif name == "input_reference" and not value.filename and not value.size:
                    continue  # a browser's form with no file chosen
                elif name == "input_reference":
                    upload = await value.read(limits.upload_bytes + 1)
                else:
                    raise Refusal(f"the field {short(name)} takes no file.", param=short(name))
    except (MultiPartException, HTTPException, UnicodeDecodeError) as error:
        reason = getattr(error, "detail", None) or getattr(error, "message", None) or "it is not UTF-8"
        raise Refusal(f"the form cannot be read ({reason}): send multipart/form-data.", code="invalid_form") from None
    if upload is not None and len(upload) > limits.upload_bytes:
        raise too_large(limits.upload_bytes)
    if "input_reference[image_url]" in fields:  # as OpenAI's clients write an object into a form
        fields["input_reference"] = {"image_url": fields.pop("input_reference[image_url]")}
    try:
        return kind.model_validate(fields), upload
    except ValidationError as error:
        raise _explained(error) from None


def picture_in(reference: ImageReference | str | None, limits: Limits) -> bytes | None:
    """The bytes of a picture that lies in the request as a data URL. Raises Refusal."""
    if reference is None:
        return None
    url = (reference.image_url or "") if isinstance(reference, ImageReference) else str(reference)
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise Refusal(
            "input_reference must be a file of a form, or a picture inside the request (data:image/png;base64,...): "
            "this server follows no address.",
            param="input_reference",
        )
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(
            "the picture in input_reference is not base64: encode it again.", param="input_reference"
        ) from None
    if len(found) > limits.upload_bytes:
        raise too_large(limits.upload_bytes)
    return found


def too_large(most: int) -> Refusal:
    return Refusal(
        f"the picture is larger than {most / 1e6:.3g} MB, which this server allows: save it smaller.",
        413,
        "too_large",
        "input_reference",
    )


def _explained(error: ValidationError) -> Refusal:
    return refusal_of(error.errors(include_url=False, include_input=False))
