"""The executor of one machine: models from bundles, and one thread that runs jobs."""
