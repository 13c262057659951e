"""SGLang: its command line, and how it is spoken to.

Checked against SGLang 0.5.23: its argument parser (recorded in tests/engines/contracts/sglang.json),
sglang/srt/entrypoints/http_server.py, observability/metrics_collector.py (prompt_tokens includes the cached ones).
"""

from tidemill.engines.kind import EngineKind
from tidemill.engines.launch import CommandLine, EngineControl, EngineLaunch, pairs, refuse_own
from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Counters
from tidemill.engines.running_usage import RunningUsageEngine

PROGRAM = ("python", "-m", "sglang.launch_server")

CONTROL = EngineControl(
    ready="/health",
    sleep="/release_memory_occupation",
    wake="/resume_memory_occupation",
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    kv_used="sglang:token_usage",
)

_KEYS = {
    "--host": "host",
    "--port": "port",
    "--model-path": "model",
    "--model": "model",
    "--served-model-name": "served_name",
    "--tp-size": "tp",
    "--tensor-parallel-size": "tp",
    "--pp-size": "pp",
    "--pipeline-parallel-size": "pp",
    "--attn-dp-size": "dp",
    "--attention-data-parallel-size": "dp",
    "--ep-size": "expert_parallel",
    "--expert-parallel-size": "expert_parallel",
    "--ep": "expert_parallel",
    "--quantization": "quantization",
    "--dtype": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--context-length": "max_context",
    "--max-running-requests": "max_sequences",
    "--mem-fraction-static": "memory_share",
    "--disable-radix-cache": "prefix_cache",
    "--enable-priority-scheduling": "priority_scheduling",
    "--enable-memory-saver": "sleep_mode",
    "--enable-weights-cpu-backup": "sleep_mode",
    "--chunked-prefill-size": "prefill_chunk",
    "--revision": "revision",
}


class SglangEngine(RunningUsageEngine):
    """See `engines.protocol.Engine`."""

    kind = "sglang"
    not_for_tenants = (
        *("priority", "rid", "bootstrap_host", "bootstrap_port", "bootstrap_room"),
        *(
            "data_parallel_rank",
            "routed_dp_rank",
            "disagg_prefill_dp_rank",
            "lora_path",
            "session_params",
            "custom_logit_processor",
        ),
    )

    def counters(self, metrics: str) -> Counters | None:
        """SGLang counts a request when it has ended; labels differ, so that the sum over them is what counts."""
        prompt = counter_sum(metrics, "sglang:prompt_tokens_total")
        completion = counter_sum(metrics, "sglang:generation_tokens_total")
        return None if prompt is None or completion is None else Counters(prompt, completion)


def command(launch: EngineLaunch, program: tuple[str, ...] = PROGRAM) -> CommandLine:
    """`sglang.launch_server` as `launch` says. Raises ConfigError for extra arguments that set the same again.

    SGLang's tensor parallel group holds the copies of attention too: its tp is ours times dp.
    """
    refuse_own(launch, _KEYS)
    group = launch.tp * launch.dp
    argv = [*program, "--model-path", launch.model, "--served-model-name", launch.served_name]
    argv += pairs(
        ("--host", launch.host),
        ("--port", launch.port_text),
        ("--tp-size", group if group > 1 else None),
        ("--pp-size", launch.pp if launch.pp > 1 else None),
        ("--attn-dp-size", launch.dp if launch.dp > 1 else None),
        ("--ep-size", group if launch.expert_parallel else None),
        ("--quantization", launch.quantization),
        ("--dtype", launch.dtype if launch.dtype != "auto" else None),
        ("--kv-cache-dtype", launch.kv_cache_dtype if launch.kv_cache_dtype != "auto" else None),
        ("--context-length", launch.max_context),
        ("--max-running-requests", launch.max_sequences * launch.dp if launch.max_sequences is not None else None),
        ("--mem-fraction-static", launch.memory_share),
        ("--chunked-prefill-size", launch.prefill_chunk),
        ("--revision", launch.revision),
    )
    argv += ["--enable-metrics", "--enable-cache-report"]  # cached tokens are billed at another price
    if not launch.prefix_cache:
        argv.append("--disable-radix-cache")
    if launch.priority_scheduling:
        # Lower is earlier, as with vLLM.
        argv += [
            "--enable-priority-scheduling",
            "--schedule-low-priority-values-first",
            "--default-priority-value",
            "0",
        ]
    if launch.sleep_mode:
        argv += ["--enable-memory-saver", "--enable-weights-cpu-backup"]  # without the copy it would wake to garbage
    if launch.trust_remote_code:
        argv.append("--trust-remote-code")
    several = launch.multi_node
    if several is not None:
        argv += pairs(
            ("--nnodes", several.nodes),
            ("--node-rank", several.rank),
            ("--dist-init-addr", f"{several.master}:{several.port}"),
        )
    return CommandLine((*argv, *launch.extra_args))


KIND = EngineKind(
    name="sglang",
    engine=lambda options: SglangEngine(priority_scheduling=options.priority_scheduling),
    control=CONTROL,
    launcher=command,
)
