"""The catalogue's data: complete, and true to what the makers publish."""

import pytest

from tidemill.engines.catalogue import gpu_named, gpus, model_named, models
from tidemill.engines.catalogue.gpus import GpuSpec
from tidemill.engines.catalogue.models import CatalogueModel
from tidemill.errors import NotFound


@pytest.mark.parametrize("spec", models().values(), ids=lambda spec: spec.name)
def test_the_architecture_has_the_published_number_of_parameters(spec: CatalogueModel) -> None:
    """To the last parameter: a wrong layer count, width or bias would show."""
    assert spec.parameters is not None or spec.total_published, "nothing to check it against"
    if spec.parameters is not None:
        assert spec.total == spec.parameters
    for published, counted in ((spec.total_published, spec.total), (spec.active_published, spec.active)):
        if published:
            assert counted == pytest.approx(float(published.removesuffix("B")) * 1e9, rel=0.09)


def test_glm_with_its_prediction_layer_has_the_published_size() -> None:
    """The hub counts 358,337,791,296 parameters: the model, and one more layer with a table, a head and a projection
    of its own.
    """
    spec = model_named("glm-4.5")
    assert spec.moe is not None
    layer = spec.attention.total + spec.router.total + (spec.moe.experts + spec.moe.shared) * spec.expert.total
    own = layer + spec.tables.total + 2 * spec.hidden**2
    assert spec.total + own == pytest.approx(358_337_791_296, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("deepseek-r1", 70_272),  # 61 layers x 576 values: 70 KB, as the DeepSeek-V3 paper's hardware follow-up says
        ("llama-3.1-70b", 327_680),  # 80 x 2 x 8 x 128 x 2
        ("qwen2.5-72b", 327_680),
        ("qwen3-32b", 262_144),
        ("smollm2-135m", 23_040),
    ],
)
def test_kv_cache_of_a_token(name: str, bytes_per_token: int) -> None:
    spec = model_named(name)
    assert spec.layers * spec.kv_values() * 2 == bytes_per_token


def test_weights_of_deepseek_in_fp8_are_as_large_as_its_files() -> None:
    """688 GB on the hub, of which 14B parameters are the prediction module's."""
    spec = model_named("deepseek-r1")
    from tidemill.engines.memory import ReplicaLayout, weight_bytes

    assert weight_bytes(spec, ReplicaLayout(), "fp8") == pytest.approx(688e9 - 14e9, rel=0.01)


def test_weights_of_gpt_oss_in_mxfp4_are_as_large_as_its_files() -> None:
    """60.8 GiB by OpenAI's model card (arXiv 2508.10925, table 1); 12.8 GiB of the small one."""
    from tidemill.engines.memory import GIB, ReplicaLayout, weight_bytes

    for name, published in (("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)):
        assert weight_bytes(model_named(name), ReplicaLayout(), "mxfp4") / GIB == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("gpu", gpus().values(), ids=lambda gpu: gpu.kind)
def test_every_kind_says_where_its_figures_are_from(gpu: GpuSpec) -> None:
    assert gpu.source and gpu.name and gpu.vendor
    assert set(gpu.uncertain) <= set(GpuSpec.__struct_fields__)
    if gpu.kind != "cpu":
        assert gpu.memory_bytes > 20 * 2**30 and "bf16" in gpu.compute
    if "No public data sheet" in gpu.source:
        assert gpu.uncertain


@pytest.mark.parametrize(
    "kind",
    "H100 h100-pcie H800 H20 H200 A100 A100-40G L40S 4090 rtx4090 RTX_5090 910B 910C P800 K100-AI cpu".split(),
)
def test_kinds_go_by_the_names_that_people_use(kind: str) -> None:
    assert gpu_named(kind).kind in gpus()


@pytest.mark.parametrize("name", ["DeepSeek-R1", "deepseek-ai/DeepSeek-R1", "deepseek-r1-671b", "DEEPSEEK_R1"])
def test_models_go_by_several_names(name: str) -> None:
    assert model_named(name).name == "deepseek-r1"


def test_an_unknown_name_gets_the_nearest_right_one() -> None:
    with pytest.raises(NotFound, match="Did you mean qwen3-32b"):
        model_named("qwen3-32")
    with pytest.raises(NotFound, match="Did you mean h800-sxm"):
        gpu_named("H8000")


def test_names_are_of_one_model_each() -> None:
    names = [name for spec in models().values() for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))
