"""Checks and measures the service on a GPU: `python -m scripts.gpu`. docs/gpu.md describes it.

run.py runs the sections one after the other. sections.py lists them. processes.py starts a process for each section,
ends it at its time limit and reads its figures. section.py is the program of this process. service.py is the section
`http`. The sections that need torch are in scripts/gpu/measurements. report.py writes the results and the table.
"""
