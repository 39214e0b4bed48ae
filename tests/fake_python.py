"""A fake Python, so that tests of the set-up install nothing."""

import sys


def fake_python(pip: str) -> str:
    """Returns a program that creates venvs whose pip is the program `pip`. The real Python runs everything else."""
    return f"""
import pathlib, subprocess, sys
if sys.argv[1:3] != ["-m", "venv"]:
    sys.exit(subprocess.run([{sys.executable!r}, *sys.argv[1:]]).returncode)
subprocess.run([{sys.executable!r}, "-m", "venv", "--without-pip", sys.argv[3]], check=True)
pip = next(pathlib.Path(sys.argv[3]).glob("lib/python*/site-packages")) / "pip"
pip.mkdir()
(pip / "__init__.py").touch()
(pip / "__main__.py").write_text({pip!r})
"""
