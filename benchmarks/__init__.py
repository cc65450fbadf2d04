"""Benchmarks of speed, memory, devices and peers. `python -m benchmarks.NAME --help` explains each."""
