"""Lists the programs: `python -m models`."""

import ast
import sys
from pathlib import Path


def main() -> None:
    """Prints each program's name and the first line of its docstring."""
    print("programs (each has --help):\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("__"):
            continue
        about = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        print(f"  python -m models.{path.stem:12} {about}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
