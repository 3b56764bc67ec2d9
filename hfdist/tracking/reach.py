"""Does a job's MLflow server answer?"""

from __future__ import annotations

from pathlib import Path

from hfdist.config.tracking import TrackingConfig, store_uri
from hfdist.errors import ConfigError
from hfdist.tracking.client import connect, is_server, one_line, public


def where_recorded(config: TrackingConfig, output: Path) -> str:
    """Say where a job is recorded, once its server has answered; a store in files is not opened.

    Raises:
        ConfigError: The server does not answer, or refuses.
    """
    if not config.enabled:
        return "off"
    uri = public(store_uri(config, output))
    if is_server(uri):
        try:
            connect(uri).search_experiments(max_results=1)
        except Exception as error:  # whatever MLflow's client and its libraries raise
            raise ConfigError(
                f"MLflow at {public(uri)} does not answer: {public(one_line(error))}"
            ) from error
    return public(uri)
