import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def run_python():
    """run_python(code, **environment) -> the JSON that `code` prints last, from a process of its own."""

    def run(code, **environment):
        tests = os.path.dirname(__file__)
        path = os.pathsep.join([tests, os.path.dirname(tests), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, **environment}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
