"""The long-running service: transports, the worker client, telemetry and the life cycle."""
