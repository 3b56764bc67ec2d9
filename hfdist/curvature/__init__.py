"""The objective of a step on real models: losses, gradients and curvature products, summed over
microbatches and ranks. The only home of `backpack`."""
