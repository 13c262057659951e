"""Counters off a Prometheus page."""

import pytest

from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Counters

PAGE = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="a"} 1000.0
vllm:prompt_tokens_total{engine="1",model_name="a } b"} 1.5e+03
vllm:prompt_tokens_total_created{engine="0"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="a"} 7.0 1700000000000
plain 5
plain_more 6
tabbed\t8
not_a_number NaN
"""


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("vllm:prompt_tokens_total", 2500),
        ("vllm:generation_tokens_total", 7),
        ("plain", 5),
        ("tabbed", 8),
        ("none", None),
    ],
)
def test_the_sum_over_all_labels(name: str, total: int | None) -> None:
    assert counter_sum(PAGE, name) == total


@pytest.mark.parametrize("value", ["NaN", "+Inf", "abc", ""])
def test_what_is_no_count_is_passed_over(value: str) -> None:
    assert counter_sum(f"x {value}\n", "x") is None


def test_vllm_and_sglang() -> None:
    assert OpenAIEngine().counters(PAGE) == Counters(2500, 7)
    page = 'sglang:prompt_tokens_total{model="m"} 3.0\nsglang:generation_tokens_total{model="m"} 4.0\n'
    assert OpenAIEngine().counters(page) == Counters(3, 4)
    assert OpenAIEngine().counters("<html>") is None
