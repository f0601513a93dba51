"""A trained model handed over: to timm, ONNX runtimes and torch.export, with a card that says what it is."""
