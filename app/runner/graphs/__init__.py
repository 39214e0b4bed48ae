"""The runner on a GPU: it runs the steps as CUDA graphs and does not wait for them.

graph_runner.py (the runner), new_rows.py (the first state of new rows), step_inputs.py (the inputs of a step),
graph_calls.py (the captured graphs), row_state.py (the state of the rows on the device), shapes.py (the shapes of
graphs), device.py (capture, events and copies of CUDA).
"""
