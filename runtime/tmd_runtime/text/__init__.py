"""A prompt to the embeddings that the model reads."""
