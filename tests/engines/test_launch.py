"""Every launch line is one that the real engine takes, and says to it what the launch said to us."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.contract import NotAccepted, accepted, contract
from tidemill.engines import sglang, vllm
from tidemill.engines.catalogue import model_named
from tidemill.engines.fit import FitRequest, fits, parse_nodes
from tidemill.engines.launch import CommandLine, EngineLaunch, MultiNode, launch_for
from tidemill.errors import ConfigError

ENGINES = {"vllm": vllm, "sglang": sglang}
BEFORE_ARGUMENTS = {"vllm": ("vllm", "serve"), "sglang": ("python", "-m", "sglang.launch_server")}

_ports = st.integers(1, 65535)


@st.composite
def launches(draw: st.DrawFn) -> EngineLaunch:
    nodes = draw(st.integers(1, 4))
    multi_node = MultiNode(nodes, draw(st.integers(0, nodes - 1)), "10.0.0.1", draw(_ports)) if nodes > 1 else None
    return EngineLaunch(
        model=draw(st.sampled_from(["Qwen/Qwen3-32B", "/models/deepseek r1", "模型/甲"])),
        served_name=draw(st.sampled_from(["qwen3-32b", "deepseek-r1"])),
        host=draw(st.sampled_from(["127.0.0.1", "::1", "0.0.0.0"])),
        port=draw(_ports),
        tp=draw(st.sampled_from([1, 2, 4, 8])),
        pp=draw(st.integers(1, 4)),
        dp=draw(st.sampled_from([1, 2, 8, 16])),
        expert_parallel=draw(st.booleans()),
        quantization=draw(st.sampled_from([None, "fp8", "awq", "gptq"])),
        dtype=draw(st.sampled_from(["auto", "bfloat16", "float16"])),
        kv_cache_dtype=draw(st.sampled_from(["auto", "fp8_e4m3", "fp8_e5m2"])),
        max_context=draw(st.none() | st.integers(1, 1_000_000)),
        max_sequences=draw(st.none() | st.integers(1, 4096)),
        memory_share=draw(st.none() | st.floats(0.01, 1.0)),
        prefix_cache=draw(st.booleans()),
        priority_scheduling=draw(st.booleans()),
        sleep_mode=draw(st.booleans()),
        prefill_chunk=draw(st.none() | st.integers(256, 65536)),
        trust_remote_code=draw(st.booleans()),
        revision=draw(st.none() | st.just("0123abc")),
        drain_seconds=draw(st.none() | st.integers(0, 3600)),
        multi_node=multi_node,
    )


def taken(engine: str, command: CommandLine) -> dict[str, Any]:
    before = BEFORE_ARGUMENTS[engine]
    assert command.argv[: len(before)] == before
    return accepted(engine, list(command.argv[len(before) :]))


@given(launch=launches())
def test_vllm_takes_every_launch(launch: EngineLaunch) -> None:
    found = taken("vllm", vllm.command(launch))
    assert found["model_tag"] == launch.model
    assert found["served_model_name"] == [launch.served_name]
    assert (found["host"], found["port"]) == (launch.host, launch.port)
    sizes = [found.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
    assert sizes == [launch.tp, launch.pp, launch.dp]
    assert ("enable_expert_parallel" in found) == launch.expert_parallel
    assert found.get("max_model_len") == launch.max_context
    assert found.get("gpu_memory_utilization") == launch.memory_share
    assert (found.get("scheduling_policy") == "priority") == launch.priority_scheduling
    if launch.multi_node is not None:
        head = launch.multi_node.rank == 0
        assert ("headless" in found) is not head
        if launch.dp == 1:
            assert (found["nnodes"], found["node_rank"]) == (launch.multi_node.nodes, launch.multi_node.rank)


@given(launch=launches())
def test_sglang_takes_every_launch(launch: EngineLaunch) -> None:
    found = taken("sglang", sglang.command(launch))
    assert found["model_path"] == launch.model
    assert found.get("tp_size", 1) == launch.tp * launch.dp
    assert found.get("attn_dp_size", 1) == launch.dp
    assert found.get("pp_size", 1) == launch.pp
    assert found.get("ep_size", 1) == (launch.tp * launch.dp if launch.expert_parallel else 1)
    assert ("disable_radix_cache" in found) is not launch.prefix_cache
    assert found.get("context_length") == launch.max_context
    assert ("enable_memory_saver" in found) == launch.sleep_mode
    assert {"enable_metrics", "enable_cache_report"} <= found.keys()


@pytest.mark.parametrize("flag", ["--no-such-flag", "--max-model-len=many", "--dtype=int3"])
def test_the_recorded_parser_refuses_what_the_engine_refuses(flag: str) -> None:
    with pytest.raises(NotAccepted):
        accepted("vllm", ["model", flag])
    with pytest.raises(NotAccepted):
        accepted("sglang", ["--model-path", "model", flag])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_flags_that_keys_stand_for_are_the_engines_own(engine: str) -> None:
    flags = {flag for option in contract(engine)["options"] for flag in option["flags"]}
    assert ENGINES[engine]._KEYS.keys() - flags == set()


@pytest.mark.parametrize("engine", ENGINES)
def test_watching_and_steering_use_what_the_engine_has(engine: str) -> None:
    control, recorded = ENGINES[engine].CONTROL, contract(engine)
    for route in (control.ready, control.metrics, control.sleep, control.wake):
        assert route.partition("?")[0] in recorded["routes"]
    assert {control.running, control.waiting, control.kv_used} <= set(recorded["metrics"])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_key_sets_cannot_be_set_again(engine: str) -> None:
    launch = EngineLaunch(model="m", served_name="m", extra_args=("--port=99",))
    with pytest.raises(ConfigError, match="`port`"):
        ENGINES[engine].command(launch)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_arguments_are_appended(engine: str) -> None:
    launch = EngineLaunch(model="m", served_name="m", extra_args=("--enable-something", "3"))
    assert ENGINES[engine].command(launch).argv[-2:] == ("--enable-something", "3")


def test_host_and_port_are_left_to_the_backend() -> None:
    argv = vllm.command(EngineLaunch(model="m", served_name="m")).argv
    assert argv[argv.index("--host") + 1] == "{host}"
    assert argv[argv.index("--port") + 1] == "{port}"


def test_sleeping_needs_vllms_own_switch() -> None:
    launch = EngineLaunch(model="m", served_name="m", sleep_mode=True)
    assert vllm.command(launch).env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in vllm.command(EngineLaunch(model="m", served_name="m")).env


@pytest.mark.parametrize(("field", "value"), [("tp", 0), ("memory_share", 0.0), ("memory_share", 1.5)])
def test_a_launch_that_makes_no_sense_is_not_made(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        EngineLaunch(**{"model": "m", "served_name": "m", field: value})  # type: ignore[arg-type]


def test_a_rank_is_one_of_the_nodes() -> None:
    with pytest.raises(ValueError, match="rank"):
        EngineLaunch(model="m", served_name="m", multi_node=MultiNode(2, 2, "10.0.0.1"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "nodes"), [("deepseek-r1", "2x8xH800"), ("qwen3-32b", "8xRTX-4090"), ("gpt-oss-20b", "H100")]
)
def test_what_fits_can_be_launched(engine: str, name: str, nodes: str) -> None:
    spec = model_named(name)
    best = fits(spec, parse_nodes(nodes), FitRequest(context=8192, sequences=8))[0]
    assert best.fits
    launch = launch_for(
        best.layout,
        model=spec.hub_id,
        served_name=spec.name,
        precision=best.precision,
        native=spec.native,
        context=8192,
        sequences=8,
    )
    assert launch.world == best.layout.devices
    found = taken(engine, ENGINES[engine].command(msgspec.structs.replace(launch, port=8000)))
    assert found["port"] == 8000
