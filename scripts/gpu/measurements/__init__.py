"""The measurements of `python -m scripts.gpu` that need torch. They need none of the packages for HTTP.

A row is an image in a step. A guided row evaluates the network twice, a plain row once. The runner `graph` is
GraphRunner, which runs steps as CUDA graphs. The runner `eager` is Runner, which calls each operation separately.
"""
