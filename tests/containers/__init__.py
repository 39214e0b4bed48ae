"""Helpers for tests/e2e/test_containers.py, with a replacement for Grafana."""
