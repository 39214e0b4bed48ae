"""What a container's or a unit's limit leaves of the processor to this process (Linux, control groups version 2)."""

from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def granted_cores(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> float | None:
    """The time that the process may have, in cores: 1.5, say; None without a limit."""
    folders = (groups / str(group).lstrip("/") for group in _own_groups(own_group))
    return min((cores for folder in folders if (cores := _limit(folder)) is not None), default=None)


def _own_groups(own_group: Path) -> list[PurePosixPath]:
    """The process's control group and those above it, each of which may limit it."""
    try:
        lines = own_group.read_text().splitlines()
    except OSError:
        return []
    own = [PurePosixPath(line.removeprefix("0::")) for line in lines if line.startswith("0::")]
    return [group for lowest in own for group in (lowest, *lowest.parents)]


def _limit(folder: Path) -> float | None:
    """`QUOTA PERIOD`, both in microseconds, or `max PERIOD`."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):  # the uppermost group has none
        return None
