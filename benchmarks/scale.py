"""Run a study under the eyes of /proc: time of each commit, CPU, peak memory, disk. Arguments are those of fedlth run.

python benchmarks/scale.py configs/bench/ten_thousand.yaml out=/somewhere clients.count=1000 ...
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from yardsticks.tree import cpu_seconds, memory_mb

ROOT = Path(__file__).parents[1]


def main() -> None:
    out = Path(next(a.partition("=")[2] for a in sys.argv if a.startswith("out=")))
    verb = ["resume", str(out)] if (out / "config.yaml").exists() else ["run", *sys.argv[1:]]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fedlth", *verb], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = {"Pss": 0.0, "Rss": 0.0}
    cpu, disk = 0.0, 0

    def watch() -> None:
        nonlocal cpu, disk
        while process.poll() is None:
            try:
                cpu = max(cpu, cpu_seconds(process.pid))
                for name, size in memory_mb(process.pid).items():
                    peak[name] = max(peak[name], size)
                disk = max(disk, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))
            except (FileNotFoundError, ProcessLookupError):
                pass  # a worker or a file that ended while it was looked at
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    seconds: dict[str, list[float]] = {}
    for line in (out / "times.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["client"] is None:
            seconds.setdefault(row["phase"], []).append(row["seconds"])
    for phase, all_s in seconds.items():
        listed = ", ".join(f"{s:.1f}" for s in all_s[:8])
        print(f"{phase}: {len(all_s)} commits, median {statistics.median(all_s):.1f} s, first {listed}")
    print(f"exit {code}; {time.perf_counter() - began:.0f} s, {cpu:.0f} CPU s; peak memory of the tree PSS "
          f"{peak['Pss']:.0f} MB, RSS {peak['Rss']:.0f} MB; peak disk {disk / 1e9:.2f} GB; "
          f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")  # fmt: skip


if __name__ == "__main__":
    main()
