"""The chaos run and the soak: real processes, real sockets, and every request accounted for (`make chaos`)."""
