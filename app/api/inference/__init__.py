"""The Open Inference Protocol: its schemas, its tensors and the examples for the document."""
