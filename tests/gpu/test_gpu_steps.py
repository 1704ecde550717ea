"""The time box of `make gpu`: order, limits, what is left of a step that is cut, and the result file."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_headline
from benchmarks.gpu_steps import GRACE, LEAST, Result, Step, faults, run

FACTS = {"gpu": None, "dry_run": True, "torch": "2", "triton": "3", "seconds": 60}
ROWS = "from benchmarks.gpu_steps import emit\nfor i in range(3): emit({'i': i})\n"


def step(name, code, limit=60, **options):
    return Step(name, [sys.executable, "-c", code], limit, **options)


def steps_run(tmp_path, steps, seconds=60):
    result = Result(tmp_path / "results" / "gpu.json", FACTS, steps)
    passed = run(steps, seconds, {**os.environ}, result, tmp_path / "log")
    content = json.loads(result.path.read_text())
    assert faults(content) == []
    assert content["finished"]
    return passed, content["steps"], (tmp_path / "log").read_text()


def test_steps_run_in_their_order_and_the_file_is_whole_after_each(tmp_path):
    path = tmp_path / "results" / "gpu.json"
    look = f"import json; print([(n, s['state']) for n, s in json.load(open({str(path)!r}))['steps'].items()])"
    passed, steps, log = steps_run(tmp_path, [step("one", ROWS), step("two", look), step("three", "print('done')")])
    assert passed
    assert steps["one"]["rows"] == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert steps["two"]["last_lines"] == ["[('one', 'passed'), ('two', 'cut'), ('three', 'not run')]"]
    assert log.index("== one") < log.index('ROW {"i": 2}') < log.index("== two") < log.index("done")


def test_a_step_that_is_cut_leaves_its_figures_and_no_process(tmp_path):
    """Also where it and what it started do not heed the request to end."""
    deaf = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child = "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, 1); time.sleep(60)'])\n"
    code = ROWS + deaf + child + "print('child', child.pid, flush=True)\ntime.sleep(60)"
    start = time.monotonic()
    passed, steps, _ = steps_run(tmp_path, [step("hangs", code, limit=4), step("next", "print('on')")])
    assert time.monotonic() - start < 4 + GRACE + 15
    assert not passed
    assert (steps["hangs"]["state"], steps["hangs"]["why"]) == ("cut", "its 4 s were over")
    assert [row["i"] for row in steps["hangs"]["rows"]] == [0, 1, 2]
    assert steps["next"]["state"] == "passed"
    child = int(steps["hangs"]["last_lines"][-1].split()[1])
    for _ in range(50):  # the system may take a moment
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("what a step started outlives it")


def test_the_box_ends_a_step_early_and_the_rest_is_not_run(tmp_path):
    steps = [step("long", ROWS + "import time; time.sleep(60)"), step("late", "print('never')")]
    passed, steps, log = steps_run(tmp_path, steps, seconds=LEAST + 1)
    assert not passed
    assert steps["long"]["state"] == "cut"
    assert len(steps["long"]["rows"]) == 3
    assert steps["late"] == {"state": "not run", "limit": 60, "why": f"0 s were left of {LEAST + 1}", "rows": []}
    assert "never" not in log


def test_what_fails_says_so_and_the_others_run(tmp_path):
    wrong = "from benchmarks.gpu_steps import emit\nemit({'ok': True})\nemit({'ok': False})"
    broken = "print('ROW {\"half')\nraise SystemExit('no device')"
    passed, steps, _ = steps_run(tmp_path, [step("broken", broken), step("wrong", wrong, checks=True), step("fine", "pass")])
    assert not passed
    assert (steps["broken"]["state"], steps["broken"]["exit"], steps["broken"]["why"]) == ("failed", 1, "exit code 1")
    assert steps["broken"]["last_lines"] == ["no device"]
    assert (steps["wrong"]["state"], steps["wrong"]["exit"], steps["wrong"]["why"]) == ("failed", 0, "1 wrong results")
    assert steps["fine"]["state"] == "passed"


def test_a_program_that_dies_leaves_a_file_that_says_where(tmp_path):
    path = tmp_path / "gpu.json"
    code = (
        "import json, os, pathlib, sys\nfrom benchmarks.gpu_steps import Result, Step, run\n"
        f"inner = {ROWS + 'import os, signal; os.kill(os.getppid(), signal.SIGKILL)'!r}\n"
        "steps = [Step('kills', [sys.executable, '-c', inner], 20), Step('next', ['true'], 20)]\n"
        f"result = Result(pathlib.Path({str(path)!r}), {FACTS!r}, steps)\n"
        f"run(steps, 60, dict(os.environ), result, pathlib.Path({str(tmp_path / 'log')!r}))\n"
    )
    os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": os.getcwd()})
    content = json.loads(path.read_text())
    assert not content["finished"]
    assert content["steps"]["kills"]["state"] == "cut"
    assert content["steps"]["kills"]["why"] == "this program ended in the middle of the step"
    assert content["steps"]["next"]["state"] == "not run"


def test_faults_of_a_result_file_are_sentences():
    good = {**FACTS, "finished": True, "steps": {"a": {"state": "passed", "limit": 5, "seconds": 1.0, "rows": [{}], "exit": 0}}}
    assert faults(good) == []
    assert faults([]) == ["expected an object with steps"]
    for change, sentence in (
        ({"state": "maybe"}, "a: state 'maybe' is none of passed, failed, cut, not run"),
        ({"rows": [3]}, "a: expected a list of rows"),
        ({"state": "cut"}, "a: cut without a reason"),
        ({"seconds": None}, "a: passed without its seconds"),
        ({"seconds": 40.0}, "a: took 40.0 s of 5"),
        ({"state": "not run", "why": "x", "seconds": None}, "a: not run, with rows"),
    ):
        assert faults({**good, "steps": {"a": {**good["steps"]["a"], **change}}}) == [sentence]
    del good["gpu"]
    assert faults(good) == ["gpu: missing"]


def test_the_order_is_that_of_worth_and_a_dry_run_has_the_same():
    names = [one.name for one in gpu.device_steps("python", 90)]
    assert names == [
        "cache", "build", "smoke", "headline linear", "headline clustering", "headline passes", "headline fp8",
        "headline gradients", "headline encoder", "tests", "peers, linear", "peers, clustering", "all shapes, gradients",
        "sanitizer", "slow tests",
    ]  # fmt: skip
    assert [one.name for one in gpu.dry_steps("python")] == names
    limits = {one.name: one.limit for one in gpu.device_steps("python", 90)}
    assert limits["smoke"] <= 60
    assert set(gpu.HEADLINES) == set(gpu_headline.PARTS)
    # Were everything up to the headline figures to take all its time, the most wanted of them would still begin in the box.
    assert sum(limits[name] for name in names[: names.index("headline linear")]) + limits["headline linear"] < gpu.SECONDS
    for one in gpu.dry_steps("python"):
        assert "setup.py" not in one.command
        assert "--dry-run" in one.command or one.name in ("cache", "build", "tests", "slow tests")
        # Said for each, since the one who runs it, such as these tests, may have set it.
        assert one.environment["TRITON_INTERPRET"] == ("0" if one.name == "cache" else "1")


def test_a_dry_run_lists_the_tests_that_a_device_would_run(tmp_path):
    """Those with the fixture `device`, which no mark of their own names, and those with the mark."""
    file = tmp_path / "test_four.py"
    file.write_text(
        "import pytest\ndef test_plain(): pass\ndef test_kernel(device): pass\n"
        "@pytest.mark.gpu\ndef test_marked(): pass\n@pytest.mark.slow\ndef test_long(device): pass\n"
    )
    tests = Path(__file__).parents[1]
    found = {}
    for one in gpu.dry_steps(sys.executable):
        if one.name in ("tests", "slow tests"):
            command = [str(file) if part == "tests" else part for part in one.command]
            environment = {**os.environ, **one.environment, "PYTHONPATH": f"{tests}:{tests.parent}"}
            command += ["-p", "conftest", "-c", str(tests.parent / "pyproject.toml")]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            found[one.name] = re.findall(r"<Function (\w+)>", done.stdout)
    assert found == {"tests": ["test_kernel", "test_marked"], "slow tests": ["test_long"]}


def test_goals_are_met_missed_or_not_measured():
    linear = [
        {"OUT": 8192, "M": 1, "name": f"kmq {bits} bits", "times_as_fast_as_cublas": ratio}
        for bits, ratio in ((4, 2.2), (3, 2.0), (2, 2.6))
    ]
    passes = [{"what": "assign", "percent_of_copy_bandwidth": share} for share in (95.0, 70.0, 99.0)]
    steps = {"headline linear": {"rows": linear}, "headline passes": {"rows": passes}}
    judged = {one["goal"]: one for one in gpu.judged({"dry_run": False, "steps": steps})}
    assert len(judged) == len(gpu.GOALS)
    verdicts = {bits: judged[f"{bits} bits, 8192x8192, M=1, times cuBLAS"]["verdict"] for bits in (4, 3, 2, 8)}
    assert verdicts == {4: "met", 3: "missed", 2: "met", 8: "not measured"}
    assign = judged["assign, per cent of the bandwidth of a copy"]
    assert (assign["verdict"], assign["figure"], assign["of"]) == ("missed", 70.0, 3)
    # A CPU's time is no figure of a device.
    assert {one["verdict"] for one in gpu.judged({"dry_run": True, "steps": steps})} == {"not measured"}


@pytest.mark.slow
def test_a_dry_run_of_all_steps(tmp_path):
    path = tmp_path / "dry.json"
    assert (
        os.spawnv(
            os.P_WAIT, sys.executable, [sys.executable, "benchmarks/gpu.py", "--dry-run", "--seconds", "36000", "-o", str(path)]
        )
        == 0
    )
    content = json.loads(path.read_text())
    assert faults(content) == []
    assert {one["state"] for one in content["steps"].values()} == {"passed"}
    assert content["gpu"] is None
