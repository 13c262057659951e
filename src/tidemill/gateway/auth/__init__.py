"""API keys to principals. The only package that reads the Authorization header."""
