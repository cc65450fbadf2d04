"""The experiments: one readable file each, run as `python -m experiments.NAME --help`."""

import signal
import sys

# Imports take seconds, and an interruption ends them without a traceback. `cli.mistakes_in_one_paragraph` takes over.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
