"""Tests the wheels in dist/ as users install them: in fresh environments, with only Python on PATH.

    python -m wheels.try_out [--this]

For each Python that a wheel names, pip installs TensorFlow and the wheel, and `wheels/checks.py`
runs. Then each wheel for another TensorFlow, if there is one, replaces it. Importing that one must
fail with an error that names both versions.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

from wheels.build import ROOT, find_pythons

PACKAGE = "tensorflow-weight-norm"
TENSORFLOWS = ("tensorflow", "tensorflow-cpu")


def call(environment: Path, *words: object) -> subprocess.Popen:
    """Starts an environment's Python with hardly any of this process's environment variables.

    It keeps pip's, and where to find libpython, without which GitHub's Pythons cannot start.
    """
    kept = ("PIP_", "LD_LIBRARY_PATH")
    variables = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    return subprocess.Popen(
        [environment / "bin" / "python", *map(str, words)],
        env=variables | {"PATH": f"{environment}/bin", "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pip(environment: Path, *words: object) -> float:
    """Runs pip install and returns the seconds that it took."""
    begin = time.monotonic()
    options = ["--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    process = call(environment, "-m", "pip", "install", *options, *words)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"pip install {words}: {output}")
    return time.monotonic() - begin


def try_wheel(python: str, wheel: Path, minor: str, others: list[Path]) -> str:
    """Tests one wheel with one Python. Returns its timings, in seconds, as cells of the table."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        subprocess.run([python, "-m", "venv", environment], check=True)
        tensorflow = pip(environment, f"tensorflow-cpu=={minor}.*")

        # By name, as from a package index, so that pip has to choose the wheel for this TensorFlow.
        begin = time.monotonic()
        named = f"{PACKAGE}[tensorflow-cpu]"
        install = pip(environment, "--no-index", "--find-links", wheel.parent, named)
        process = call(environment, "-W", "error", ROOT / "wheels" / "checks.py")
        trained, output = None, ""
        assert process.stdout
        for line in process.stdout:
            output += line
            if line == "passed: trained step\n":
                trained = time.monotonic() - begin
        if process.wait() != 0 or trained is None:
            raise SystemExit(f"{wheel.name}, {python}: {output}")
        passed = re.findall(r"^passed: (.*)$", output, re.MULTILINE)
        print(f"{wheel.name}, {python}: {', '.join(passed)}", flush=True)

        for other in others:
            pip(environment, "--no-index", "--no-deps", "--force-reinstall", other)
            error, _ = call(environment, "-c", "import tfwn").communicate()
            built = re.search(r"\+tf([\d.]+)-", other.name)
            assert built
            last = error.strip().splitlines()[-1]
            expected = (
                rf"ImportError: tfwn was built for TensorFlow {built[1]}.* is TensorFlow {minor}"
            )
            if not re.match(expected, last):
                raise SystemExit(f"{other.name} with TensorFlow {minor}: {error}")
            print(f"{other.name} with TensorFlow {minor}: {last}", flush=True)
    return f"{tensorflow:.0f} | {install:.0f} | {trained:.0f}"


def this() -> tuple[str, str]:
    """Returns the minor versions of this environment's TensorFlow and Python."""
    (version,) = {d.version for d in distributions() if d.name.replace("_", "-") in TENSORFLOWS}
    return ".".join(version.split(".")[:2]), "{}.{}".format(*sys.version_info)


def main() -> None:
    """Tests the wheels and prints a table of the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--this", action="store_true", help="only with this environment's Python and TensorFlow"
    )
    only = this() if parser.parse_args().this else None
    wheels = sorted((ROOT / "dist").glob("*+tf*.whl"))
    rows = []
    for wheel in wheels:
        match = re.search(r"\+tf([\d.]+)-([\w.]+)-", wheel.name)
        assert match
        for version, python in find_pythons().items():
            tag = "cp" + version.replace(".", "")
            if tag in match[2].split(".") and only in (None, (match[1], version)):
                others = [other for other in wheels if other != wheel]
                seconds = try_wheel(python, wheel, match[1], others)
                rows.append(f"| {match[1]} | {version} | {seconds} |")
    if not rows:
        raise SystemExit(f"wheels.try_out: no such wheel in {ROOT / 'dist'}. Run make wheels")
    print("| TensorFlow | Python | seconds for TensorFlow | for the wheel | to a trained step |")
    print("|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
