"""What the paper does not discuss and the four programs share; README.md shows how to use it."""
