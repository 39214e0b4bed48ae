import pytest

from scripts.benchmark.loads import Load, clients_of_one, guided, large, mixed, one


@pytest.mark.parametrize(
    ("load", "plain"),
    [
        (clients_of_one(4), True),
        (large(), True),
        (Load("open", asks=one, rate=1.0), True),
        (Load("guided", (one, guided(one))), False),
        (Load("mixed", asks=mixed, rate=1.0), False),
    ],
)
def test_a_load_is_plain_where_every_image_takes_a_hundred_calls(load: Load, plain: bool) -> None:
    assert load.is_plain is plain
