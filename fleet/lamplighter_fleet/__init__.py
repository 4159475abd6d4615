"""The operator's tool: signing keys, publishing, and what the fleet says and does."""
