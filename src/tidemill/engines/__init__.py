"""Engines: what runs a model. One file an engine, all behind `engines.protocol.Engine`."""
