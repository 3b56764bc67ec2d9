"""Statistics of a model's layers, and the block-diagonal approximation of the curvature that they give."""
