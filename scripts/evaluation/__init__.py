"""Evaluation of generated digits: classifiers, and metrics that are computed from their outputs."""
