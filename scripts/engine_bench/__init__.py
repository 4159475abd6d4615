"""The parts of ``scripts/bench engine``: models, workload, one measuring process an engine, table and plots."""
