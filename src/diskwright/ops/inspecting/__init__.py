"""What is told of a file by looking at its bytes alone: nothing that it names is opened, and no
driver gets a handle.  The way in is :mod:`diskwright.ops.inspect`."""
