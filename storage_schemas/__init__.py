"""Files on disk, and SQL over them. In a notebook: `storage_schemas.connect("demo/workspace").sql("...")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage_schemas.sql.views import connect, query

__all__ = ["connect", "query"]


def __getattr__(name: str) -> Any:
    """Load `connect` or `query` at first use: they need DuckDB and Arrow, which `fastgda --help` need not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from storage_schemas.sql import views

    return getattr(views, name)
