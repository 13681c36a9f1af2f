"""Whether the machine was disturbed during a step: what `gneiss bench` does for its own steps (src/bench/canary), for PEFT's.

Another guest on the second hardware thread of a core takes up to half of its arithmetic, and no counter of the system shows
it. A product of fixed size on torch's threads, before and after each step, does.
"""

import time
from pathlib import Path

# As src/bench/canary: part of the fastest rate that a quiet machine reaches, part of a step that a thread may wait for a
# core, and how many quiet steps figures need.
QUIET_SHARE, WAITING_SHARE = 0.8, 0.1
FEWEST_STEPS, FEWEST_PART = 3, 3
SIDE = 256  # rows and columns of the product; its three matrices fill 0.8 MB
WARMUP, TIMED = 2, 4  # products of a reading: some 0.5 ms
CALIBRATION = 20  # readings at the start, so that the fastest rate is known


class Canary:
    """The readings around the steps of a process."""

    def __init__(self):
        import torch

        self.left = self.right = torch.ones(SIDE, SIDE)
        self.fastest = 0.0
        for _ in range(CALIBRATION):
            self.read()

    def read(self):
        """(rate in operations a second, seconds that each thread of this process has waited for a core)."""
        for _ in range(WARMUP):
            self.left @ self.right
        start = time.perf_counter()
        for _ in range(TIMED):
            self.left @ self.right
        rate = TIMED * 2 * SIDE**3 / (time.perf_counter() - start)
        self.fastest = max(self.fastest, rate)
        return rate, waited()

    def quiet(self, readings, seconds):
        """Whether each step was quiet: step i took seconds[i] and lies between readings[i] and readings[i + 1]."""
        least = QUIET_SHARE * self.fastest
        return [
            min(before[0], after[0]) >= least and longest_wait(before[1], after[1]) <= WAITING_SHARE * took
            for before, after, took in zip(readings, readings[1:], seconds)
        ]


def waited():
    """{thread: seconds it was ready and waited for a core}: the second number of Linux's schedstat."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            found[path.parent.name] = int(path.read_text().split()[1]) * 1e-9
        except (OSError, IndexError):
            pass  # the thread has ended, or the kernel keeps no such figure
    return found


def longest_wait(before, after):
    return max((after[thread] - before[thread] for thread in before.keys() & after.keys()), default=0.0)


def used(quiet):
    """The steps that figures are of: the quiet ones, or all if fewer than three or fewer than a third are quiet."""
    count = sum(quiet)
    return quiet if count >= FEWEST_STEPS and FEWEST_PART * count >= len(quiet) else [True] * len(quiet)
