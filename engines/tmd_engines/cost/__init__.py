"""What a run costs before it starts: operations, memory and tiles, counted from the graphs. Runs no graph."""
