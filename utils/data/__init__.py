"""Pictures and labels: reading, checking, fitting to the network, augmenting, batching."""
