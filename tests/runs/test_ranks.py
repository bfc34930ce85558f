"""Which process is the main one, whoever has started it."""

import json
import os
import threading
from contextlib import nullcontext

import pytest
from omegaconf import OmegaConf

from depthany.callbacks.record import read_record
from depthany.config.check import ConfigError
from depthany.runs import ranks
from depthany.runs.ranks import claimed, join

# What srun tells its tasks, instead of what torchrun does.
SRUN = """
import os
told = {"NTASKS": "WORLD_SIZE", "NTASKS_PER_NODE": "LOCAL_WORLD_SIZE", "PROCID": "RANK", "LOCALID": "LOCAL_RANK"}
told |= {"NODEID": "GROUP_RANK"}
slurm = {f"SLURM_{name}": os.environ.pop(variable) for name, variable in told.items()}
os.environ |= slurm | {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
del os.environ["TORCHELASTIC_RUN_ID"], os.environ["MASTER_ADDR"]
"""


def joined(monkeypatch: pytest.MonkeyPatch, *, devices: object = 1, num_nodes: int = 1, **told: str) -> bool:
    for name in list(os.environ):
        if name.startswith(("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM")):
            monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return join(OmegaConf.create({"devices": devices, "num_nodes": num_nodes}))


def test_alone_and_under_lightnings_own_launcher(monkeypatch):
    assert joined(monkeypatch) and joined(monkeypatch, devices="auto")
    assert joined(monkeypatch, devices=2)
    assert not joined(monkeypatch, devices=2, LOCAL_RANK="1")


@pytest.mark.parametrize("devices", ["auto", 1, "1"])
def test_torchrun_with_one_process(devices, monkeypatch):
    assert joined(monkeypatch, devices=devices, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")


def test_several_machines_need_a_launcher(monkeypatch):
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: start it with torchrun or srun on every machine"):
        joined(monkeypatch, devices=4, num_nodes=2)


@pytest.mark.parametrize(
    "told", [{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, {"RANK": "7", "WORLD_SIZE": "8"}]
)
def test_as_many_processes_as_the_options_say(told, monkeypatch):
    with pytest.raises(ConfigError, match=r"trainer\.devices=2 .* but 8 processes were started"):
        joined(monkeypatch, devices=2, num_nodes=2, **told)


def test_srun_without_tasks_per_node_is_told_in_words(monkeypatch):
    told = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}
    with pytest.raises(ConfigError, match="ntasks-per-node"):
        joined(monkeypatch, devices=2, **told)


@pytest.mark.parametrize("alive", [True, False])
def test_a_folder_of_another_machine_is_taken_when_that_gives_no_sign_of_life(alive, tmp_path, monkeypatch, capsys):
    """A scheduler starts a run again on another machine at once: it waits, and is not sent away."""
    monkeypatch.setattr(ranks, "STALE_S", 1.0)
    note = {"host": "node7", "pid": 12, "space": "elsewhere", "born": "1", "nonce": "theirs"}
    claim = tmp_path / ".run.claim"
    claim.write_text(json.dumps(note))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            claim.touch()

    owner = threading.Thread(target=beat)
    if alive:
        owner.start()
    try:
        refused = pytest.raises(ConfigError, match="process 12 on node7")
        with refused if alive else nullcontext(), claimed(tmp_path / "run", main=True) as mine:
            assert mine is not None and mine.still_mine()
    finally:
        ended.set()
        if alive:
            owner.join()
    assert "is claimed by process 12 on node7: waiting" in capsys.readouterr().out
    assert claim.exists() == alive


def test_a_folder_that_cannot_be_written_is_told_in_words(tmp_path):
    (tmp_path / "file").touch()
    told = pytest.raises(ConfigError, match=r"file cannot be written .*: name another as paths\.runs")
    with told, claimed(tmp_path / "file" / "run", main=True):
        pass


@pytest.mark.slow
def test_srun_starts_a_run(zygote, tmp_path):
    """Two tasks: the second waits until the first has packed, and neither takes itself for the only one."""
    command = ["depthany.train", "stage=teacher", "debug=smoke", "trainer.devices=2", "trainer.strategy=ddp"]
    output = zygote.run([*command, f"paths.runs={tmp_path}", "data.limit=8"], cwd=tmp_path, world=2, before=SRUN)
    assert output.count("run folder:") == 1 and "2 process(es)" in output
    (run,) = tmp_path.glob("teacher-*")
    assert read_record(run)["facts"]["optimizer steps"] == "2"
