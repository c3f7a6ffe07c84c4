"""Ways to compute attention where each token uses only some heads; all give the same result."""
