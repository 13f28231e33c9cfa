"""Programs that run a network, and the files of export.py."""
