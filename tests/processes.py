"""Real processes that start in a moment: forks of one process that has imported everything.

A plain `python -m depthany.train` spends most of a short test on imports. The zygote pays for them once in a session;
what it forks runs a verb as `python -m` would, in a process group of its own that can be killed as a whole.

    def test_x(zygote, tmp_path):
        group = zygote.start(["depthany.train", "stage=teacher", "debug=smoke"], cwd=tmp_path)
        assert group.wait(60) == [0], group.output()
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTS = "torch lightning.pytorch timm hydra cv2 depthany.runs.stage depthany.data.module depthany.tasks.student"
# Of the test's own environment, what would tell a run that it is part of something larger.
FOREIGN = ("WANDB", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_RANK", "NODE_RANK", "TORCHELASTIC", "SLURM")


class Group:
    """The processes of one start: a rank each, with their loader workers in one process group.

    Attributes:
        pids: of the ranks, in order.
        log: the file that takes stdout and stderr of all of them.
    """

    def __init__(self, zygote: "Zygote", pids: list[int], log: Path) -> None:
        self._zygote, self.pids, self.log = zygote, pids, log

    def poll(self) -> list[int | None]:
        """Exit codes as subprocess gives them (-9: killed); None: still running."""
        return self._zygote.call(op="poll", pids=self.pids)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes of all ranks; kills the group and fails where they are not there in time."""
        ends = time.monotonic() + timeout
        while None in (codes := self.poll()):
            if time.monotonic() > ends:
                self.kill()
                raise AssertionError(f"not ended in {timeout} s: {codes}\n{self.output()}")
            time.sleep(0.01)
        return [code for code in codes if code is not None]

    def kill(self, sig: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to the whole group, loader workers included, or to some ranks alone; waits after SIGKILL."""
        if ranks is not None:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], sig)
            return
        with suppress(ProcessLookupError):
            os.killpg(self.pids[0], sig)
        while sig == signal.SIGKILL and None in self.poll():
            time.sleep(0.002)

    def output(self) -> str:
        """What all ranks have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Zygote:
    """Starts groups. One for a session is enough: the fixture `zygote`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.folder = tempfile.TemporaryDirectory(prefix="zygote-")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            cwd=self.folder.name,
        )
        theirs.close()
        self._socket = ours
        self._file = ours.makefile("rw", encoding="utf-8")
        self._count = 0

    def call(self, **request: Any) -> Any:
        """One request, one answer."""
        print(json.dumps(request), file=self._file, flush=True)
        answer = self._file.readline()
        assert answer, "the zygote has died"
        return json.loads(answer)

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        world: int = 1,
        nodes: int = 1,
        env: Mapping[str, str] | None = None,
        before: str = "",
    ) -> Group:
        """Starts a module as `python -m` does, or ["-c", code, ...] as `python -c` does.

        Args:
            argv: the module's name and its arguments.
            cwd: where it runs; made where it is missing.
            world: ranks; more than 1 get the variables that torchrun sets (name trainer.devices yourself).
            nodes: machines that the ranks pretend to be on; has to divide `world`.
            env: further variables.
            before: Python that each process executes first, e.g. to choose a start method or to set a limit.
        """
        cwd.mkdir(parents=True, exist_ok=True)
        self._count += 1
        log = Path(self.folder.name) / f"{self._count:04d}.txt"
        log.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(world):
            local = world // nodes
            torchrun = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
            torchrun |= {"GROUP_RANK": rank // local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            torchrun |= {"TORCHELASTIC_RUN_ID": f"test-{self._count}"}
            ranks.append({k: str(v) for k, v in torchrun.items()} if world > 1 else {})
        request = {"argv": [str(a) for a in argv], "cwd": str(cwd), "log": str(log), "before": before}
        return Group(self, self.call(op="start", ranks=[r | dict(env or {}) for r in ranks], **request), log)

    def run(self, argv: Sequence[str], *, cwd: Path, code: int = 0, timeout: float = 120, **options: Any) -> str:
        """Starts, waits, and gives the output; every rank has to end with `code`."""
        group = self.start(argv, cwd=cwd, **options)
        codes = group.wait(timeout)
        assert set(codes) == {code}, f"exit codes {codes}\n{group.output()}"
        return group.output()

    def close(self) -> None:
        """Kills what is left; whatever a test forgot dies with the session."""
        self._file.close()
        self._socket.close()
        self.process.wait(20)
        self.folder.cleanup()


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answers requests until the test session is gone; in a fork, returns what the fork has to do."""
    file = connection.makefile("rw", encoding="utf-8")
    codes: dict[int, int] = {}  # of every process that has ended
    living: dict[int, int] = {}  # process: its group
    while line := file.readline():
        request = json.loads(line)
        if request["op"] == "start":
            pids: list[int] = []
            for environment in request["ranks"]:
                pid = os.fork()
                leader = pids[0] if pids else pid
                if not pid:
                    os.setpgid(0, leader)  # 0: leads a group of its own
                    file.detach()
                    connection.close()
                    return request | {"env": environment}
                with suppress(OSError):  # the fork was faster
                    os.setpgid(pid, leader)
                pids.append(pid)
                living[pid] = leader
            answer: Any = pids
        else:
            for pid in list(living):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    del living[pid]
            answer = [codes.get(pid) for pid in request["pids"]]
        print(json.dumps(answer), file=file, flush=True)
    for leader in set(living.values()):
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
    return None


def become(task: Mapping[str, Any]) -> None:
    """Turns this fork into `python -m module arguments`."""
    os.environ |= task["env"]
    os.chdir(task["cwd"])
    log = os.open(task["log"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    exec(task["before"], {})
    module, *arguments = task["argv"]
    if module == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def leave(code: object) -> NoReturn:
    """Ends as Python does, but for the seconds that it takes to unload every module one by one."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code & 255 if isinstance(code, int) else 1)


if __name__ == "__main__":
    for name in IMPORTS.split():
        import_module(name)
    gc.freeze()
    order = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        if order is not None:
            become(order)
    except SystemExit as end:
        leave(end.code)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(None)
