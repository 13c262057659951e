"""Files, batches and stored responses."""

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, String, Table, Text

from tidemill.store.tables.metadata import metadata

files = Table(
    "files",
    metadata,
    Column("file_id", String(40), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("site", String(32), nullable=False),
    Column("purpose", String(24), nullable=False),
    Column("filename", String(512), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index(None, "tenant_id", "created_at"),
    Index(None, "expires_at"),
)
"""Files of the Files API. Their bytes lie on a disk: `site` is the directory (see `store.blobs`)."""

batches = Table(
    "batches",
    metadata,
    Column("batch_id", String(40), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("site", String(32), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(40), nullable=False, index=True),
    Column("completion_window", String(8), nullable=False),
    Column("metadata", Text),
    Column("output_expires_s", BigInteger),
    Column("model", String(128)),
    Column("status", String(16), nullable=False),
    Column("outcome", String(16)),
    Column("errors", Text),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Index(None, "tenant_id", "created_at"),
    Index(None, "status", "expires_at"),
)
"""Batches of the Batch API. `metadata` and `errors` are JSON; `outcome` is what a finalizing batch becomes."""

responses = Table(
    "responses",
    metadata,
    Column("response_id", String(48), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("previous_id", String(48)),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Index(None, "tenant_id", "created_at"),
    Index(None, "expires_at"),
)
"""Responses that tenants asked to be kept (`store.responses`): their input items and themselves, JSON under zlib."""
