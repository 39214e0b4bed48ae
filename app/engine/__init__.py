"""The scheduler: admission control, row selection, and the loop that runs the steps. It uses no tensors."""
