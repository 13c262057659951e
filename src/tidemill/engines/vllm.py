"""vLLM: its command line, and how it is spoken to.

Checked against vLLM 0.33.0: `vllm serve --help=all` (recorded in tests/engines/contracts/vllm.json),
vllm/entrypoints/serve (health, sleep), v1/metrics/loggers.py (counters; prompt_tokens includes the cached ones).
"""

from tidemill.engines.kind import EngineKind
from tidemill.engines.launch import CommandLine, EngineControl, EngineLaunch, pairs, refuse_own
from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Counters
from tidemill.engines.running_usage import RunningUsageEngine

PROGRAM = ("vllm",)

CONTROL = EngineControl(
    ready="/health",
    sleep="/sleep?level=1&mode=wait",
    wake="/wake_up",
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    kv_used="vllm:kv_cache_usage_perc",
)

_KEYS = {
    "--host": "host",
    "--port": "port",
    "--served-model-name": "served_name",
    "--tensor-parallel-size": "tp",
    "-tp": "tp",
    "--pipeline-parallel-size": "pp",
    "-pp": "pp",
    "--data-parallel-size": "dp",
    "-dp": "dp",
    "--enable-expert-parallel": "expert_parallel",
    "--quantization": "quantization",
    "-q": "quantization",
    "--dtype": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--max-model-len": "max_context",
    "--max-num-seqs": "max_sequences",
    "--gpu-memory-utilization": "memory_share",
    "--enable-prefix-caching": "prefix_cache",
    "--no-enable-prefix-caching": "prefix_cache",
    "--scheduling-policy": "priority_scheduling",
    "--enable-sleep-mode": "sleep_mode",
    "--max-num-batched-tokens": "prefill_chunk",
    "--revision": "revision",
    "--shutdown-timeout": "drain_seconds",
}


class VllmEngine(RunningUsageEngine):
    """See `engines.protocol.Engine`. `priority_scheduling` as in its launch: without, it refuses any priority."""

    kind = "vllm"
    not_for_tenants = ("priority", "kv_transfer_params", "ec_transfer_params", "request_id", "vllm_xargs")

    def counters(self, metrics: str) -> Counters | None:
        """All its data parallel engines together."""
        prompt = counter_sum(metrics, "vllm:prompt_tokens_total")
        completion = counter_sum(metrics, "vllm:generation_tokens_total")
        return None if prompt is None or completion is None else Counters(prompt, completion)


def command(launch: EngineLaunch, program: tuple[str, ...] = PROGRAM) -> CommandLine:
    """`vllm serve` as `launch` says. Raises ConfigError for extra arguments that set the same again."""
    refuse_own(launch, _KEYS)
    argv = [*program, "serve", launch.model, "--served-model-name", launch.served_name]
    argv += pairs(
        ("--host", launch.host),
        ("--port", launch.port_text),
        ("--tensor-parallel-size", launch.tp if launch.tp > 1 else None),
        ("--pipeline-parallel-size", launch.pp if launch.pp > 1 else None),
        ("--data-parallel-size", launch.dp if launch.dp > 1 else None),
        ("--quantization", launch.quantization),
        ("--dtype", launch.dtype if launch.dtype != "auto" else None),
        ("--kv-cache-dtype", launch.kv_cache_dtype if launch.kv_cache_dtype != "auto" else None),
        ("--max-model-len", launch.max_context),
        ("--max-num-seqs", launch.max_sequences),
        ("--gpu-memory-utilization", launch.memory_share),
        ("--max-num-batched-tokens", launch.prefill_chunk),
        ("--scheduling-policy", "priority" if launch.priority_scheduling else None),
        ("--revision", launch.revision),
        ("--shutdown-timeout", launch.drain_seconds),
    )
    # The form with "no-" is the one that older versions, and those for other makers' devices, take as well.
    argv.append("--enable-prefix-caching" if launch.prefix_cache else "--no-enable-prefix-caching")
    argv.append("--enable-prompt-tokens-details")  # cached tokens are billed at another price
    if launch.prefill_chunk is not None:
        argv.append("--enable-chunked-prefill")
    if launch.expert_parallel:
        argv.append("--enable-expert-parallel")
    if launch.sleep_mode:
        argv.append("--enable-sleep-mode")
    if launch.trust_remote_code:
        argv.append("--trust-remote-code")
    argv += _over_nodes(launch)
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if launch.sleep_mode:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no /sleep
    return CommandLine((*argv, *launch.extra_args), env)


def _over_nodes(launch: EngineLaunch) -> list[str]:
    """One process on each node. With dp, each node holds its share of the copies; else the ranks are dealt out."""
    several = launch.multi_node
    if several is None:
        return []
    headless = ["--headless"] if several.rank else []
    if launch.dp > 1:
        local = max(1, launch.dp // several.nodes)
        return headless + pairs(
            ("--data-parallel-size-local", local),
            ("--data-parallel-start-rank", several.rank * local if several.rank else None),
            ("--data-parallel-address", several.master),
            ("--data-parallel-rpc-port", several.port),
        )
    return headless + pairs(
        ("--distributed-executor-backend", "mp"),
        ("--nnodes", several.nodes),
        ("--node-rank", several.rank),
        ("--master-addr", several.master),
        ("--master-port", several.port),
    )


KIND = EngineKind(
    name="vllm",
    engine=lambda options: VllmEngine(priority_scheduling=options.priority_scheduling),
    control=CONTROL,
    launcher=command,
)
