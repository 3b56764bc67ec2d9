"""Ray: clusters, jobs, workers, Tune. The only user of `ray`."""
