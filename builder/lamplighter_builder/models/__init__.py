"""Architectures: one file a ``model_type``, found through ``lamplighter_builder.registry``."""
