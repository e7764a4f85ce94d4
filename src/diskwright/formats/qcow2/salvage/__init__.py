"""Reading what is left of an image too damaged to be opened."""
