"""The mathematics and the network of unfog. Knows neither the service nor the scripts."""
