import io
import sys

import pytest

from scripts.common.errors import ScriptError, reports_errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ScriptError("x.png is damaged\nand more"), "train: x.png is damaged"),
        (PermissionError(13, "Permission denied", "x.png"), "train: [Errno 13] Permission denied: 'x.png'"),
        (MemoryError("Unable to allocate 1 TiB"), "train: not enough memory. Use less data, or close other programs"),
    ],
)
def test_error_of_a_script_is_one_line_and_status_2(
    error: Exception, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_errors("train")
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"{expected}\n"


def test_bug_keeps_its_traceback() -> None:
    @reports_errors("train")
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_names_that_stdout_cannot_encode_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="latin-1"))
    reports_errors("train")(lambda: print("é, 犬", flush=True))()
    assert output.getvalue() == b"\xe9, \\u72ac\n"
