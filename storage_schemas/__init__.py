"""What lies on disk, and SQL over it. In a notebook: `storage_schemas.connect("demo/workspace").sql("...")`."""

from storage_schemas.sql.views import connect, query

__all__ = ["connect", "query"]
