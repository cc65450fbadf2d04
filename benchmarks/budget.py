"""Compiles and times programs within a number of minutes, and notes what did not fit into them."""

import contextlib
import functools
import itertools
import signal
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks import common
from experiments.devices import matmul_algorithm
from maml_jax.types import ArrayTree

NO_TIME = "no time"


class Stopped(Exception):
    """A signal asked the program to stop."""


class Clock:
    """The minutes that are left, and whether a signal came.

    Attributes:
      seconds: all of them.
      signal: the number of the signal, or None.
    """

    def __init__(self, seconds: float):
        self.seconds, self.signal, self._start = seconds, None, time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the minutes has passed; negative afterwards."""
        return share * self.seconds - self.elapsed()

    def check(self) -> None:
        """Raises Stopped after a signal."""
        if self.signal is not None:
            raise Stopped

    def say(self, text: str) -> None:
        """Prints a line with the time."""
        print(f"[{self.elapsed():4.0f} s] {text}", flush=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGTERM and SIGINT. A second signal interrupts at once."""

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Program(NamedTuple):
    """A compiled meta-step that was called once.

    Attributes:
      call: takes the next meta-step.
      compile_seconds: seconds of compilation.
      first_seconds: seconds of the first call.
      peak_bytes: see the function of this name.
      gradient: the meta-gradient of the first step, up to a factor that is the same for all programs.
    """

    call: Callable[[], Any]
    compile_seconds: float
    first_seconds: float
    peak_bytes: int
    gradient: ArrayTree


class Bench:
    """Compiles and times programs as far as the time allows, and keeps what it compiled.

    Attributes:
      config: the command line.
      clock: its minutes.
      programs: the compiled programs.
      missing: what was left out or failed, each with its "what" and "reason".
    """

    def __init__(self, config: common.Settings, clock: Clock):
        self.config, self.clock = config, clock
        self.programs: dict[Hashable, Program] = {}
        self.missing: list[dict[str, str]] = []
        self._failed: set[Hashable] = set()

    def expected_seconds(self) -> float:
        """What one more program is expected to take until its first call is done; 0 before there is any."""
        made = self.programs.values()
        if not made:
            return 0.0
        return max(each.compile_seconds for each in made) + statistics.median(each.first_seconds for each in made)

    def leave_out(self, what: str, reason: str) -> None:
        """Notes and prints what is not measured."""
        self.missing.append({"what": what, "reason": reason})
        self.clock.say(f"{what}: {reason}")

    def fits(self, what: str, share: float, seconds: float | None = None) -> bool:
        """Whether something is expected to end before this share of the minutes has passed. If not, it is noted."""
        self.clock.check()
        seconds, left = self.expected_seconds() if seconds is None else seconds, self.clock.left(share)
        if left > seconds:
            return True
        self.clock.say(f"{what}: it takes about {seconds:.1f} s, and {max(0, left):.1f} s are left for this part")
        self.missing.append({"what": what, "reason": NO_TIME})
        return False

    def program(self, key: Hashable, what: str, share: float, make: Callable[[], tuple]) -> Program | None:
        """Compiles a meta-step and calls it once, unless it was before.

        Args:
          key: by which it is kept.
          what: its description.
          share: of the minutes, after which it is left out.
          make: `() -> (jitted, state, episodes, precision)`.

        Returns:
          The program, or None if it was left out or failed.
        """
        if key in self.programs or key in self._failed or not self.fits(what, share):
            return self.programs.get(key)
        try:
            jitted, state, episodes, precision = make()
            with jax.default_matmul_precision(matmul_algorithm(precision)):
                compiled, compile_seconds = common.compile_of(jitted, state, episodes)
            if self.clock.left() <= 0:
                self.leave_out(what, NO_TIME)
                return None
            self.clock.check()
            call = common.stepping(compiled, state, episodes)
            start = time.perf_counter()
            after, _ = jax.block_until_ready(call())
            first_seconds = time.perf_counter() - start
        except Stopped:
            raise
        except Exception as error:  # out of memory, an unknown algorithm: what compilers and devices raise has no class
            self._failed.add(key)
            self.leave_out(what, f"failed, {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
            return None
        gradient = jax.device_get(optax.tree.get(after.opt_state, "mu"))
        made = Program(call, compile_seconds, first_seconds, peak_bytes(compiled), gradient)
        self.programs[key] = made
        self.clock.say(f"{what}: compiled in {compile_seconds:.1f} s, first call {1e3 * first_seconds:.4g} ms")
        return made

    def seconds_of(self, programs: dict[str, Program], share: float) -> dict[str, list[float]]:
        """Seconds of a meta-step of each program, one number per round.

        Programs run in rounds, each in a burst of calls that is waited for once. A program that takes more than a
        quarter of `max_seconds`, or for which no time is left, has one number: that of its latest single call.
        """
        single = {name: program.first_seconds for name, program in programs.items()}
        bursts: dict[str, int] = {}
        for name, program in programs.items():
            if max(single[name], 1e-9) < self.config.max_seconds / 4 and self.clock.left(share) > 2 * single[name]:
                self.clock.check()
                single[name] = common.seconds_of(program.call)
                bursts[name] = max(1, min(100, round(0.05 / max(single[name], 1e-9))))
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        start = time.perf_counter()
        for _, (name, calls) in itertools.product(range(self.config.max_repetitions), bursts.items()):
            self.clock.check()
            spent = time.perf_counter() - start
            if spent > self.config.max_seconds or self.clock.left(share) < calls * single[name]:
                break
            seconds[name].append(common.seconds_of(functools.partial(_burst, programs[name].call, calls)) / calls)
        return {name: found or [single[name]] for name, found in seconds.items()}


def _burst(call: Callable[[], Any], calls: int) -> Any:
    for _ in range(calls - 1):
        call()
    return call()


def peak_bytes(compiled: Any) -> int:
    """The memory that one call occupies, arguments and results included; assigned by the compiler."""
    found = compiled.memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total - found.alias_size_in_bytes


def deviation(gradient: ArrayTree, reference: ArrayTree) -> float:
    """The largest difference between two meta-gradients, relative to the largest number of the second."""
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True))
    return float(max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs))
