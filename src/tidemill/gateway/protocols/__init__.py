"""From the bytes of an API to a ModelRequest, and from an engine's answer to the bytes of that API.

No I/O.
"""
