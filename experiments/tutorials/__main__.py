"""Runs the tutorials and stores their outputs."""

from experiments.tutorials import main

main()
