"""The app: routes around a service, and the layer that every request passes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from tasks import logs
from tasks.serving.http import problems
from tasks.serving.http.guard import Guard
from tasks.serving.http.routes import admin, answers, docs, health, indexes, jobs, queries, samples, shares
from tasks.serving.http.routes.page import page_router
from tasks.serving.http.service import Service
from tasks.serving.http.settings import ServiceSettings

DESCRIPTION = "Which training images made this generated image?"


def create_app(settings: ServiceSettings) -> FastAPI:
    """Return the app of one worker process; what it answers from is loaded when it starts."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="FastGDA", version="1", description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    problems.install(app)
    for module in (answers, jobs, samples, queries, shares, indexes, admin, health, docs):
        app.include_router(module.router)
    if settings.page:
        app.include_router(page_router())
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key"],
        )
    app.add_middleware(Guard, service=service, access_log=logs.shown("info"))
    return app


def from_environment() -> FastAPI:
    """Return the app that the command asked for, in a process of its own."""
    logs.set_up_once()
    return create_app(ServiceSettings.from_environment())
