"""The paper's experiments, one program for each section; `python -m models` lists them."""
