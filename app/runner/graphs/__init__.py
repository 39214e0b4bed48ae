"""The runner on a GPU: it runs the steps as CUDA graphs and does not wait for them.

graph_runner.py (the runner), step_graphs.py (the graphs of all shapes), row_state.py (the state of the rows on the
device), shapes.py (the shapes that graphs exist for), device.py (capture, events and copies of CUDA).
"""
