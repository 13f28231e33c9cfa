"""Darknet's file formats: cfg, weights, data and names. Nothing here imports torch."""
