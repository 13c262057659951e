"""The llama.cpp engine's own process: `python -m tidemill.engines.llamacpp_child '{"path": ...}'`.

It serves OpenAI's API on a loopback port until its parent goes away, which it notices by the end of its standard
input. So an engine never outlives a platform that was killed.
"""

import sys

import msgspec


class LlamaCppLaunch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the child needs to know."""

    path: str
    """The GGUF file."""
    alias: str
    """The model's public name; it appears in the engine's answers."""
    port: int
    context: int
    """Tokens that one request may use, prompt and answer together."""
    parallel: int
    """Requests worked on at a time."""
    threads: int
    """CPU threads; 0 leaves the choice to llama.cpp."""


def serve(launch: LlamaCppLaunch) -> None:
    """Load the model, serve it, and return when standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = launch.path
    params.model_alias = {launch.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = launch.port
    params.n_ctx = launch.context * launch.parallel
    params.n_parallel = launch.parallel
    params.endpoint_metrics = True
    params.endpoint_props = False
    params.ui = False
    params.cache_ram_mib = 256  # the default would keep up to 8 GiB of old prompts
    if launch.threads:
        params.cpuparams.n_threads = launch.threads
        params.cpuparams_batch.n_threads = launch.threads
    server = xllamacpp.Server(params)
    print(f"ready {server.listening_address}", flush=True)
    sys.stdin.buffer.read()


def main() -> None:
    serve(msgspec.json.decode(sys.argv[1].encode(), type=LlamaCppLaunch))


if __name__ == "__main__":
    main()
