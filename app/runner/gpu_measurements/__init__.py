"""The measurements of `python -m app.gpu_check` that need torch. They need none of the packages for HTTP."""
