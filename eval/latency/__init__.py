"""Latency and throughput: load, measurement, figures, their gate."""
