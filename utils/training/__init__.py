"""Training: settings, optimizer, averaged weights, the loop and its state."""
