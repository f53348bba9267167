"""Where weights come from, and what they say of their model: one module per family."""
