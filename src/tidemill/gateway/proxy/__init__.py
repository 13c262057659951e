"""One request from its admission to its record: the engine is asked, its answer passed on, the usage settled."""
