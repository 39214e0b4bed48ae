"""How good drawn digits are: networks that look at them, and figures computed from what those see."""
