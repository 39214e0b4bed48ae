"""The shapes for which graphs exist. A step is padded to the smallest shape that holds it.

A shape has a number of rows, and a number of further evaluations of these rows: one for each guided row, and those of
further classes. Each of the two numbers is rounded up to a bucket. They are rounded separately, so that a step with one
guided row does not have twice as many evaluations. The buckets are 1, 2, 3, ... 8, 10, 12, 14, 16, 20, 24, ...
Rounding up adds less than 25%.
"""

from collections.abc import Iterator
from typing import NamedTuple

FIXED_ROWS = 64  # rows of each step with UNFOG_REPRODUCIBLE=on and UNFOG_MAX_BATCH=auto
FEWEST_FURTHER = 16  # further evaluations of a fixed shape, so that it has room for a row that compares ten classes
MANTISSA_BITS = 2  # there are 2**MANTISSA_BITS buckets from each power of two to the next, from 8 on


class Shape(NamedTuple):
    """The shape of the graph of a step."""

    rows: int
    further: int  # number of evaluations in addition to the first ones of the rows
    has_known: bool  # True if rows may have known pixels or compare the classes

    @property
    def evaluations(self) -> int:
        """Returns the number of evaluations of the network."""
        return self.rows + self.further

    def holds(self, other: "Shape") -> bool:
        """Returns True if a step of the other shape can be padded to this shape."""
        has_known = self.has_known or not other.has_known
        return has_known and self.rows >= other.rows and self.further >= other.further


def bucket(count: int) -> int:
    """Returns the smallest bucket that is at least `count`. The bucket of 0 is 0."""
    if count <= 1 << (MANTISSA_BITS + 1):
        return count
    unit = 1 << ((count - 1).bit_length() - MANTISSA_BITS - 1)
    return -(-count // unit) * unit


def buckets(most: int) -> list[int]:
    """Returns all buckets from 1 to that of `most`."""
    found = [bucket(1)]
    while found[-1] < most:
        found.append(bucket(found[-1] + 1))
    return found


def padded(rows: int, further: int, *, has_known: bool) -> Shape:
    """Returns the shape to which a step is padded. Padding adds less than 25% to each number."""
    return Shape(bucket(rows), bucket(further), has_known)


def fixed(rows: int) -> Shape:
    """Returns the shape for steps of at most this number of rows, each of which may be guided."""
    return Shape(rows, max(rows, FEWEST_FURTHER), has_known=True)


def shapes_to_compile() -> list[Shape]:
    """Returns the shapes for which torch.compile must run the step, in this order, so that it compiles for no other.

    Its programs are for any size, but size 1 and sizes that happen to be equal get programs of their own. The first
    shape of each kind has sizes that differ and are not 1.
    """
    sizes = (3, 2), (1, 2), (1, 0)  # rows and further evaluations
    return [Shape(*size, has_known) for has_known in (False, True) for size in sizes]


def first_shapes(most_rows: int) -> Iterator[Shape]:
    """Yields the shapes that are captured first: powers of two, large ones first, with and without guidance."""
    for rows in reversed([1 << k for k in range(most_rows.bit_length())]):
        yield Shape(rows, rows, has_known=False)
        yield Shape(rows, 0, has_known=False)


def all_shapes(most_rows: int) -> Iterator[Shape]:
    """Yields all shapes of images without known pixels, small ones first."""
    for rows in buckets(most_rows):
        for further in (0, *buckets(rows)):
            yield Shape(rows, further, has_known=False)
