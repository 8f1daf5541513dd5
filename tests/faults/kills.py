"""Kill a study at random, resume, compare: `python -m tests.faults.kills STUDY.yaml KILLS OUT [key=value ...]`.

The engine is whatever the study or an override names, so the same command tests every engine. Exit code 0: every
killed and resumed run ended in the same bits as the run that was never killed.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from fedlth.report.diff import diff

FEDLTH = [sys.executable, "-m", "fedlth"]


def main(study: str, kills: int, out: Path, overrides: list[str]) -> int:
    began = time.monotonic()
    subprocess.run([*FEDLTH, "run", study, f"out={out / 'reference'}", *overrides], check=True, capture_output=True)
    whole_s = time.monotonic() - began
    print(f"reference: {whole_s:.1f} s", flush=True)
    draw, done, number, bad = random.Random(0), 0, 0, 0
    while done < kills:
        run = out / f"killed-{number}"
        number += 1
        wait_s = whole_s
        while True:
            begun = (run / "config.yaml").exists()
            command = ["resume", str(run)] if begun else ["run", study, f"out={run}", *overrides]
            process = subprocess.Popen([*FEDLTH, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            try:
                # After the last kill the run may end; before it, a kill comes somewhere in the run's usual time.
                process.wait(timeout=draw.uniform(0, wait_s) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                print(f"kill {done} of {kills}: {run.name}", flush=True)
        text = process.communicate()[0].decode()
        if process.returncode:
            print(text)
            return 1
        found = diff(out / "reference", run)
        bad += bool(found)
        print(f"{run.name}: {'equal' if not found else found[:3]}", flush=True)
    print(f"{done} kills, {number} runs, {bad} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
