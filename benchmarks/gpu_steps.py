"""Steps under a time box: each is a process with a limit of its own, whose log streams to a file and whose figures are kept as it
prints them, so that a step that is cut loses nothing that it had measured.

A step prints a figure as a line `ROW {...}`, see `emit`; every other line is for people.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent
ROW = "ROW "
LEAST = 5  # seconds that must be left for a step to begin
GRACE = 2  # seconds between being asked to end and being ended
STATES = ("passed", "failed", "cut", "not run")


def emit(row: dict[str, Any]) -> dict[str, Any]:
    """Prints a row for the result file, at once, and returns it."""
    print(ROW + json.dumps(row), flush=True)
    return row


@dataclass(frozen=True)
class Step:
    """command: arguments of a process. limit: seconds it may take. environment: beside that of all.

    checks: its rows have "ok", and one that is false fails the step, whatever the exit code. No step waits for another to pass:
    each checks what it times, and the minutes are too few to lose a figure to a fault elsewhere.
    """

    name: str
    command: list[str]
    limit: float
    checks: bool = False
    environment: dict[str, str] = field(default_factory=dict)


class Result:
    """The result file: written whole, under a name of its own first, after every change."""

    def __init__(self, path: Path, facts: dict[str, Any], steps: list[Step]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            **facts,
            "finished": False,
            "steps": {step.name: {"state": "not run", "limit": step.limit, "why": "not reached", "rows": []} for step in steps},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def __getitem__(self, step: str) -> dict[str, Any]:
        return self.content["steps"][step]

    def write(self) -> None:
        fresh = self.path.with_name(self.path.name + ".part")
        with fresh.open("w") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


def _lines(process: subprocess.Popen[str], until: float) -> Iterator[str | None]:
    """Lines of a process as they come; None when the time is up."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(min(until - time.monotonic(), 1.0), 0.001))
        except queue.Empty:
            if process.poll() is not None:  # something that it started holds its output open
                return
            if time.monotonic() >= until:
                yield None
                return
            continue
        if line is None:
            return
        yield line


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started: they are a process group."""
    for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            if number == signal.SIGKILL:
                return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_step(step: Step, seconds: float, environment: dict[str, str], result: Result, log: TextIO) -> str:
    """Runs one step for at most `seconds`, keeps its rows in `result`, and returns its state."""
    fact, start = result[step.name], time.monotonic()
    fact.update(state="cut", why="this program ended in the middle of the step", command=step.command)
    result.write()
    log.write(f"== {step.name}: {' '.join(step.command)}\n")
    print(f"== {step.name} (at most {seconds:.0f} s)", flush=True)
    environment = {**environment, "PYTHONUNBUFFERED": "1", **step.environment}
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    last: list[str] = []
    cut = False
    for line in _lines(process, start + seconds):
        if line is None:
            cut = True
            break
        log.write(f"{time.monotonic() - start:7.1f} {line}")
        log.flush()
        if line.startswith(ROW):
            with contextlib.suppress(json.JSONDecodeError):  # of a process that died while it wrote
                fact["rows"].append(json.loads(line[len(ROW) :]))
                fact["seconds"] = round(time.monotonic() - start, 1)
                result.write()
        else:
            print(f"   {line}", end="", flush=True)
            last = [*last[-4:], line.rstrip()]
    if cut:
        _end(process)
        fact.update(state="cut", why=f"its {seconds:.0f} s were over")
    else:
        process.wait()
        wrong = [row for row in fact["rows"] if step.checks and not row["ok"]]
        passed = process.returncode == 0 and not wrong
        fact.update(state="passed" if passed else "failed", exit=process.returncode)
        fact.pop("why")
        if not passed:
            fact["why"] = f"{len(wrong)} wrong results" if wrong else f"exit code {process.returncode}"
    fact.update(seconds=round(time.monotonic() - start, 1), last_lines=last)
    result.write()
    log.write(f"== {step.name}: {fact['state']} after {fact['seconds']} s\n")
    log.flush()
    print(f"== {step.name}: {fact['state']} after {fact['seconds']} s, {len(fact['rows'])} rows", flush=True)
    return fact["state"]


def run(steps: list[Step], seconds: float, environment: dict[str, str], result: Result, log_path: Path) -> bool:
    """Runs the steps in their order within `seconds` in all; True where each of them passed."""
    end = time.monotonic() + seconds
    with log_path.open("w") as log:
        for step in steps:
            fact, left = result[step.name], end - time.monotonic()
            if left < LEAST:
                fact["why"] = f"{max(left, 0):.0f} s were left of {seconds:.0f}"
            else:
                run_step(step, min(step.limit, left), environment, result, log)
            result.write()
    result.content["finished"] = True
    result.write()
    return all(result[step.name]["state"] == "passed" for step in steps)


def faults(content: Any) -> list[str]:
    """What is wrong with the content of a result file, a sentence each; empty where it is as `Result` writes it."""
    if not isinstance(content, dict) or not isinstance(content.get("steps"), dict):
        return ["expected an object with steps"]
    found = [f"{name}: missing" for name in ("gpu", "dry_run", "torch", "triton", "seconds", "finished") if name not in content]
    for name, step in content["steps"].items():
        state = step.get("state")
        if state not in STATES:
            found.append(f"{name}: state {state!r} is none of {', '.join(STATES)}")
        if not isinstance(step.get("rows"), list) or not all(isinstance(row, dict) for row in step["rows"]):
            found.append(f"{name}: expected a list of rows")
        if state in ("cut", "failed", "not run") and not step.get("why"):
            found.append(f"{name}: {state} without a reason")
        if state in ("passed", "failed", "cut") and not isinstance(step.get("seconds"), (int, float)):
            found.append(f"{name}: {state} without its seconds")
        if state == "not run" and step.get("rows"):
            found.append(f"{name}: not run, with rows")
        if isinstance(step.get("seconds"), (int, float)) and step["seconds"] > step["limit"] + GRACE + 10:
            found.append(f"{name}: took {step['seconds']} s of {step['limit']}")
    return found
