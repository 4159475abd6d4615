"""Trusted metadata, downloads, the package store and the update workflow."""
