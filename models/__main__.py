"""Lists the programs, or runs one: `python -m models`, `python -m models cifar --preset smoke`."""

import ast
import runpy
import sys
from pathlib import Path

from models.common.errors import nearest


def main() -> None:
    """Runs the program named by the first argument, or lists the programs if there is none."""
    folders = sorted(file.parent for file in Path(__file__).parent.glob("*/__main__.py"))
    names = [folder.name for folder in folders] + ["figures"]
    if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
        name = sys.argv.pop(1).removeprefix("models.")
        if name not in names:
            sys.exit(f"python -m models: unknown program {name!r}" + nearest(name, names))
        runpy.run_module(f"models.{name}", run_name="__main__", alter_sys=True)
        return
    print("programs (each has --help):\n")
    files = [folder / "__init__.py" for folder in folders] + [
        Path(__file__).with_name("figures.py")
    ]
    for name, file in zip(names, files, strict=True):
        about = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
        print(f"  python -m models.{name:12} {about}")
    print("\nStart with --preset smoke or cpu; see docs/run-the-experiments.md.")


if __name__ == "__main__":
    main()
