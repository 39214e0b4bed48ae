"""The runner on a GPU: it runs the steps as CUDA graphs and does not wait for them.

A CUDA graph is a recorded sequence of kernels, which the host enqueues with one call. To capture a graph is to record
it. A graph has a fixed number of rows, and reads and writes tensors at fixed addresses. The docstring of
app/engine/job.py explains rows, slots, plans and evaluations.

graph_runner.py (the runner), new_rows.py (the first state of new rows), step_inputs.py (the inputs of a step),
graph_calls.py (the captured graphs), row_state.py (the state of the rows on the device), shapes.py (the shapes of
graphs), device.py (capture, events and copies of CUDA).
"""
