"""A question as it comes over HTTP: fields of a form or of JSON, checked before anything is decoded or computed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from tasks.serving.answers import Tier
from tasks.serving.http.problems import Problem
from tasks.serving.http.settings import Limits

FORM, JSON, LINES = "multipart/form-data", "application/json", "application/x-ndjson"
FIELDS = 16  # parts that a form may have; a question has eleven fields
TEXT_BYTES = 1 << 18  # of a field that is no image: 10,000 train_ids are less
EXAMPLE: dict[str, Any] = {"query_id": "q0000", "k": 8, "beside": True}


Body = TypeVar("Body", bound=BaseModel)


def body_of(kind: type[BaseModel], example: dict[str, Any], *, json_only: Sequence[str] = ()) -> dict[str, Any]:
    """Return, for OpenAPI, the two forms in which a body with an image comes: `json_only` names fields of one alone."""
    plain = kind.model_json_schema()
    form = {**plain, "properties": {**plain["properties"], "image": {"type": "string", "format": "binary"}}}
    for name in json_only:
        form["properties"].pop(name)
    content = {JSON: {"schema": json_schema(kind), "example": example}, FORM: {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a body in JSON, whose image is base64."""
    schema = kind.model_json_schema()
    schema["properties"]["image"] = {"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}]}
    return schema


class Question(BaseModel):
    """Which training images made this image? An image and its caption, or a stored query, or a vector."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]}, allow_inf_nan=False)

    image: bytes | None = Field(
        default=None, description="PNG, JPEG or WebP: a file of a form, base64 in JSON; never a URL"
    )
    caption: str | None = Field(default=None, description="the caption that the image was generated from")
    query_id: str | None = Field(
        default=None, max_length=200, description="a stored query, in place of image and caption"
    )
    vector: list[float] | None = Field(
        default=None, description="a vector of the head's width, in place of image and caption"
    )
    k: int = Field(default=20, description="how many training images")
    tier: Tier = Field(
        default="fast", description="fast: head and index; sketch: gradients; exact: the teacher, as a job"
    )
    where: str | None = Field(default=None, description="SQL condition on columns of samples: licence = 'CC0'")
    exclude: list[int] = Field(default_factory=list, description="train_ids that are left out")
    first: int | None = Field(
        default=None, ge=1, description="of tier sketch: score the fast tier's first so many alone"
    )
    around: int = Field(default=8, description="samples of each list beside the hits: what lowers, what looks alike")
    beside: bool = Field(
        default=False,
        description="answer in the other ways, too, that take a moment: tiers that are ready, and untuned features of "
        "images and of captions; not of a vector",
    )
    relative: bool = Field(
        default=False, description="of tier sketch: divide scores by the length of the sample's gradient"
    )

    def check(self, limits: Limits) -> None:
        """Raise Problem where a limit is passed, or where the question asks several things or none."""
        if not 1 <= self.k <= limits.k:
            raise Problem(400, f"k is {self.k}: ask for 1 to {limits.k}", "k")
        if not 0 <= self.around <= limits.k:
            raise Problem(400, f"around is {self.around}: ask for 0 to {limits.k}", "around")
        for name, most in (("caption", limits.caption), ("where", limits.where), ("exclude", limits.exclude)):
            if len(value := getattr(self, name) or ()) > most:
                raise Problem(400, f"{name} has {len(value)} entries or characters: {most} at most", name)
        if self.where is not None and "\0" in self.where:
            raise Problem(400, "where holds a character that no condition has", "where")
        if self.tier == "fast" and (self.first is not None or self.relative):
            raise Problem(400, "first and relative are of tier sketch: ask tier sketch", "tier")
        if self.beside and self.vector is not None:
            raise Problem(400, "beside needs an image with its caption or a query_id: a vector has neither", "beside")
        asked = [name for name in ("query_id", "vector") if getattr(self, name) is not None]
        if self.image is not None or self.caption is not None:
            asked.append("image")
        if len(asked) != 1:
            found = f"{' and '.join(asked)} at once" if asked else "nothing"
            raise Problem(400, f"asked is {found}: give an image with its caption, or a query_id, or a vector", "image")
        if self.image is not None and not self.image:
            raise Problem(400, "image is empty: give a PNG, JPEG or WebP file", "image")
        if self.caption is not None and not self.caption.strip():
            raise Problem(400, "caption is blank: give the caption that the image was generated from", "caption")


async def read_question(request: Request, limits: Limits) -> Question:
    """Read the question of a request's body.

    Raises:
        Problem: it is no question, or one that passes a limit.
    """
    question = checked(Question, await read_fields(request))
    question.check(limits)
    return question


async def read_fields(request: Request) -> Any:
    """Return the fields of a body, of a form or of JSON, in which `image` is the bytes of a file.

    Raises:
        Problem: the body is of another type, or is none.
    """
    kind = _kind(request)
    if kind == FORM:
        return await _of_form(request)
    if kind == JSON:
        return _with_image(_loaded(await request.body()))
    raise Problem(415, f"content-type is {kind or 'missing'!r}: send {FORM} or {JSON}", "content-type")


async def read_questions(request: Request, limits: Limits) -> list[Question | Problem]:
    """Read the questions of a batch; in the place of one that is none, or passes a limit, stands why.

    Raises:
        Problem: the body is no batch, or too large a one.
    """
    if _kind(request) != JSON:
        raise Problem(415, f"content-type is {_kind(request) or 'missing'!r}: send {JSON}", "content-type")
    fields = _loaded(await request.body())
    questions = fields.get("questions") if isinstance(fields, dict) else None
    if not isinstance(questions, list) or len(fields) > 1:
        raise Problem(400, 'the body has to be {"questions": [...]}', "questions")
    if not 1 <= len(questions) <= limits.questions:
        raise Problem(400, f"there are {len(questions)} questions: ask 1 to {limits.questions}", "questions")
    return [_parsed_or_why(each, limits) for each in questions]


def _parsed_or_why(fields: Any, limits: Limits) -> Question | Problem:
    try:
        question = checked(Question, _with_image(fields))
        question.check(limits)
        if question.tier == "exact":
            raise Problem(400, "tier exact takes minutes: ask it alone, as a job", "tier")
        return question
    except Problem as problem:
        return problem


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _loaded(content: bytes) -> Any:
    try:
        return from_json(content)  # a vector of 1,024 numbers in a fifth of the time that `json` takes
    except ValueError:
        raise Problem(400, "the body is no JSON") from None


def _with_image(fields: Any) -> dict[str, Any]:
    """Return what JSON held, its image from base64."""
    if not isinstance(fields, dict):
        raise Problem(400, "a question has to be a JSON object of its fields")
    if isinstance(image := fields.get("image"), str):
        try:
            fields["image"] = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise Problem(400, "image is no base64 of a file's bytes; a URL is never fetched", "image") from None
    elif image is not None:
        raise Problem(400, "image has to be a text: base64 of a file's bytes", "image")
    return fields


async def _of_form(request: Request) -> dict[str, Any]:
    """Return the fields of a question from the parts of a form; a file's name is never looked at."""
    fields: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=FIELDS, max_part_size=TEXT_BYTES) as form:
        for name, value in form.multi_items():
            if name in fields:
                raise Problem(400, f"{name[:64]} is there twice", name[:64])
            if isinstance(value, UploadFile):
                if name != "image":
                    raise Problem(400, f"{name[:64]} is a file: only image may be one", name[:64])
                fields[name] = await value.read()
            elif name == "image":
                raise Problem(400, "image has to be a file of the form; a URL is never fetched", name)
            elif name in ("exclude", "vector"):
                fields[name] = _numbers(name, value)
            elif value != "":  # a field of a page's form that was left empty
                fields[name] = value
    return fields


def _numbers(name: str, text: str) -> list[Any]:
    """Return numbers with commas between, or a JSON list of them."""
    try:
        found = json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
    except (ValueError, RecursionError):
        raise Problem(400, f"{name} has to be numbers with commas between", name) from None
    if not isinstance(found, list):
        raise Problem(400, f"{name} has to be numbers with commas between", name)
    return found


def checked(kind: type[Body], fields: Any) -> Body:
    """Return what was asked from its fields; Problem: one of them is not as it has to be."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:64]
        raise Problem(400, f"{where}: {first['msg']}", where) from None
