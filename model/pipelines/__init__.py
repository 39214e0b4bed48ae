"""Pipelines of diffusers: their schedulers as tables of coefficients, so that each row of a call has its own."""
