"""The ASGI application of the control plane."""

from inspect import cleandoc

from litestar import Litestar, Router, get
from litestar.di import Provide
from litestar.enums import MediaType
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, Schema, SecurityScheme
from msgspec import Struct

from tidemill import __version__
from tidemill.control.api import (
    batches,
    credits,
    fleet,
    invoices,
    jobs,
    keys,
    limits,
    margin,
    metrics,
    models,
    operations,
    reservations,
    rolls,
    tenants,
    usage,
)
from tidemill.control.api.auth import bearer_guard
from tidemill.control.api.errors import ERROR_HANDLERS
from tidemill.control.api.schemas import Answer, Body
from tidemill.control.api.strict_query import strict_query
from tidemill.control.platform import Platform

MAX_BODY_BYTES = 1 << 20

HANDLERS = [
    tenants.list_tenants,
    tenants.create_tenant,
    tenants.set_weight,
    keys.list_keys,
    keys.create_key,
    keys.rotate_key,
    keys.revoke_key,
    limits.list_limits,
    limits.set_limits,
    limits.remove_limit,
    credits.grant_credit,
    usage.get_usage,
    invoices.get_invoice,
    invoices.get_invoice_text,
    batches.list_batches,
    batches.show_batch,
    batches.cancel_batch,
    models.list_models,
    models.list_prices,
    rolls.roll_model,
    rolls.list_rolls,
    jobs.list_jobs,
    jobs.submit_job,
    jobs.show_job,
    jobs.cancel_job,
    jobs.job_logs,
    jobs.job_artifacts,
    jobs.job_artifact,
    reservations.list_queues,
    reservations.set_queue,
    reservations.remove_queue,
    reservations.list_reservations,
    reservations.create_reservation,
    reservations.cancel_reservation,
    fleet.get_fleet,
    fleet.get_fleet_why,
    fleet.drain_fleet,
    fleet.undrain_fleet,
    margin.get_margin,
    operations.reconcile,
    operations.reconcile_text,
    operations.check,
    operations.get_status,
]


@get("/", media_type=MediaType.TEXT, include_in_schema=False, sync_to_thread=False)
def index() -> str:
    """For whoever opens this address in a browser."""
    return "Tidemill's control plane. The admin API is under /api/v1, described at /api/openapi.json.\n"


@get("/healthz", media_type=MediaType.TEXT, include_in_schema=False, sync_to_thread=False)
def healthz() -> str:
    """This process answers. Needs no token."""
    return "ok\n"


def create_app(platform: Platform, admin_token_digest: str) -> Litestar:
    """The control plane's application. `admin_token_digest` is the SHA-256 of the admin token in hex."""

    def provide() -> Platform:
        return platform

    api = Router(
        "/api/v1",
        route_handlers=HANDLERS,
        guards=[bearer_guard(admin_token_digest), strict_query],
        dependencies={"platform": Provide(provide, sync_to_thread=False)},
        security=[{"admin_token": []}],
    )
    figures = Router(
        "/",
        route_handlers=[metrics.get_metrics],
        guards=[metrics.metrics_guard(platform, bearer_guard(admin_token_digest))],
        dependencies={"platform": Provide(provide, sync_to_thread=False)},
    )
    app = Litestar(
        [index, healthz, figures, api],
        exception_handlers=ERROR_HANDLERS,
        openapi_config=OpenAPIConfig(
            title="Tidemill admin API",
            version=__version__,
            description="Tenants, keys, credits, usage and invoices. Amounts are decimal strings.",
            path="/api",
            render_plugins=[JsonRenderPlugin(path="/openapi.json", media_type=MediaType.JSON)],
            use_handler_docstrings=True,
            operation_id_creator=lambda handler, method, path: handler.handler_name,
            components=Components(
                security_schemes={"admin_token": SecurityScheme(type="http", scheme="bearer")},
            ),
        ),
        request_max_body_size=MAX_BODY_BYTES,
        logging_config=None,
        debug=False,
    )
    _describe_schemas(app)
    return app


def _describe_schemas(app: Litestar) -> None:
    """Say in the OpenAPI document what the structs' docstrings say, and that bodies have no other fields."""
    schemas = app.openapi_schema.components.schemas
    for struct in _subclasses(Answer) | _subclasses(Body):
        schema = schemas.get(struct.__qualname__)
        if isinstance(schema, Schema):
            schema.description = cleandoc(struct.__doc__ or "")
            if issubclass(struct, Body):
                schema.additional_properties = False


def _subclasses(struct: type[Struct]) -> set[type[Struct]]:
    children = set(struct.__subclasses__())
    return children.union(*(_subclasses(child) for child in children))
