"""The llama.cpp engine's own process: `python -m tidemill.engines.llamacpp_child '{"path": ...}'`.

It serves OpenAI's API on a loopback port until it gets a SIGTERM. What started it sees to it that it does not
outlive a platform that was killed (`fleet.shim`).
"""

import os
import signal
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
    embeddings: str = ""
    """How a text's vectors become one, beside the answering of chats: `mean`, `cls`, `last`, or `model`: as the file
    says. `rank`: they become the score of a document. Empty: there are no embeddings."""


def serve(launch: LlamaCppLaunch) -> None:
    """Load the model and serve it until a SIGTERM. Does not return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of the engine's threads as well
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
    if launch.embeddings:
        params.embedding = True
        params.n_batch = params.n_ubatch = launch.context  # a text is computed in one piece, or refused
        if launch.embeddings != "model":
            params.pooling_type = xllamacpp.llama_pooling_type[f"LLAMA_POOLING_TYPE_{launch.embeddings.upper()}"]
    if launch.threads:
        params.cpuparams.n_threads = launch.threads
        params.cpuparams_batch.n_threads = launch.threads
    server = xllamacpp.Server(params)
    print(f"ready {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM})
    os._exit(0)  # taking the engine down in order may hang on its open connections, and nothing needs it


def main() -> None:
    serve(msgspec.json.decode(sys.argv[1].encode(), type=LlamaCppLaunch))


if __name__ == "__main__":
    main()
