"""Runs a script as several processes, started for torch.distributed or by mpiexec, and tells how each rank ended."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
LIMIT = 60.0  # seconds until the processes are killed
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
BY_RANK = """
rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}
"$@" > "$FOLDER/$rank.out" 2> "$FOLDER/$rank.err"
code=$?
echo $code > "$FOLDER/$rank.code"
exit $code
"""

needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason='mpi4py or mpiexec is not installed: pip install "gradstep[mpi]"',
)


class Ended(NamedTuple):
    """How a process has ended: the code is its own, or that of its signal, or None where MPI's launcher killed it."""

    code: int | None
    out: str
    err: str


def run_torch(size: int, script: str | Path, *arguments: str, limit: float = LIMIT) -> list[Ended]:
    """The ranks of `size` processes of Python, in which `init_process_group("gloo")` finds the others."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            with (Path(folder) / f"{rank}.out").open("w") as out, (Path(folder) / f"{rank}.err").open("w") as err:
                variables = {**environment(), **meeting, "RANK": str(rank)}
                command = _python(script, arguments)
                processes.append(
                    subprocess.Popen(command, env=variables, stdout=out, stderr=err, start_new_session=True)
                )
        in_time = _end(processes, limit)
        ranks = _ranks(Path(folder), [process.returncode for process in processes])
    assert in_time, f"not ended after {limit:g} s: {ranks}"
    return ranks


def run_mpi(size: int, script: str | Path, *arguments: str, limit: float = LIMIT) -> list[Ended]:
    """The ranks of `size` processes of Python, started by mpiexec."""
    assert MPIEXEC is not None
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "mpiexec").open("w+") as output:
            process = subprocess.Popen(
                [MPIEXEC, "-n", str(size), "sh", "-c", BY_RANK, "sh", *_python(script, arguments)],
                env={**environment(), "FOLDER": folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            in_time = _end([process], limit)
            output.seek(0)
            launcher = output.read()
        codes = [Path(folder) / f"{rank}.code" for rank in range(size)]
        ranks = _ranks(Path(folder), [int(code.read_text()) if code.exists() else None for code in codes])
    assert in_time, f"not ended after {limit:g} s: {launcher} {ranks}"
    return ranks


def _python(script: str | Path, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-W", "error", *([str(script)] if isinstance(script, Path) else ["-c", script]), *arguments]


def environment() -> dict[str, str]:
    """Scripts import what tests do. Open MPI asks whether root and more ranks than cores are meant."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        ),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _end(processes: Sequence[subprocess.Popen[bytes]], limit: float) -> bool:
    """Wait for the processes until the limit, then kill what is left. Whether all ended by themselves."""
    until = time.monotonic() + limit
    try:
        for process in processes:
            process.wait(max(until - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return False
    finally:
        for process in processes:
            process.terminate()  # a launcher takes its ranks with it
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


def _ranks(folder: Path, codes: Sequence[int | None]) -> list[Ended]:
    return [
        Ended(code, (folder / f"{rank}.out").read_text(), (folder / f"{rank}.err").read_text())
        for rank, code in enumerate(codes)
    ]
