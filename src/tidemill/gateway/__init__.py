"""The data plane: door, admission, route, engine, settle, in that order."""
