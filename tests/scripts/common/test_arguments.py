import argparse

import pytest

from scripts.common import arguments
from scripts.common.arguments import Parser, add_drawing_arguments, given_options


def parse(*given: str) -> argparse.Namespace:
    parser = Parser(prog="test")
    add_drawing_arguments(parser, seed=0)
    return parser.parse_args(given)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ([], "auto"),
        (["--compile"], "on"),
        (["--compile", "--seed=1"], "on"),
        (["--compile", "off"], "off"),
        (["--compile=auto"], "auto"),
    ],
    ids=" ".join,
)
def test_compile_option_takes_a_mode_and_defaults_to_on(
    monkeypatch: pytest.MonkeyPatch, given: list[str], mode: str
) -> None:
    monkeypatch.setattr(arguments, "DEFAULT_COMPILE", "auto")
    args = parse(*given)
    assert args.compile == mode
    assert ("--compile" in given_options(args)) == bool(given)


def test_unknown_compile_mode_exits_with_status_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--compile=fast")
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'fast'" in sentence


@pytest.mark.parametrize("scale", ["0", "1e-5", "2.5", "10"])
def test_clip_guidance_scale_is_a_number_from_0_to_10(scale: str) -> None:
    parsed = parse("--clip-guidance-scale", scale, "--clip-prompt", " a seven").clip_guidance_scale
    assert parsed == float(scale)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["--clip-guidance-scale", "10.1"], "is not a number from 0 to 10"),
        (["--clip-guidance-scale", "-1"], "is not a number from 0 to 10"),
        (["--clip-guidance-scale", "nan"], "is not a number from 0 to 10"),
        (["--clip-prompt", " "], "a prompt must have 1 to 200 characters and must not be blank"),
        (["--clip-prompt", "a" * 201], "a prompt must have 1 to 200 characters and must not be blank"),
    ],
    ids=lambda given: " ".join(given)[:40],
)
def test_wrong_clip_option_exits_with_status_2_and_one_line(
    capsys: pytest.CaptureFixture[str], wrong: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*wrong)
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert reason in sentence
