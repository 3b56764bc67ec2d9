"""deploy/vms against Ray's own schema, and what `ray up` tells a machine that exists in this test alone."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "deploy" / "vms" / "cluster.yaml"

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = prepare_config(copy.deepcopy(config))
    validate_config(found)
    return found


def test_ray_accepts_it() -> None:
    import jsonschema

    config = yaml.safe_load(FILE.read_text())
    assert prepared(config)["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError, match="run_option"):
        prepared({**config, "docker": {**config["docker"], "run_option": []}})


def test_the_commands_are_rays() -> None:
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    config = yaml.safe_load(FILE.read_text())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        options = re.findall(r"--[\w-]+", " ".join(commands))
        assert options
        assert set(options) <= known


def test_what_a_machine_is_told(tmp_path: Path) -> None:
    config = yaml.safe_load(FILE.read_text())
    name = f"hfdist-test-{os.getpid()}"
    key = tmp_path / "key"
    key.touch(0o600)
    config |= {"cluster_name": name, "auth": {"ssh_user": "ubuntu", "ssh_private_key": str(key)}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    path = os.pathsep.join([str(Path(__file__).parent / "vms_bin"), os.environ["PATH"]])
    ray = Path(sys.executable).parent / "ray"
    try:
        found = subprocess.run(
            [ray, "up", "--yes", "--no-config-cache", tmp_path / "cluster.yaml"],
            env={**os.environ, "PATH": path, "VMS_TEST_FOLDER": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=360,
        )
    finally:
        for left in Path("/tmp/ray").glob(f"cluster-{name}.*"):
            left.unlink()
    assert found.returncode == 0, found.stdout + found.stderr
    copied = (tmp_path / "copied").read_text()
    for control in set(re.findall(r"ControlPath=(\S+)/%C", copied)):
        shutil.rmtree(control, ignore_errors=True)
    assert all("ubuntu@10.0.0.10:" in line for line in copied.splitlines())

    told = (tmp_path / "commands").read_text().splitlines()
    (run,) = [line for line in told if "docker run" in line]
    for option in config["docker"]["run_options"]:
        assert option in run
    assert f" --net=host {config['docker']['image']} bash)" in run
    (start,) = [line for line in told if "ray start" in line]
    assert "docker exec -it  hfdist /bin/bash" in start
    assert "--autoscaling-config=/home/hfdist/ray_bootstrap_config.yaml" in start
    assert told.index(run) < told.index(start)
    # What the launcher wants inside the container, the Dockerfile puts there.
    dockerfile = (FILE.parent / "Dockerfile").read_text()
    assert any("(rsync -e " in line and "docker exec -i" in line for line in told)
    assert {"openssh-client", "rsync"} <= set(dockerfile.split())
    assert "bash --login" in start  # it reads /etc/profile, which sets a PATH of its own
    assert ">/etc/profile.d/hfdist.sh" in dockerfile
    assert "ENV HOME=/home/hfdist" in dockerfile  # the launcher asks the image for it
