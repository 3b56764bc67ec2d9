"""Ray: clusters, jobs, workers, Tune. The only home of `ray`."""
