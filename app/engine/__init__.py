"""The scheduler: admission, the choice of rows, and the loop that steps them. No tensors."""
