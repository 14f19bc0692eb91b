"""What the conformance suite must know of each format, one module a backend."""
