"""What both comparisons share: child processes, the machine, files of figures."""

import csv
import os
import platform
import signal
import subprocess
import tempfile
from pathlib import Path

# What CUDA, cuBLAS and glibc say where memory runs out.
OUT_OF_MEMORY = ("out of memory", "OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "memory allocation of")


class Failed(Exception):
    """A run that gave no figures."""


class OutOfMemory(Failed):
    """A run that ended because memory did."""


def run(command, environment):
    """Standard output and the peak resident set in bytes of a child process."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **environment})
        except OSError as error:
            raise Failed(f"{command[0]}: {error.strerror}") from None
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, complaint = out.read().decode(), err.read().decode(errors="replace")
    if child.returncode != 0:
        starved = [line for line in complaint.splitlines() if any(text in line for text in OUT_OF_MEMORY)]
        if child.returncode == -signal.SIGKILL:  # the kernel's way with what asks for more than the machine has
            starved.append("killed")
        if starved:
            raise OutOfMemory(starved[0])
        raise Failed(f"{' '.join(command)}\nexit code {child.returncode}\n{complaint[-2000:]}")
    # Linux counts in KiB. The figure can't be under this small parent's own, from which it is forked.
    return text, usage.ru_maxrss * 1024


def gneiss_version(args):
    return run([args.gneiss, "--version"], {})[0].strip()


def describe_machine():
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 1e9, 1),
            "system": f"{platform.system()} {platform.release()}"}


def append_row(path, row):
    """Appends a row to a CSV file; a new file gets the row's keys as its header."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)
