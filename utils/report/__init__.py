"""What a network costs and what a run leaves behind: counts, times, tables, plots, run directories."""
