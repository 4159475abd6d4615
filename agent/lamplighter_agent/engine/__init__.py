"""The generation engine: a package in, tokens out, inside a byte budget."""
