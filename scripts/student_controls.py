"""What does a student owe to its pseudo-labels? The student beside its controls, over several seeds.

python scripts/student_controls.py --runs runs/controls --seeds 0 1 2 --jobs 2

Every arm takes the same number of optimizer steps from scratch:

  teacher            labelled style a, flips only; so it is also the control "as many steps on labelled data alone"
  student            style b with the teacher's pseudo-labels, as `stage=student` does: flips only
  labelled, strong   style a with V1's strong perturbation: does the perturbation alone do as well?
  truth              style b with its true labels: the ceiling
  student, strong    the student with V1's strong perturbation

Finished runs are kept, so a stopped call goes on. Prints AbsRel on unseen scenes of both styles.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARMS = {
    "teacher": ["stage=teacher"],
    "student": ["stage=student", "task.teacher_ckpt={teacher}"],
    "labelled, strong": ["stage=teacher", "augment=strong_all"],
    "truth": ["stage=teacher", "data=embedded_truth", "mix.epochs=1"],
    "student, strong": ["stage=student", "augment=strong", "task.teacher_ckpt={teacher}"],
}


def run_arm(runs: Path, arm: str, seed: int, teacher: Path | None, extra: list[str]) -> Path:
    """Runs an arm if it is not finished; its folder."""
    other = 100 if arm.startswith(("labelled", "truth")) else 0  # not the teacher's own initial weights
    arguments = [a.format(teacher=teacher) for a in ARMS[arm]] + [f"seed={seed + other}", f"paths.runs={runs}", *extra]
    log = runs / f"{arm.replace(', ', '-')}-{seed}.log"
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.call(
            [sys.executable, "-m", "depthany.train", *arguments], stdout=out, stderr=subprocess.STDOUT
        )
    found = re.search(r"^run folder: (.+)$|^(.+) was finished on", log.read_text(encoding="utf-8"), re.MULTILINE)
    if code or not found:
        raise SystemExit(f"{arm}, seed {seed} failed: see {log}")
    print(f"done: {arm}, seed {seed}", flush=True)
    return Path(found[1] or found[2])


def abs_rel(folder: Path) -> dict[str, float]:
    """AbsRel of a run's own model, the last of its table, by source."""
    rows = json.loads((folder / "record.json").read_text(encoding="utf-8"))["table"]
    return {row["source"]: row["abs_rel"] for row in rows if row["model"] == rows[-1]["model"]}


def main() -> None:
    """Runs the arms, two at a time if asked, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/controls"), help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores")
    parser.add_argument("options", nargs="*", help="further options of depthany.train for every arm, a=b")
    flags = parser.parse_args()
    flags.runs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // flags.jobs, 1))
    folders: dict[tuple[str, int], Path] = {}
    with ThreadPoolExecutor(flags.jobs) as pool:
        for arms in (["teacher"], [arm for arm in ARMS if arm != "teacher"]):  # students need their teachers
            jobs = {
                (arm, s): pool.submit(run_arm, flags.runs, arm, s, folders.get(("teacher", s)), flags.options)
                for arm in arms
                for s in flags.seeds
            }
            folders |= {key: job.result() for key, job in jobs.items()}
    scores = {key: abs_rel(folder) for key, folder in folders.items()}
    for source in ("val_b", "val_a"):
        print(f"\nAbsRel on {source}; change of the mean against the teacher")
        base = statistics.mean(scores["teacher", s][source] for s in flags.seeds)
        for arm in ARMS:
            values = [scores[arm, s][source] for s in flags.seeds]
            cells = "  ".join(f"{v:.4f}" for v in values)
            print(
                f"  {arm:<18} {cells}   mean {statistics.mean(values):.4f}  {statistics.mean(values) / base - 1:+.1%}"
            )


if __name__ == "__main__":
    main()
