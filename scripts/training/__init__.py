"""Training of the diffusion networks: recipes, losses, training loop, run folders and distillation."""
