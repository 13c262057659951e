"""The first line of an answer, for each status that there is."""

from http import HTTPStatus

STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
