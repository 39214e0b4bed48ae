"""The device: one reverse step for any rows. The only part of the service that imports torch."""
