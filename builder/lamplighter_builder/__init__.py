"""The Lamplighter builder: turns a checkpoint into a package for edge boxes."""

# One version for the whole distribution. The import also switches onnxruntime's telemetry off before any module here
# can import onnxruntime.
from lamplighter_agent import __version__ as __version__
