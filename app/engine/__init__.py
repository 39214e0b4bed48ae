"""The scheduler: admission, the choice of rows for each step, and the loop that runs the steps. It uses no tensors."""
