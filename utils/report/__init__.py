"""Costs of a network and files of a run: counts, times, tables, plots, run directories."""
