"""The words of Anthropic's Messages API, and what OpenAI's chat calls the same.

The engine reads them in one direction and `gateway.protocols.anthropic` writes them in the other.

Source: Anthropic API reference, "Messages", "Handling stop reasons", "Errors", "Beta headers".
"""

from tidemill.engines.protocol import Unsupported

MESSAGES = b"/messages"
"""Below the base URL. An `Ask` of this path is in Messages form."""
COUNT_TOKENS = b"/messages/count_tokens"
VERSION = "2023-06-01"
"""The value of the `anthropic-version` header."""

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
"""OpenAI's `finish_reason` -> `stop_reason`."""
FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
"""`stop_reason` -> OpenAI's `finish_reason`."""

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""The `type` of a `tool_choice` -> OpenAI's `tool_choice`, where it names no tool."""

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status -> the `type` of an error object."""

_BILLED_APART = "It is billed by something else than tokens; leave it out."
BILLED_APART: Unsupported = {
    "container": ((), _BILLED_APART),
    "mcp_servers": (([],), _BILLED_APART),
    "inference_geo": ((), _BILLED_APART),
    "speed": (("standard",), _BILLED_APART),
    "user_profile_id": ((), "It belongs to the operator's account; leave it out."),
    "workspace_id": ((), "It belongs to the operator's account; leave it out."),
}
"""Members of a Messages request that change what it costs, or reach into the operator's account."""

CLIENT_TOOLS = ("custom", "bash_", "text_editor_", "computer_", "memory_")
"""How the `type` of a tool begins that the client runs. The others run at Anthropic, and are billed apart."""

BETAS = (
    "claude-code-",
    "computer-use-",
    "context-management-",
    "effort-",
    "extended-cache-ttl-",
    "fine-grained-tool-streaming-",
    "interleaved-thinking-",
    "output-128k-",
    "pdfs-",
    "prompt-caching-",
    "structured-outputs-",
    "token-efficient-tools-",
)
"""How a value of a client's `anthropic-beta` header begins that is passed on: it changes the form of an answer, and
neither its price nor what of the operator's account it reaches."""

IMAGE_TOKENS = 5_000
DOCUMENT_TOKENS = 300_000
"""The most that an image, or all documents of a request, may have, whatever the size of their data: 100 pages of at
most 3,000 tokens, as each is read as text and seen as an image."""

COUNTED = frozenset("messages system tools tool_choice thinking output_config cache_control".split())
"""Members of a request that a counting request may have."""
