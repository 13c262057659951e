"""The catalogue: complete, stable on disk, and within 64 bits."""

from tidemill.ledger.components import BASE, BY_KEY, CATALOGUE, MAX_PRICE, MAX_TOKENS, Component
from tidemill.ledger.money import MAX_NANOS


def test_each_component_is_in_the_catalogue_and_known_by_its_name() -> None:
    assert set(CATALOGUE) == set(Component) == set(BY_KEY.values())
    assert BY_KEY["cached_input"] is Component.CACHED_INPUT


def test_the_numbers_on_disk_are_never_changed() -> None:
    assert {component.key: int(component) for component in Component} == {
        "input": 1,
        "cached_input": 2,
        "cache_write": 3,
        "output": 4,
        "reasoning_output": 5,
        "request": 6,
        "search": 7,
        "document": 8,
        "image": 9,
        "audio_second": 10,
        "character": 11,
    }


def test_a_part_is_part_of_a_base_component_in_the_same_unit() -> None:
    for spec in CATALOGUE.values():
        if spec.part_of is not None:
            whole = CATALOGUE[spec.part_of]
            assert spec.part_of in BASE and whole.part_of is None
            assert (spec.unit, spec.per) == (whole.unit, whole.per)


def test_the_dearest_request_fits_64_bits() -> None:
    prompt_and_answer = 2 * MAX_TOKENS * MAX_PRICE // 1_000_000  # whatever parts they are made of
    others = sum(
        spec.most * spec.max_rate // spec.per
        for component, spec in CATALOGUE.items()
        if component not in BASE and spec.part_of is None
    )
    assert prompt_and_answer + others + len(CATALOGUE) <= MAX_NANOS


def test_labels_fit_their_column_of_the_invoice() -> None:
    assert all(len(spec.label) <= 12 for spec in CATALOGUE.values())
