"""The mathematics and the network of unfog. This package imports neither the service nor the scripts."""
