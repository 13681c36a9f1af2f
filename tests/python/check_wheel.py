"""Checks a wheel without installing it: its files, the oldest glibc that its program runs on, and the libraries that it needs.

    python3 tests/python/check_wheel.py dist/gneiss_tune-*.whl

A wheel with the build tag 1cudaN may need CUDA's libraries, and has to look for them where pip puts NVIDIA's wheels.

readelf (binutils) lists the versions of glibc's symbols. Prints what was found; exits with 1 if something is wrong.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROGRAM = re.compile(r"gneiss_tune-[^/]+\.data/scripts/gneiss")
PACKAGE = ["__init__.py", "__main__.py", "_program.py", "_run.py", "_trackers.py", "py.typed"]
#: Libraries of glibc itself, which every Linux with glibc has.
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2",
             "ld-linux-aarch64.so.1", "libgcc_s.so.1"}
#: Minor versions of Python 3 in whose environments a program looks for libraries.
PYTHONS = range(9, 15)
#: Libraries of CUDA: that of the driver, which every machine with a GPU has, and those of NVIDIA's wheels.
CUDA_LIBRARIES = re.compile(r"libcuda\.so\.1|lib(cublas|cublasLt|cudart|curand|nvrtc)\.so\.\d+")
#: The newest versions of the C++ library's symbols that manylinux_2_28 has: those of GCC 8.
CXX_VERSIONS = {"GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}


def readelf(path, flag):
    return subprocess.run(["readelf", "-W", flag, path], check=True, capture_output=True, text=True).stdout


def newest_of(listed, name):
    """The newest version of a library's symbols in readelf's list; () if there is none."""
    return max((tuple(map(int, v.split("."))) for v in re.findall(rf"\b{name}_(\d+(?:\.\d+)+)", listed)), default=())


def problems(wheel):
    tag = re.fullmatch(r"gneiss_tune-[^-]+(?:-1cuda(?P<cuda>\d+))?-py3-none-(?P<platform>.+)\.whl", wheel.name)
    if not tag:
        return [f"expected gneiss_tune-VERSION[-1cudaN]-py3-none-PLATFORM.whl, found {wheel.name}"]
    found = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"no gneiss_tune/{name}" for name in PACKAGE if f"gneiss_tune/{name}" not in names]
        others = [name for name in names if not re.match(r"gneiss_tune(/|-[^/]+\.(data/scripts|dist-info)/)", name)]
        found += [f"a file that is not part of the package: {name}" for name in others]
        program = next(filter(PROGRAM.fullmatch, names), None)
        if program is None:
            return [*found, "no program in the wheel's scripts"]
        if archive.getinfo(program).external_attr >> 16 & 0o111 != 0o111:
            found.append(f"{program}: expected a file that can be executed")
        path = archive.extract(program, folder)
        dynamic = readelf(path, "-d")
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)) - LIBRARIES
        if tag["cuda"]:
            needed.discard("libstdc++.so.6")
            of_cuda = {library for library in needed if CUDA_LIBRARIES.fullmatch(library)}
            needed -= of_cuda
            print("libraries of CUDA:", ", ".join(sorted(of_cuda)))
            found += [f"expected a program that needs {name}, found one that does not" for name in ("libcuda", "libcublas")
                      if not any(library.startswith(f"{name}.so") for library in of_cuda)]
            searched = "".join(re.findall(r"\(RUNPATH\).*\[(.+)\]", dynamic)).split(":")
            places = [f"$ORIGIN/../lib/python3.{minor}/site-packages/nvidia/cu{tag['cuda']}/lib" for minor in PYTHONS]
            found += [f"expected a program that looks for libraries in {place}" for place in places if place not in searched]
        if needed:
            found.append(f"{program} needs {', '.join(sorted(needed))}")
        listed = readelf(path, "-V")
    newest = newest_of(listed, "GLIBC")
    found += [f"{program} needs {name}_{'.'.join(map(str, newest_of(listed, name)))}" for name, has in CXX_VERSIONS.items()
              if newest_of(listed, name) > has]
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, needs glibc {'.'.join(map(str, newest))}")
    promised = re.match(r"manylinux_(\d+)_(\d+)_", tag["platform"])
    if not promised:
        found.append(f"expected a tag manylinux_X_Y, found {tag['platform']}: the wheel may not run on other machines")
    elif newest > tuple(map(int, promised.groups())):
        found.append(f"the tag promises glibc {promised[1]}.{promised[2]}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wrong = problems(Path(sys.argv[1]))
    sys.exit("\n".join(wrong) if wrong else 0)
