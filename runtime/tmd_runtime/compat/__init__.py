"""Adapters for programs that were written for other libraries. Nothing of the runtime imports them."""
