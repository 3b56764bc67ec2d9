"""A process that tracks steps until it is killed: OUTPUT RUN_ID URI FIRST_STEP [LAST_STEP STATUS]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hfdist.config.tracking import TrackingConfig
from hfdist.tracking import RunInfo, Status, make_tracker


def main(output: Path, run_id: str, uri: str, first: int, last: int, status: str) -> None:
    config = TrackingConfig(uri=uri, experiment="crash", system_metrics_every=0.2)
    tracker = make_tracker(config, output)
    run_dir = output / run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    tracker.start(RunInfo(run_id=run_id, name="crash", run_dir=run_dir, params={"steps": last}))
    for step in range(first, last):
        # A step that is repeated has the same loss, at another time.
        tracker.log_metrics({"loss": 1.0 / (step + 1), "damping": float(step)}, step)
        print(step, flush=True)
        time.sleep(0.01)
    tracker.finish(Status(status))


if __name__ == "__main__":
    folder, name, address, start, *rest = sys.argv[1:]
    end, how = (rest[0], rest[1]) if rest else ("1000000", "FINISHED")
    main(Path(folder), name, address, int(start), int(end), how)
