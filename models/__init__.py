"""The paper's experiments, one program a section; `python -m models` lists them."""

import os
import sys


def _import_tensorflow_quietly() -> None:
    """Keeps TensorFlow's start-up notes off the terminal; they heed no log level while loading.

    It takes seconds, so a terminal shows that meanwhile. TF_CPP_MIN_LOG_LEVEL=0 shows everything
    again.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    seen = sys.stderr.isatty()
    if seen:
        sys.stderr.write("loading TensorFlow ...")
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow as tf

        tf.config.list_physical_devices()
    except ImportError:
        pass  # The program's own import tells.
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        if seen:
            sys.stderr.write("\r\x1b[K")  # Removes the line.
            sys.stderr.flush()


_is_program = sys.argv[:1] == ["-m"] and any(w.startswith("models.") for w in sys.orig_argv)
if _is_program and sys.stderr and os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":
    _import_tensorflow_quietly()
