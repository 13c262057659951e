"""The data plane: authenticate, route, admit, ask the engine, settle."""
