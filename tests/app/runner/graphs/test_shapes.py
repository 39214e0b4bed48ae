import pytest

from app.runner.graphs.shapes import Shape, all_shapes, bucket, buckets, first_shapes, padded


def test_buckets_have_at_most_a_quarter_of_padding() -> None:
    assert buckets(32) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(count <= bucket(count) < 1.25 * count or bucket(count) == count for count in range(1, 5000))
    assert all(bucket(bucket(count)) == bucket(count) for count in range(5000))


def test_guided_evaluations_have_their_own_bucket() -> None:
    assert padded(512, 0, has_known=False).evaluations == 512
    assert padded(512, 1, has_known=False).evaluations == 513
    assert padded(33, 9, has_known=True) == Shape(40, 10, has_known=True)


@pytest.mark.parametrize("rows", [1, 5, 33, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_padding_of_a_step_costs_at_most_a_quarter(rows: int, share: float) -> None:
    shape = padded(rows, round(share * rows), has_known=False)
    assert shape.evaluations <= 1.25 * (rows + round(share * rows))
    assert shape.holds(Shape(rows, round(share * rows), has_known=False))


def test_first_shapes_hold_every_step_with_at_most_twice_its_evaluations() -> None:
    first = list(first_shapes(64))
    assert len(first) == 14
    for rows in range(1, 65):
        for further in (0, rows):
            own = Shape(rows, further, has_known=False)
            assert min(shape.evaluations for shape in first if shape.holds(own)) <= 2 * own.evaluations


def test_all_shapes_have_every_padded_shape_once() -> None:
    shapes = list(all_shapes(40))
    assert len(set(shapes)) == len(shapes)
    assert {padded(b, n, has_known=False) for b in range(1, 41) for n in range(b + 1)} == set(shapes)


def test_shape_without_known_pixels_does_not_hold_one_with_known_pixels() -> None:
    assert Shape(4, 0, has_known=True).holds(Shape(4, 0, has_known=False))
    assert not Shape(4, 0, has_known=False).holds(Shape(4, 0, has_known=True))
    assert not Shape(4, 1, has_known=False).holds(Shape(4, 2, has_known=False))
