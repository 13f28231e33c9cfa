"""Real runs and measurements; what they found is in docs/."""
