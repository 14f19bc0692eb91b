"""What the editor extension asks of a host: checks, sizes, formats and their options."""
