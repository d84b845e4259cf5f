"""A network and images, however they are given, to embeddings and their accuracy."""
