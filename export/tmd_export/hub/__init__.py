"""Checkpoints by their name on the Hugging Face hub (`hf:ORG/NAME`): which files are needed, and where they then lie.

`name` reads such a name, `repository` asks and downloads through `huggingface_hub`, `needed` chooses among the files
of a repository, `places` does all of it. What files hold is for `checkpoints`, which knows the cache of downloads too.
What it is not: a client of the hub; tokens, mirrors, proxies and the cache are the library's.
"""
