"""What is read from and written to files: videos, pictures, embeddings, latents."""
