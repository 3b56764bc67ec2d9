"""Take a job out of its cluster's table, as a job of that cluster: `python -m hfdist.launch.ray.forget ID`.

Ray's own dashboard deletes no job whose id does not fit into an address (`../x`), or that waits for a driver
that will never come.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Remove what Ray's table of jobs holds of the job."""
    import ray
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental.internal_kv import _internal_kv_del

    (job_id,) = sys.argv[1:]
    ray.init("auto", log_to_driver=False)
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job_id)
    _internal_kv_del(key.encode(), namespace=KV_NAMESPACE_JOB)


if __name__ == "__main__":
    main()
