"""What can be asked of the service: one module for each task, without HTTP.

A task module has the fields of a request with their limits and defaults, and a function that turns them into a Task:
what the engine computes, and the facts of the answer. Only `score` returns no Task, because the engine does not compute
it. A protocol (app/api) reads the fields from a request and writes the answer.
"""
