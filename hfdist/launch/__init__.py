"""Ways to start the workers of a run: in this process, torchrun, Ray. The only home of `ray`."""

from hfdist.launch.config import LaunchConfig
from hfdist.launch.start import start

__all__ = ["LaunchConfig", "start"]
