"""The embedded host behind the real editor: `quantwire serve`."""
