"""Checks and measures the service on a GPU: `python -m scripts.gpu`. docs/gpu.md describes it.

arguments.py (the command line), sections.py (the list of sections), section.py (one section in its own process),
processes.py (starts, limits and reads these processes), run.py (runs all sections), report.py (the results and the
table), service.py (the section `http`). The sections that need torch are in
scripts/gpu/measurements.
"""
