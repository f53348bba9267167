"""`tmd-serve`: the server, and its API keys."""
