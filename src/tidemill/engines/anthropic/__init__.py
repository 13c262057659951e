"""Upstreams that speak Anthropic's Messages API: a Messages request passes, a chat is translated."""
