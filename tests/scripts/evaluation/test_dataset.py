import pytest

from scripts.evaluation.dataset import differing_facts, equal_numbers, labels_of

FACTS = {
    "seed": 3,
    "count": 25,
    "num_images": [3, 3, 3, 3, 3, 2, 2, 2, 2, 2],
    "options": {"sampler": "ddim", "guidance": {"scale": 1.0}},
}


def test_equal_numbers_give_the_digits_in_turn() -> None:
    for count in (1, 9, 10, 25, 1234):
        assert labels_of(equal_numbers(count)).tolist() == [i % 10 for i in range(count)]


@pytest.mark.parametrize("num_images", [(1, 0, 0, 0, 0, 0, 0, 0, 0, 0), (100, 250, 3, 0, 0, 0, 0, 999, 0, 1)])
def test_each_digit_is_spread_evenly(num_images: tuple[int, ...]) -> None:
    """In the first n labels, the number of each digit differs by less than 2 from its share of n."""
    labels = labels_of(num_images)
    total = sum(num_images)
    for n in range(1, total + 1, 13):
        for digit, number in enumerate(num_images):
            assert abs((labels[:n] == digit).sum() - n * number / total) < 2
    assert [int((labels == digit).sum()) for digit in range(10)] == list(num_images)


def test_facts_of_an_earlier_release_differ_only_in_what_was_changed() -> None:
    old = {name: value for name, value in FACTS.items() if name != "num_images"}
    assert differing_facts(old, FACTS) == []
    with_clip = {**FACTS["options"], "clip": {"guidance": {"scale": 2.0}}}
    assert differing_facts(old, {**FACTS, "options": with_clip}) == ["options"]
    assert differing_facts(old, {**FACTS, "num_images": [25, *[0] * 9]}) == ["num_images"]
    assert differing_facts(old, {**FACTS, "seed": 4, "min_confidence": 0.9}) == ["min_confidence", "seed"]


def test_results_of_a_complete_data_set_are_not_compared() -> None:
    assert differing_facts({**FACTS, "num_dropped": [0] * 10}, FACTS) == []
