"""Programs that run a network: PyTorch, onnxruntime, OpenCV."""
