"""The weights of a graph: found in the source, converted, written."""
