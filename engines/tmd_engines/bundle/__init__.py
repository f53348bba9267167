"""The bundle format: read and checked before anything else sees a byte, and written. Runs no graph."""
