"""What fits where: the rules of memory, layouts within their devices, and estimates against measurements."""

import csv
import math
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.engines.catalogue import gpu_named, gpus, model_named, models
from tidemill.engines.catalogue.models import CatalogueModel, WeightPrecision
from tidemill.engines.fit import FitRequest, NodeGroup, fits, layouts, parse_nodes, parse_tokens, precision_for
from tidemill.engines.memory import ReplicaLayout, need
from tidemill.engines.roofline import estimate, tpot_under_load_s
from tidemill.errors import BadInput

TRACES = Path(os.environ.get("TIDEMILL_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
MEASURED = TRACES / "aiconfigurator-silicon" / "silicon_calibration.csv"

specs = st.sampled_from(list(models().values()))
groups = st.builds(
    NodeGroup,
    st.integers(1, 4),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([gpu for gpu in gpus().values() if gpu.memory_mib]),
)
_BY_SIZE: tuple[WeightPrecision, ...] = ("int4", "int8", "bf16")


@st.composite
def layouts_of(draw: st.DrawFn) -> tuple[CatalogueModel, ReplicaLayout]:
    spec = draw(specs)
    return spec, draw(st.sampled_from(list(layouts(spec, draw(groups)))))


@given(case=layouts_of(), context=st.integers(1, 200_000), more=st.integers(0, 50_000), sequences=st.integers(1, 500))
def test_more_context_never_needs_less(
    case: tuple[CatalogueModel, ReplicaLayout], context: int, more: int, sequences: int
) -> None:
    spec, layout = case
    one, other = (
        need(spec, layout, "bf16", "bf16", context=tokens, sequences=sequences) for tokens in (context, context + more)
    )
    assert one.total <= other.total


@given(case=layouts_of(), context=st.integers(1, 100_000), sequences=st.integers(1, 500), more=st.integers(0, 500))
def test_more_sequences_never_need_less(
    case: tuple[CatalogueModel, ReplicaLayout], context: int, sequences: int, more: int
) -> None:
    spec, layout = case
    one, other = (
        need(spec, layout, "bf16", "bf16", context=context, sequences=count) for count in (sequences, sequences + more)
    )
    assert one.total <= other.total


@given(case=layouts_of(), context=st.integers(1, 100_000), sequences=st.integers(1, 100))
def test_finer_weights_and_caches_never_need_less(
    case: tuple[CatalogueModel, ReplicaLayout], context: int, sequences: int
) -> None:
    spec, layout = case
    totals = [
        need(spec, layout, precision, kv, context=context, sequences=sequences).total
        for kv in ("fp8", "bf16")
        for precision in _BY_SIZE
    ]
    assert totals[:3] == sorted(totals[:3]) and totals[3:] == sorted(totals[3:])
    assert all(small <= large for small, large in zip(totals[:3], totals[3:], strict=True))


@given(spec=specs, group=groups, context=st.integers(1, 8192), sequences=st.integers(1, 300))
def test_what_fits_is_within_the_devices(spec: CatalogueModel, group: NodeGroup, context: int, sequences: int) -> None:
    for fit in fits(spec, [group], FitRequest(context=context, sequences=sequences)):
        layout = fit.layout
        assert layout.devices <= group.devices and fit.replicas * layout.devices <= group.devices
        assert group.per_node % layout.tp == 0, "tensor parallel stays within a node"
        assert spec.heads % layout.tp == 0
        assert fit.fits == (fit.need.total <= fit.usable) and fit.usable < group.gpu.memory_bytes
        if fit.max_sequences:
            held = need(spec, layout, fit.precision, "bf16", context=context, sequences=fit.max_sequences)
            assert held.total <= fit.usable
            assert fit.max_context >= context
        if fit.max_context:
            assert need(spec, layout, fit.precision, "bf16", context=fit.max_context, sequences=1).total <= fit.usable


@given(spec=specs, group=groups)
def test_all_devices_together_hold_the_whole_model(spec: CatalogueModel, group: NodeGroup) -> None:
    for layout in layouts(spec, group):
        held = need(spec, layout, "bf16", "bf16", context=1, sequences=1).weights * layout.devices
        assert held >= spec.total * 2 * 0.999


@given(spec=specs, group=groups, context=st.integers(16, 4096), sequences=st.integers(1, 200))
def test_estimates_are_finite_and_a_longer_context_is_no_faster(
    spec: CatalogueModel, group: NodeGroup, context: int, sequences: int
) -> None:
    for layout in layouts(spec, group):
        found = [
            estimate(spec, layout, group.gpu, "bf16", "bf16", context=tokens, sequences=sequences)
            for tokens in (context, 2 * context)
        ]
        if found[0] is None or found[1] is None:
            assert group.gpu.bandwidth is None
            continue
        assert 0 < found[0].decode_step_s <= found[1].decode_step_s < math.inf
        assert found[0].prefill_tokens_s > 0


def test_deepseek_does_not_fit_on_eight_h800_and_does_on_sixteen() -> None:
    """As everybody who has tried knows: 671 GB of weights, 640 GB of memory."""
    spec = model_named("deepseek-r1")
    wish = FitRequest(context=8192, sequences=16)
    assert not any(fit.fits for fit in fits(spec, parse_nodes("8xH800"), wish))
    found = [fit for fit in fits(spec, parse_nodes("2x8xH800"), wish) if fit.fits]
    assert {str(fit.layout) for fit in found} >= {"tp8 pp2", "tp8 dp2 ep16", "tp1 dp16 ep16"}
    assert fits(spec, parse_nodes("8xH200"), wish)[0].fits


def test_a_latent_cache_is_not_cut_by_tensor_parallel() -> None:
    """So copies of attention hold as many more sequences as there are of them."""
    spec = model_named("deepseek-r1")
    by_layout = {
        str(fit.layout): fit for fit in fits(spec, parse_nodes("8xH200"), FitRequest(context=8192, sequences=8))
    }
    assert by_layout["tp8"].need.kv_per_sequence == by_layout["tp1 dp8 ep8"].need.kv_per_sequence
    assert by_layout["tp1 dp8 ep8"].max_sequences > 4 * by_layout["tp8"].max_sequences


def test_a_vendor_without_fp8_gets_bf16_and_says_no_to_fp8() -> None:
    spec, gpu = model_named("deepseek-r1"), gpu_named("910B")
    assert precision_for(spec, gpu, None) == "bf16"
    assert precision_for(spec, gpu, "int8") == "int8"
    with pytest.raises(BadInput, match="cannot hold fp8"):
        precision_for(spec, gpu, "fp8")
    with pytest.raises(BadInput, match="not published in mxfp4"):
        precision_for(model_named("qwen3-32b"), gpu_named("H100"), "mxfp4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2x8xH800", [(2, 8, "h800-sxm")]),
        ("8xH100", [(1, 8, "h100-sxm")]),
        ("4090", [(1, 1, "rtx-4090")]),
        ("8x4090", [(1, 8, "rtx-4090")]),
        ("3x910B", [(1, 3, "ascend-910b")]),
        ("2x8xH20, 4xL40S", [(2, 8, "h20"), (1, 4, "l40s")]),
        ("cpu@64GB", [(1, 1, "cpu")]),
    ],
)
def test_nodes_as_people_write_them(text: str, expected: list[Any]) -> None:
    assert [(group.nodes, group.per_node, group.gpu.kind) for group in parse_nodes(text)] == expected


@pytest.mark.parametrize("text", ["", "8x", "0x8xH100", "2x2x2xH100", "cpu", "99999x8xH100", "8xH100@", "H100,"])
def test_nodes_that_say_nothing(text: str) -> None:
    with pytest.raises(BadInput):
        parse_nodes(text)


def test_tokens_as_people_write_them() -> None:
    assert [parse_tokens(text) for text in ("8000", "32k", "0.5K", "1M")] == [8000, 32768, 512, 1048576]
    for text in ("", "-1", "0", "many", "1e3", "9" * 30):
        with pytest.raises(BadInput):
            parse_tokens(text)


def test_a_context_that_the_model_does_not_take() -> None:
    with pytest.raises(BadInput, match="at most 40960"):
        fits(model_named("qwen3-32b"), parse_nodes("H100"), FitRequest(context=50_000, sequences=1))


_NAMES = {
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "deepseek-ai/DeepSeek-R1": "deepseek-r1",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
_PRECISIONS: dict[str, WeightPrecision] = {"fp8": "fp8", "": "bf16", "fp4": "mxfp4"}


def measurements() -> Iterator[tuple[dict[str, str], ReplicaLayout]]:
    """Aggregated replicas on H100 and H200, of up to eight devices, of models that are in the catalogue."""
    with MEASURED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mode"] != "agg" or row["system"] not in ("h100_sxm", "h200_sxm") or row["model_path"] not in _NAMES:
                continue
            layout = ReplicaLayout(
                int(row["tp_size"] or 0), int(row["pp_size"] or 1), int(row["attention_dp_size"] or 1)
            )
            spread = int(row["moe_tp_size"] or 1) * int(row["moe_ep_size"] or 1)
            if not 1 <= layout.tp <= 8 or layout.dp > 8 or spread not in (1, layout.tp * layout.dp):
                continue
            if all(row[key] and float(row[key]) > 0 for key in ("silicon_tpot_ms", "batch_size", "isl", "osl")):
                yield row, layout


@pytest.mark.skipif(not MEASURED.exists(), reason="the shared traces are not here")
def test_estimates_are_near_what_was_measured() -> None:
    """The figures of docs/catalogue.md."""
    errors = []
    for row, layout in measurements():
        name = _NAMES[row["model_path"]]
        concurrency = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        found = tpot_under_load_s(
            model_named(name),
            layout,
            gpu_named(row["system"].replace("_", "-")),
            "mxfp4" if name.startswith("gpt-oss") else _PRECISIONS[row["precision"]],
            "bf16",
            prompt=int(row["isl"]),
            output=int(row["osl"]),
            sequences=int(concurrency[1]) if concurrency else int(row["batch_size"]),
        )
        assert found is not None
        errors.append(abs(math.log(found * 1e3 / float(row["silicon_tpot_ms"]))))
    assert len(errors) > 800
    assert statistics.median(errors) < 0.15
    assert sorted(errors)[int(0.9 * len(errors))] < 0.45
