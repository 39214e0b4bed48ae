"""What test_containers.py and its stand-in for Grafana are made of."""
