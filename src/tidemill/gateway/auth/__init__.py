"""From an API key to who is asking. The only package that reads the Authorization header."""
