"""What is removed from a network, and how the network without it is made."""
