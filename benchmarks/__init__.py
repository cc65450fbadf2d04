"""The benchmarks: speed, memory, devices and peers, run as `python -m benchmarks.NAME --help`."""
