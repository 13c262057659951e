"""The engines by their kind: how each is spoken to, watched and started."""

from tidemill.engines import sglang, vllm
from tidemill.engines.launch import EngineControl, Launcher
from tidemill.engines.llamacpp import LlamaCppEngine
from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.protocol import Engine

CONTROLS = {
    "llamacpp": EngineControl(
        ready="/health", running="llamacpp:requests_processing", waiting="llamacpp:requests_deferred"
    ),
    "vllm": vllm.CONTROL,
    "sglang": sglang.CONTROL,
}
"""How the engines that are processes of ours are watched."""
LAUNCHERS: dict[str, Launcher] = {"vllm": vllm, "sglang": sglang}
PROGRAMS = {"vllm": vllm.PROGRAM, "sglang": sglang.PROGRAM}
"""What is run when the configuration names nothing else."""


def engine_of(kind: str, *, owned: bool = False, priority_scheduling: bool = False) -> Engine:
    """How to speak to an engine; `owned` counts for one that somebody else runs (see `Engine.owned`)."""
    match kind:
        case "llamacpp":
            return LlamaCppEngine()
        case "vllm":
            return vllm.VllmEngine(priority_scheduling=priority_scheduling)
        case "sglang":
            return sglang.SglangEngine(priority_scheduling=priority_scheduling)
    return OpenAIEngine(owned=owned)
