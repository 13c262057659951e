"""`tidemill model fit` and `catalogue`: on a machine without a platform, for people and for programs."""

import pytest

from tests.cli.conftest import Run


def test_what_fits_for_people(run: Run) -> None:
    found = run("model", "fit", "deepseek-r1", "--nodes", "2x8xH800", "--context", "32k", "--concurrency", "64")
    assert found.code == 0 and found.err == ""
    assert found.out.startswith("deepseek-ai/DeepSeek-R1: 671.0B parameters, 36.6B active")
    assert "64 sequences of 32,768 tokens" in found.out
    assert "the fullest device:" in found.out and "weights" in found.out and "KV cache" in found.out
    assert "vllm serve deepseek-ai/DeepSeek-R1" in found.out and "node 1:" in found.out
    assert "not published by the vendor" in found.out


def test_what_fits_for_programs(run: Run) -> None:
    document = run("model", "fit", "qwen3-32b", "--nodes", "8xA100,P800", "--json").json
    assert document["model"] == "qwen3-32b" and document["parameters"] == 32_762_123_264
    best = document["layouts"][0]
    assert best["fits"] and best["gpu"] == "a100-sxm-80" and best["estimate"]["decode_tokens_s"] > 0
    parts = best["device_bytes"]
    assert parts["total"] == sum(parts[key] for key in ("weights", "kv", "runtime", "activations"))
    assert parts["total"] <= parts["usable"]
    assert best["launches"][0][:3] == ["vllm", "serve", "Qwen/Qwen3-32B"]
    [other] = [each for each in document["layouts"] if each["gpu"] == "kunlun-p800"]
    assert other["estimate"] is None and "compute" in other["uncertain"]


def test_what_does_not_fit_says_why(run: Run) -> None:
    found = run("model", "fit", "deepseek-r1", "--nodes", "8xH100")
    assert found.code == 0 and "weights and runtime alone are" in found.out and "serve" not in found.out
    document = run("model", "fit", "deepseek-r1", "--nodes", "8xH100", "--json").json
    assert all(each["why_not"] and not each["launches"] for each in document["layouts"])


def test_a_quantised_copy_is_asked_for(run: Run) -> None:
    said = run("model", "fit", "qwen3-32b", "--nodes", "L40S", "--precision", "int4", "--concurrency", "4").out
    assert "take a copy that was quantised to int4" in said
    assert "--quantization" in run("model", "fit", "qwen3-32b", "--nodes", "H100", "--precision", "fp8").out


def test_the_embedded_model_on_a_machine_without_accelerators(run: Run) -> None:
    said = run("model", "fit", "smollm2-135m", "--nodes", "cpu@16GB", "--engine", "sglang").out
    assert "No estimate of speed" in said and "sglang.launch_server" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("qwen3-32", "--nodes", "H100"), "Did you mean qwen3-32b?"),
        (("qwen3-32b", "--nodes", "H8000"), "Did you mean h800-sxm?"),
        (("qwen3-32b", "--nodes", "2x"), "Write 2x8xH800"),
        (("qwen3-32b", "--nodes", "H100", "--precision", "fp9"), "Choose one of: bf16"),
        (("qwen3-32b", "--nodes", "910B", "--precision", "fp8"), "cannot hold fp8"),
        (("qwen3-32b", "--nodes", "H100", "--kv-precision", "int3"), "bf16 or fp8"),
        (("qwen3-32b", "--nodes", "H100", "--context", "many"), "32768 or 32k"),
        (("qwen3-32b", "--nodes", "H100", "--context", "1M"), "at most 40960 tokens"),
        (("qwen3-32b", "--nodes", "H100", "--concurrency", "0"), "from 1 to 100000"),
        (("qwen3-32b", "--nodes", "H100", "--engine", "ollama"), "vllm, sglang"),
    ],
)
def test_bad_input_is_said_in_one_line(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in run("model", "fit", *arguments).complaint


def test_the_catalogue(run: Run) -> None:
    assert "deepseek-ai/DeepSeek-R1" in run("model", "catalogue").out
    assert "hygon-k100-ai" in run("model", "catalogue", "--gpus").out
    known = run("model", "catalogue", "--json").json["models"]
    assert {"deepseek-r1", "glm-4.5-air", "gpt-oss-120b"} <= {model["name"] for model in known}
    kinds = run("model", "catalogue", "--gpus", "--json").json["gpus"]
    assert all(kind["source"] for kind in kinds)


def test_the_table_is_no_wider_than_a_terminal(run: Run) -> None:
    """Of 80 columns: a wider one loses its columns there."""
    for arguments in (
        ("deepseek-r1", "--nodes", "16x8xH800", "--context", "128k", "--concurrency", "1000", "--all"),
        ("smollm2-135m", "--nodes", "2048x8xH200", "--concurrency", "100"),
    ):
        lines = run("model", "fit", *arguments).out.splitlines()
        table = [line.rstrip() for line in lines if line.startswith(("Layout", "tp")) and ":" not in line]
        assert len(table) > 1 and max(map(len, table)) <= 80
