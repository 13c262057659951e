"""An engine that is started like vLLM, `vllm_like.py serve MODEL --host ... --port ...`, and answers like the mock.

The command line is read by the rules of the real one's parser, as recorded in tests/engines/contracts. MODEL is a
folder; `behaviour.json` in it says how this "version" behaves:

    load_s      seconds until it listens
    fails       a text: it says this and ends with code 1 instead of listening
    word        the text of each token
    interval_ms between tokens
"""

import json
import os
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
    argv = [sys.executable, str(MOCK), "--host", options["--host"], "--port", options["--port"]]
    argv += ["--chunk-interval-ms", str(behaviour.get("interval_ms", 0.0)), "--token", behaviour.get("word", "tide ")]
    os.execv(sys.executable, argv)


if __name__ == "__main__":
    main()
