"""The world that the tests simulate: models, packages, servers, brokers."""
