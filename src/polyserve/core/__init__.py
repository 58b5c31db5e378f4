"""The deciding core: no clock, no chance, no I/O. Read `types` first, then `controller`."""
