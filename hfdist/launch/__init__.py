"""Ways to start the workers of a run: in this process, processes of this machine, torchrun, Ray."""
