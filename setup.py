"""Builds csrc into three libraries in tfwn/, against the installed TensorFlow.

    _ops.so        the TensorFlow op, CPU and CUDA kernels
    _xla.so        the op for XLA: the kernels as targets of custom calls
    native.<abi>   the kernels on NumPy arrays and device pointers, without TensorFlow

`python setup.py build_ext --inplace` compiles only what changed. Environment variables:

    TFWN_CUDA=0                  no CUDA kernels, even if nvcc is found
    TFWN_CUDA_ARCHITECTURES=90   the GPUs to compile for, or "80;90" (default: one per generation)
    TFWN_XLA=0                   no _xla.so
    TFWN_TENSORFLOW=0            only `native`, which needs no TensorFlow
    TFWN_PYTHONS="python3.10 ..."    the Pythons to compile `native` for (default: this one)
    CXX, CXXFLAGS, CUDA_HOME     as usual
"""

import filecmp
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import SUPPORTED, TensorFlow, find_tensorflow, requirements

CXX = shlex.split(os.environ.get("CXX", "")) or ["g++"]  # It may name a launcher: "ccache g++".
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
CACHE = Path("build/objects")
BUILD_INFO = "tfwn/_build_info.json"
CPU_KERNELS = sorted(glob("csrc/weight_norm_cpu*.cc"))
CUDA_KERNELS = sorted(glob("csrc/weight_norm_cuda*.cu"))
OTHER_CUDA = (
    "CUDA_HOME chooses another CUDA, CXX another host compiler, TFWN_CUDA=0 builds without CUDA"
)
FLAGS = ["-I.", "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def wanted(name: str) -> bool:
    """Returns whether environment variable `name` leaves a part of the build enabled."""
    return os.environ.get(name, "1").lower() not in ("0", "off", "false", "no")


def output_of(*command: str) -> str:
    """Returns what `command` prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Python:
    """A Python to compile the bindings for."""

    tag: str  # "cp311"
    suffix: str  # of its extension modules
    include: str

    @classmethod
    def of(cls, executable: str) -> "Python":
        """Asks a Python for its tag, suffix and include directory."""
        ask = (
            "import sys, sysconfig; print('cp%d%d' % sys.version_info[:2], "
            "sysconfig.get_config_var('EXT_SUFFIX'), sysconfig.get_path('include'), sep='\\n')"
        )
        try:
            return cls(*output_of(executable, "-I", "-c", ask).splitlines())
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"tfwn: TFWN_PYTHONS must list Pythons, but {executable} fails: {error}"
            ) from None

    @property
    def extension(self) -> str:
        """The bindings' name in setuptools for this Python."""
        return f"tfwn.native@{self.tag}"


PYTHONS = [
    Python.of(p) for p in shlex.split(os.environ.get("TFWN_PYTHONS", "")) or [sys.executable]
]


def missing_tools() -> list[str]:
    """Returns an error message for each missing requirement of the build."""
    missing = []
    if sys.platform != "linux":
        missing.append(f"this is {sys.platform}, but tfwn needs Linux (on Windows: WSL)")
    if not importlib.util.find_spec("pybind11"):
        missing.append("no pybind11. Install it: pip install 'pybind11>=2.13'")
    if not shutil.which(CXX[0]):
        missing.append(f"no C++ compiler: {CXX[0]} not found. Install g++, or set CXX")
    for python in PYTHONS:
        if not os.path.exists(f"{python.include}/Python.h"):
            missing.append(
                f"no Python.h in {python.include}. Install Python's headers (Debian, Ubuntu: "
                f"apt install python3.{python.tag[3:]}-dev)"
            )
    tensorflow = find_tensorflow() if wanted("TFWN_TENSORFLOW") else None
    if wanted("TFWN_TENSORFLOW") and not (tensorflow and tensorflow.supported):
        found = (
            f"tfwn does not support TensorFlow {tensorflow.version}"
            if tensorflow
            else "TensorFlow is not installed"
        )
        missing.append(
            f"{found}. Install a supported one first: pip install '{SUPPORTED}'. "
            "TFWN_TENSORFLOW=0 builds the kernels without it"
        )
    return missing


class Cuda:
    """An nvcc and the GPU architectures to compile for."""

    def __init__(self, nvcc: str):
        self.nvcc = str(Path(nvcc).resolve())
        self.home = Path(self.nvcc).parent.parent
        try:
            self.version = re.findall(r"release ([\d.]+)", output_of(nvcc, "--version"))[0]
            listed = output_of(nvcc, "--list-gpu-arch")
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"tfwn: {nvcc} does not run, or is older than CUDA 11: {error}. {OTHER_CUDA}"
            ) from None
        known = sorted(int(a) for a in re.findall(r"compute_(\d+)$", listed, re.MULTILINE))
        words = re.findall(r"[^\s;,]+", os.environ.get("TFWN_CUDA_ARCHITECTURES", ""))
        if wrong := [word for word in words if not word.isdigit()]:
            raise SystemExit(
                f"tfwn: TFWN_CUDA_ARCHITECTURES must list numbers, such as 80;90, but names {wrong}"
            )
        chosen = sorted(map(int, words))
        if old := [a for a in chosen if a < 70]:
            raise SystemExit(
                f"tfwn: TFWN_CUDA_ARCHITECTURES names {old}, whose blocks have too little shared "
                "memory for the kernels. Name architectures from 70 on"
            )
        if unknown := [a for a in chosen if a not in known]:
            raise SystemExit(
                f"tfwn: TFWN_CUDA_ARCHITECTURES names {unknown}, which {nvcc} ({self.version}) "
                f"does not know. It knows {known}"
            )
        # Machine code also runs on later minor versions, so one architecture per major is enough.
        first = {a // 10: a for a in reversed(known) if a >= 75}
        self.architectures = chosen or sorted(first.values())

    @classmethod
    def find(cls) -> "Cuda | None":
        """Returns the CUDA toolkit in CUDA_HOME, CUDA_PATH, /usr/local/cuda or PATH, if any."""
        if not (CUDA_KERNELS and wanted("TFWN_CUDA")):
            return None
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        for home in filter(None, homes):
            if nvcc := shutil.which("nvcc", path=f"{home}/bin"):
                return cls(nvcc)
        nvcc = shutil.which("nvcc")
        return cls(nvcc) if nvcc else None

    @property
    def compile_command(self) -> list[str]:
        """The nvcc command for all architectures, with PTX of the newest one for later GPUs."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        newest = self.architectures[-1]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        if int(self.version.split(".")[0]) >= 13:  # 9x smaller; all its drivers can unpack it
            codes.append("--compress-mode=size")
        return [
            self.nvcc,
            "-I.",
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            f"-DTFWN_NVCC={self.version}",  # Unused; recompiles after an upgrade.
            "--threads=0",
            f"-ccbin={next((w for w in CXX if Path(w).name not in LAUNCHERS), CXX[0])}",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *codes,
        ]

    @property
    def folders(self) -> list[str]:
        """The folders of headers and libraries. conda has them in the second one only."""
        return [f"{self.home}", f"{self.home}/targets/{os.uname().machine}-linux"]

    @property
    def link_flags(self) -> list[str]:
        """Flags that link the CUDA runtime statically, so that it need not be installed."""
        libraries = [f"-L{folder}/{lib}" for folder in self.folders for lib in ("lib64", "lib")]
        return [*libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def run(command: list[str], output: Path) -> float:
    """Runs a compiler, whose output appears only when complete. Returns the seconds it took."""
    begin = time.time()
    part = output.with_suffix(f".{os.getpid()}.part")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode != 0:
        hint = f". {OTHER_CUDA}" if Path(command[0]).name == "nvcc" else ""
        raise SystemExit(f"tfwn: {shlex.join(command)}\n{done.stderr}tfwn: failed{hint}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    os.utime(part, (begin, begin))  # so that an edit during the compilation is newer
    part.replace(output)
    return time.time() - begin


def compile_all(commands: dict[str, list[str]], versions: str, jobs: int) -> dict[str, Path]:
    """Returns the object file of each source, after compiling those that are out of date.

    A source may end with "@" and a name, to distinguish objects compiled by different commands.
    """
    objects, stale = {}, []
    for source, command in commands.items():
        key = hashlib.sha256("\0".join([*command, source, versions]).encode()).hexdigest()[:12]
        objects[source] = CACHE / f"{Path(source).stem}-{key}.o"
        if not up_to_date(objects[source]):
            stale.append(source)
    if stale:
        compilers = " and ".join(dict.fromkeys(Path(commands[s][0]).name for s in stale))
        told = f"Compiling {len(stale)} of {len(commands)} files with {compilers} (takes minutes)"
        print(told, flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        running = {}
        for source in stale:
            made_of = ["-MMD", "-MF", str(objects[source].with_suffix(".d"))]
            command = [*commands[source], *made_of, "-c", source.partition("@")[0]]
            running[pool.submit(run, command, objects[source])] = Path(source).name
        try:
            for number, done in enumerate(as_completed(running), 1):
                print(f"[{number}/{len(stale)}] {running[done]}, {done.result():.0f} s", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # After a failure or Ctrl-C, start no other file.
    return objects


def up_to_date(output: Path) -> bool:
    """Returns whether an object exists and none of its inputs is newer."""
    dependencies = output.with_suffix(".d")
    if not (output.exists() and dependencies.exists()):
        return False
    inputs = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = output.stat().st_mtime
    return all(os.path.exists(i) and os.stat(i).st_mtime <= made for i in inputs)


def link(objects: list[Path], flags: list[str]) -> Path:
    """Returns a library of these objects, after linking it if it is out of date."""
    command = [*CXX, "-shared", *map(str, objects), *flags]
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    output = CACHE / f"library-{key}.so"
    if not (output.exists() and all(o.stat().st_mtime <= output.stat().st_mtime for o in objects)):
        run(command, output)
    return output


def replace(source: Path, destination: Path) -> None:
    """Copies a file without writing into an old one that a running process may have mapped."""
    if destination.exists() and filecmp.cmp(source, destination, shallow=False):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_suffix(f".{os.getpid()}.part")
    shutil.copy(source, part)
    part.replace(destination)


def search(*folders: str) -> list[str]:
    """Returns flags to search folders for headers.

    Compilers search /usr/include anyway; -isystem would move it before the C++ library, whose
    headers then do not find C's. CUDA is in /usr when it comes from Debian's own packages.
    """
    return [flag for f in folders if f != "/usr/include" for flag in ("-isystem", f)]


def labels(ext: Extension) -> list[str]:
    """Returns the sources of a library, each with "@" and the tag of its Python, if any."""
    _, at, python = ext.name.partition("@")
    return [source + at + python for source in ext.sources]


class Build(build_ext):
    """Calls g++ and nvcc directly, because setuptools knows neither .cu files nor dependencies."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns a library's file name. Only the bindings depend on Python and have its suffix."""
        name, _, tag = fullname.partition("@")
        suffix = next((python.suffix for python in PYTHONS if python.tag == tag), ".so")
        return os.path.join(*name.split(".")) + suffix

    def build_extensions(self) -> None:
        """Compiles and links the libraries, and records what they were built against."""
        if missing := missing_tools():
            raise SystemExit("\n".join(f"tfwn: {what}" for what in missing))
        cuda = Cuda.find()
        tensorflow = find_tensorflow() if wanted("TFWN_TENSORFLOW") else None
        compiler = output_of(*CXX, "--version").splitlines()[0]
        info = {
            "tensorflow": tensorflow.version if tensorflow else None,
            "cuda": cuda.version if cuda else None,
            "cuda_architectures": cuda.architectures if cuda else [],
            "compiler": compiler,
        }
        print(f"tfwn: TensorFlow {info['tensorflow']}, {compiler},", end=" ")
        print(f"CUDA {cuda.version} {cuda.architectures}" if cuda else "no CUDA", flush=True)

        base = [*CXX, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        compile_commands = dict.fromkeys(CPU_KERNELS, base)
        if cuda:
            compile_commands |= dict.fromkeys(CUDA_KERNELS, cuda.compile_command)
        kernels = list(compile_commands)
        for ext in self.extensions:
            for source in labels(ext):
                flags = self.compile_flags(ext, tensorflow, info)
                if cuda:
                    headers = search(*(f"{folder}/include" for folder in cuda.folders))
                    flags += ["-DTFWN_CUDA=1", *headers]
                compile_commands[source] = base + flags

        CACHE.mkdir(parents=True, exist_ok=True)
        longest = (".cu", "xla", "tensorflow")
        sources = sorted(compile_commands, key=lambda s: [w in s for w in longest], reverse=True)
        commands = {source: compile_commands[source] for source in sources}
        objects = compile_all(commands, compiler, self.parallel or os.cpu_count() or 1)
        for ext in self.extensions:
            flags = self.link_flags(ext, cuda, tensorflow)
            library = link([objects[source] for source in [*labels(ext), *kernels]], flags)
            replace(library, Path(self.get_ext_fullpath(ext.name)))
        path = Path(self.build_lib, BUILD_INFO)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(info) + "\n")

    @staticmethod
    def compile_flags(
        ext: Extension, tensorflow: TensorFlow | None, info: dict[str, Any]
    ) -> list[str]:
        """Returns the include and macro flags of a library's own sources."""
        python = next((p for p in PYTHONS if p.extension == ext.name), None)
        if python:
            import pybind11

            macros = {
                "TFWN_TENSORFLOW_VERSION": info["tensorflow"] or "",
                "TFWN_CUDA_VERSION": info["cuda"] or "",
                "TFWN_CUDA_ARCHITECTURES": ",".join(map(str, info["cuda_architectures"])),
            }
            flags = [f'-D{name}="{value}"' for name, value in macros.items()]
            includes = [pybind11.get_include(), python.include]
        else:
            assert tensorflow
            # No source uses the version. It is there to recompile after TensorFlow was upgraded.
            flags = [*tensorflow.compile_flags, f'-DTFWN_TENSORFLOW_VERSION="{tensorflow.version}"']
            includes = [tensorflow.include]
            if ext.name == "tfwn._xla":
                external = f"{tensorflow.include}/external"
                includes += [f"{external}/highwayhash", f"{external}/farmhash_archive/src"]
        return flags + search(*includes)

    @staticmethod
    def link_flags(ext: Extension, cuda: Cuda | None, tensorflow: TensorFlow | None) -> list[str]:
        """Returns the flags for linking a library.

        The CUDA runtime must precede TensorFlow, whose GPU build exports stubs of the same names.
        """
        flags = ["-Wl,-O1", "-Wl,--as-needed"]
        if cuda:
            flags += cuda.link_flags
        if tensorflow and not ext.name.startswith("tfwn.native"):
            flags += ["-Wl,-z,defs", f"-L{tensorflow.lib}"]
            flags += ["-l:libtensorflow_cc.so.2"] if ext.name == "tfwn._xla" else []
            flags += ["-l:libtensorflow_framework.so.2"]
        return flags

    def copy_extensions_to_source(self) -> None:
        """Copies the libraries into tfwn/ for an in-place build or an editable installation."""
        for name in map(self.get_ext_filename, (ext.name for ext in self.extensions)):
            replace(Path(self.build_lib, name), Path(name))
        replace(Path(self.build_lib, BUILD_INFO), Path(BUILD_INFO))
        if not wanted("TFWN_XLA"):
            Path("tfwn/_xla.so").unlink(missing_ok=True)  # from an earlier build

    def get_outputs(self) -> list[str]:
        """Returns the files of the libraries and of the build information."""
        return [*super().get_outputs(), os.path.join(self.build_lib, BUILD_INFO)]


class Wheel(bdist_wheel):
    """Names a wheel after the Pythons whose bindings it contains; the rest needs no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns setuptools' tag for this Python, or the tags of others without an ABI."""
        python, abi, platform = super().get_tag()
        held = ".".join(sorted(python.tag for python in PYTHONS))
        return (python, abi, platform) if held == python else (held, "none", platform)


def extensions() -> list[Extension]:
    """Returns the libraries to build. Linking adds the kernels to each of them."""
    sources = {python.extension: ["csrc/python_bindings.cc"] for python in PYTHONS}
    if wanted("TFWN_TENSORFLOW"):
        sources["tfwn._ops"] = ["csrc/tensorflow_ops.cc"]
        if wanted("TFWN_XLA"):
            sources["tfwn._xla"] = ["csrc/tensorflow_xla.cc", "csrc/xla_handlers.cc"]
    return [Extension(name, files) for name, files in sources.items()]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
        **requirements(),
    )
