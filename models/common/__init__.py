"""The infrastructure that the programs share; README.md shows how to use it."""
