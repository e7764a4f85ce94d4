"""The open image: where bytes are, how writes change that, in which order it reaches the disk."""
