from pathlib import Path

import pytest

from app.runner.cores import granted_cores


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "200000 100000"}, 2.0),
        ({"a/b": "max 100000", "a": "150000 100000"}, 1.5),
        ({"a/b": "400000 100000", "a": "100000 100000"}, 1.0),
        ({"": "50000 100000"}, 0.5),
        ({"elsewhere": "100000 100000"}, None),
        ({"a/b": "what no kernel writes"}, None),
    ],
)
def test_the_narrowest_limit_of_its_control_group_and_those_above_holds(
    limits: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text("9:name=systemd:/elsewhere\n0::/a/b\n")
    groups = tmp_path / "groups"
    for group, limit in limits.items():
        (groups / group).mkdir(parents=True, exist_ok=True)
        (groups / group / "cpu.max").write_text(f"{limit}\n")
    assert granted_cores(groups, tmp_path / "cgroup") == expected


def test_where_there_are_no_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert granted_cores(tmp_path, tmp_path / "cgroup") is None
