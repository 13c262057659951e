"""The admin API: an ASGI application under /api/v1, described at /api/openapi.json."""

from tidemill.control.api.app import create_app

__all__ = ["create_app"]
