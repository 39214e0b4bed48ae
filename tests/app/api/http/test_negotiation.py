import time
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.http.negotiation import best_match

JSON, PNG, ZIP, EVENTS = "application/json", "image/png", "application/zip", "text/event-stream"
ANIMATIONS = ("image/webp", "image/gif")
AVAILABLE = (JSON, PNG, ZIP, EVENTS, *ANIMATIONS)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        # the examples of RFC 9110, section 12.5.1, with the available types
        ("text/*; q=0.2, image/png", PNG),
        ("text/plain; q=0.5, text/html, text/x-dvi; q=0.8, image/png", PNG),
        ("image/*, image/png, image/png;format=flowed, */*", PNG),
        ("text/*;q=0.3, application/json;q=0.7, application/json;level=1, */*;q=0.5", JSON),
        ("*/*;q=0.5, application/json;q=0.4", PNG),
        # quoted strings can contain commas, semicolons and escapes
        ('image/png;a="x, application/json;q=1"', PNG),
        ('image/png;a="\\", application/json"', PNG),
        ('image/png;a="\\\\", application/json;q=0.5', PNG),
        ('application/json;a=";q=0", image/png;q=0.5', JSON),
        ('application/json;a="x";q=0.1, image/png;q=0.5', PNG),
        ('image/png, application/json;a="', PNG),
        # upper case, white space, empty members
        ("Image/PNG;Q=0.5", PNG),
        ("\timage/png\t;\tq=0.5 ,", PNG),
        (", ,image/png,,", PNG),
        (",", JSON),
        ("image/png;", PNG),
        # malformed members are ignored
        ("image/png;q=nan, text/*;q=0.1", EVENTS),
        ("image/png;q=1.1, text/*;q=0.1", EVENTS),
        ("image/png;q=-0.5, text/*;q=0.1", EVENTS),
        ("image/png;q=, text/*;q=0.1", EVENTS),
        ("image/png;q, text/*;q=0.1", EVENTS),
        ("image/png;q=1e-1, text/*;q=0.1", EVENTS),
        ("image/png;q=\N{ARABIC-INDIC DIGIT ONE}, text/*;q=0.1", EVENTS),
        ("*/png, text/*;q=0.1", EVENTS),
        ("image/png/x, im age/png, image/, /png, @/png, text/*;q=0.1", EVENTS),
        # Java's HttpURLConnection
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", JSON),
        # a range with parameters counts only if it is not present without parameters
        ("application/json;v=1;q=0.1, application/json;q=0.9, image/png;q=0.5", JSON),
        ("application/json;v=1;q=0.9, image/png;q=0.5", JSON),
        # if a range occurs twice, the first one counts
        ("image/png;q=0.5, image/png;q=0, text/*;q=0.1", PNG),
        # a type with the weight 0 is not permitted, even if a wider range is
        ("application/json;q=0, */*", PNG),
        ("image/*;q=0, application/*;q=0, */*;q=0.1", EVENTS),
        # the header allows no available type
        ("text/html", None),
        ("image/png;q=0.000", None),
        ("*/*;q=0", None),
        ("image/png;q=0, */*;q=0", None),
        ("nonsense", None),
        (";", None),
        ('"image/png"', None),
    ],
)
def test_accept_header_selects_the_expected_media_type(accept: str, expected: str | None) -> None:
    assert best_match([accept], AVAILABLE) == expected


def test_several_accept_headers_are_combined() -> None:
    assert best_match(["text/html", "image/png;q=0.5", "application/zip;q=0.6"], AVAILABLE) == ZIP


def test_unclosed_quote_ends_with_its_header() -> None:
    assert best_match(['text/html;a="', "image/png"], AVAILABLE) == PNG


class Member(NamedTuple):
    """The parts of a member of an Accept header, before they are rendered as text."""

    kind: str
    subtype: str
    parameters: list[tuple[str, str]]
    weight: int | None  # thousandths

    @property
    def specificity(self) -> int:
        return (self.kind != "*") + (self.subtype != "*")

    @property
    def value(self) -> float:
        return 1.0 if self.weight is None else self.weight / 1000

    def matches(self, media_type: str) -> bool:
        kind, subtype = media_type.split("/")
        return self.kind in ("*", kind) and self.subtype in ("*", subtype)


def reference(members: list[Member]) -> str | None:
    """Chooses a type by the rules of the RFC, without a parser. A header with text/html prefers all other formats."""
    is_html = any((member.kind, member.subtype, member.parameters) == ("text", "html", []) for member in members)

    def decisive(media_type: str) -> Member | None:
        matching = [member for member in members if member.matches(media_type)]
        return max(matching, key=lambda member: (member.specificity, not member.parameters), default=None)

    found = {media_type: member for media_type in AVAILABLE if (member := decisive(media_type)) and member.value}
    if is_html:
        found = {media_type: found[media_type] for media_type in found if media_type not in ANIMATIONS} or found
    return max(found, key=lambda media_type: (found[media_type].value, *_specific(found[media_type])), default=None)


def _specific(member: Member) -> tuple[int, bool]:
    return member.specificity, not member.parameters


RANGES = [tuple(text.split("/")) for text in (*AVAILABLE, "*/*", "image/*", "application/*", "text/*", "text/html")]
MEMBERS = st.builds(
    lambda media_range, parameters, weight: Member(*media_range, parameters, weight),
    st.sampled_from(RANGES),
    st.lists(st.tuples(st.sampled_from(["a", "level", "qq"]), st.text(' ab,;="\\/*', max_size=8)), max_size=2),
    st.none() | st.sampled_from([0, 1, 100, 500, 900, 1000]),
)


def render(member: Member, space: str, upper: bool) -> str:
    """Renders a member as text, with quoted parameter values."""
    parts = [f"{member.kind}/{member.subtype}"]
    for name, value in member.parameters:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(f'{name}="{escaped}"')
    if member.weight is not None:
        parts.append(f"q={member.weight / 1000:g}")
    text = f"{space};{space}".join(parts)
    return text.upper() if upper else text


@given(st.lists(st.tuples(MEMBERS, st.sampled_from(["", " ", "\t "]), st.booleans()), min_size=1, max_size=6))
def test_any_valid_header_gives_the_same_choice_as_the_reference(members: list[tuple[Member, str, bool]]) -> None:
    text = ",".join(space + render(member, space, upper) + space for member, space, upper in members)
    assert best_match([text], AVAILABLE) == reference([member for member, _, _ in members])


@given(st.lists(st.text('ap/*;,q=0.1"\\ \t\x00é', max_size=40), max_size=3))
def test_any_text_gives_an_available_type_or_none(headers: list[str]) -> None:
    assert best_match(headers, AVAILABLE) in (*AVAILABLE, None)


BOMBS = {
    "semicolons in an open quote": ('*/*;"', ";"),
    "semicolons": ("*/*", ";"),
    "commas": ("", ","),
    "quotes": ('*/*;a="', '"'),
    "escaped quotes": ('*/*;a="', '\\"'),
    "backslashes": ('*/*;a="', "\\"),
    "members": ("", "a/b,"),
    "weights": ("*/*", ";q=0.1"),
    "quoted parameters": ("*/*", ';a=","'),
    "white space": ("a/b;q=", " "),
    "digits": ("a/b;q=0.", "1"),
    "slashes": ("a", "/"),
}


@pytest.mark.parametrize(("start", "piece"), BOMBS.values(), ids=BOMBS)
def test_parsing_time_is_linear_in_the_header_length(start: str, piece: str) -> None:
    def seconds(size: int) -> float:
        header = start + piece * (size // len(piece))
        begin = time.process_time()
        best_match([header], AVAILABLE)
        return time.process_time() - begin

    # Measure both sizes alternately, so that a slow phase of the machine affects both. Compare the minima.
    small, large = zip(*((seconds(20_000), seconds(8 * 20_000)) for _ in range(15)), strict=True)
    assert min(large) < 12 * min(small) + 0.001
