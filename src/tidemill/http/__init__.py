"""HTTP/1.1 server and client on asyncio protocols: sockets and bytes. Knows nothing of the product."""
