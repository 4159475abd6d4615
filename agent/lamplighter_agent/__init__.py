"""The Lamplighter agent: runs one language-model package on an edge box."""

import os

# The official onnxruntime wheels report usage to their maker unless this is set before their first import.
# A box phones nobody but its own fleet, so no module of this package can be imported without it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = "0.1.0"
