"""An engine that is started like vLLM, `vllm_like.py serve MODEL --host ... --port ...`, and answers like the mock.

The command line is read by the rules of the real one's parser, as recorded in tests/engines/contracts. MODEL is a
folder; `behaviour.json` in it says how this "version" behaves:

    load_s      seconds until it listens
    fails       a text: it says this and ends with code 1 instead of listening
    word        the text of each token
    interval_ms between tokens

With --nnodes the ranks meet as the real one's do (see `meet`).
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
CONTRACT = HERE.parents[1] / "engines/contracts/vllm.json"
MOCK = HERE.parents[2] / "bench/mock_engine.py"


def read_line(words: list[str]) -> tuple[str, dict[str, str]]:
    """The model and the options; ends with code 2 for what the real one would not take."""
    options = {flag: option for option in json.loads(CONTRACT.read_text())["options"] for flag in option["flags"]}
    if words[:1] != ["serve"] or len(words) < 2 or words[1].startswith("-"):
        sys.exit("usage: serve MODEL")
    found: dict[str, str] = {}
    rest = words[2:]
    while rest:
        flag, *rest = rest
        option = options.get(flag)
        if option is None:
            print(f"unrecognized argument: {flag}")
            sys.exit(2)
        takes = option["takes"] != "none"
        value = rest.pop(0) if takes and rest and not rest[0].startswith("--") else ""
        if option["choices"] and value and value not in option["choices"]:
            print(f"argument {flag}: invalid choice: {value}")
            sys.exit(2)
        found[flag] = value
    return words[1], found


def meet(options: dict[str, str]) -> None:
    """Over several nodes: the head serves once all others have joined it, and these serve nothing and wait for ever.

    As with the real one, nobody notices when another one dies: whatever they do together then hangs.
    """
    others = int(options.get("--nnodes", "1")) - 1
    if others <= 0:
        return
    where = options["--master-addr"], int(options["--master-port"])
    if options["--node-rank"] == "0":
        with socket.create_server(where) as server:
            for _ in range(others):
                server.accept()
        return
    assert "--headless" in options
    while True:
        try:
            socket.create_connection(where).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    while True:
        time.sleep(60.0)


def main() -> None:
    model, options = read_line(sys.argv[1:])
    behaviour = {}
    if (Path(model) / "behaviour.json").exists():
        behaviour = json.loads((Path(model) / "behaviour.json").read_text())
    print("starting", model, options, "sees", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    time.sleep(behaviour.get("load_s", 0.0))
    if "fails" in behaviour:
        print(behaviour["fails"])
        sys.exit(1)
    meet(options)
    argv = [sys.executable, str(MOCK), "--host", options["--host"], "--port", options["--port"]]
    argv += ["--chunk-interval-ms", str(behaviour.get("interval_ms", 0.0)), "--token", behaviour.get("word", "tide ")]
    os.execv(sys.executable, argv)


if __name__ == "__main__":
    main()
