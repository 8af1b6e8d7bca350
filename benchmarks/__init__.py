"""Measurement: benchmarks of policies, and of the system itself (`benchmarks/systems`)."""
