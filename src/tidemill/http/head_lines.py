"""Status and header lines of an answer, as bytes.

The status line for each status, and the content types that are sent often.
"""

from http import HTTPStatus

STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}

JSON = b"content-type: application/json\r\n"
OCTET_STREAM = b"content-type: application/octet-stream\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
"""Server-sent events, which no proxy on the way may cache or buffer."""
