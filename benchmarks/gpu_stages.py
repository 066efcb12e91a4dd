# SPDX-License-Identifier: Apache-2.0
"""Runs commands one after the other within a budget of time; keeps what they leave.

A stage has a limit of its own, a log and an exit status. One that hangs is ended, with
all that it has started; one that fails ends nothing but itself and the stages that need
it. After every stage there are `stages.json`, `summary.md` and an archive of all files,
so that what was there until then is kept, whatever is stopped, this process too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Of the budget, for the last archive.
RESERVE = 6.0
LEAST_SECONDS = 3.0
PATIENCE = 3.0  # for a stage that is asked to end
ARCHIVE_BYTES = 16_000_000


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, and how long it may take.

    Attributes:
        name: of the stage, its log, and its line in the summary.
        command: and the arguments.
        seconds: the limit.
        folder: where it runs.
        env: variables that are added to the environment.
        needs: names of stages without which it makes no sense.
        lacks: why it cannot run here, or nothing.
    """

    name: str
    command: Sequence[str]
    seconds: float
    folder: pathlib.Path
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Sequence[str] = ()
    lacks: str = ""


def run_stages(
    stages: Sequence[Stage],
    folder: pathlib.Path,
    seconds: float,
    archive: pathlib.Path,
    most_bytes: int = ARCHIVE_BYTES,
) -> list[dict[str, Any]]:
    """Runs all stages that fit into so many seconds; what became of each of them."""
    end = time.monotonic() + seconds - RESERVE
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    for stage in stages:
        left = end - time.monotonic()
        missing = [
            name
            for name in stage.needs
            if not any(o["stage"] == name and o["status"] == "ok" for o in outcomes)
        ]
        limit = min(stage.seconds, left)
        reason = stage.lacks
        if not reason and missing:
            reason = f"it needs {', '.join(missing)}"
        if not reason and left < LEAST_SECONDS:
            reason = "no time is left"
        if reason:
            outcome = {"stage": stage.name, "status": f"left out: {reason}"}
        else:
            print(f"--- {stage.name}, at most {limit:.0f} s", flush=True)
            try:
                outcome = run_stage(stage, folder, limit)
            except BaseException:  # somebody ends this process
                outcomes.append({"stage": stage.name, "status": "ended with the run"})
                keep(outcomes, folder, archive, most_bytes)
                raise
        outcomes.append(outcome)
        print(f"    {stage.name}: {outcome['status']}", flush=True)
        keep(outcomes, folder, archive, most_bytes)
    return outcomes


def run_stage(stage: Stage, folder: pathlib.Path, limit: float) -> dict[str, Any]:
    """Runs one stage; its output goes to a log in `folder`."""
    log = folder / f"{stage.name}.log"
    start = time.monotonic()
    outcome: dict[str, Any] = {
        "stage": stage.name,
        "command": [str(word) for word in stage.command],
        "limit": round(limit, 1),
    }
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                outcome["command"],
                cwd=stage.folder,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group, to be ended as one
            )
        except OSError as error:
            return outcome | {"status": f"failed: {error}", "seconds": 0.0}
        try:
            process.wait(limit)
            code = process.returncode
            outcome["exit_status"] = code
            status = "ok" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    return outcome | {"status": status, "seconds": round(time.monotonic() - start, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its group: what still runs would disturb the next stage."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)


def keep(
    outcomes: Sequence[Mapping[str, Any]],
    folder: pathlib.Path,
    archive: pathlib.Path,
    most_bytes: int,
) -> list[str]:
    """Writes stages.json, summary.md and the archive; what the archive leaves out."""
    (folder / "stages.json").write_text(json.dumps(list(outcomes), indent=1) + "\n")
    (folder / "summary.md").write_text(summary(outcomes) + "\n")
    try:
        return pack(folder, archive, most_bytes)
    except OSError as error:  # a full disk: the next stage is worth more
        print(f"    no archive: {error}", flush=True)
        return []


def summary(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The stages as a table."""
    lines = ["| stage | seconds | outcome |", "|---|---:|---|"]
    for outcome in outcomes:
        seconds = outcome.get("seconds", "-")
        lines.append(f"| {outcome['stage']} | {seconds} | {outcome['status']} |")
    return "\n".join(lines)


def pack(folder: pathlib.Path, archive: pathlib.Path, most_bytes: int) -> list[str]:
    """Packs a folder, without its largest files where that would be too much.

    The names of those are in `left_out.txt`, in the archive.
    """
    archive = archive.resolve()
    sizes = {
        path: path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.resolve() != archive and path.suffix != ".draft"
    }
    left_out = []
    archive.parent.mkdir(parents=True, exist_ok=True)
    draft = archive.with_name(archive.name + ".draft")
    # Nothing shrinks so much that trying were worth the time.
    for path in [path for path, size in sizes.items() if size > 20 * most_bytes]:
        left_out.append(str(path.relative_to(folder)))
        del sizes[path]
    while True:
        with tarfile.open(draft, "w:gz", compresslevel=6) as tar:
            for path in sizes:
                tar.add(path, arcname=str(path.relative_to(folder)))
            if left_out:
                text = "\n".join(left_out).encode() + b"\n"
                entry = tarfile.TarInfo("left_out.txt")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))
        if draft.stat().st_size <= most_bytes or not sizes:
            break
        largest = max(sizes, key=sizes.__getitem__)
        left_out.append(str(largest.relative_to(folder)))
        del sizes[largest]
    draft.replace(archive)
    return left_out


def last_lines(path: pathlib.Path, number: int, width: int = 200) -> list[str]:
    """Of a log, as far as there is one."""
    if not path.exists():
        return []
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 100_000))
        text = log.read().decode(errors="replace")
    return [line[:width] for line in text.splitlines()[-number:]]
