"""Ways to start the workers of a run: in this process, torchrun, Ray. The only home of `ray`."""
