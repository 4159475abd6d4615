"""The package format: data classes, hashing and layout rules. Normative text: ``agent/PACKAGE_FORMAT.md``."""
