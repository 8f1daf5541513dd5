"""fedlth's own two Flower apps, with a meter on the grid; ends with an error where meter and ledger differ."""

from __future__ import annotations

import json
from pathlib import Path

from fedlth.engines.flower import make_client_app, make_server_app

from flwr.app import Context  # isort: skip
from flwr.serverapp import Grid, ServerApp

from meter.grid import Meter

client_app = make_client_app()
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    meter = Meter(grid)
    make_server_app(Path("/"))(meter, context)  # type: ignore[arg-type]
    rows = (Path(str(context.run_config["out"])) / "ledger.jsonl").read_bytes().splitlines()
    lines, equal = meter.compare([json.loads(row) for row in rows])
    for line in lines:
        print(f"meter: {line}", flush=True)
    if not equal:
        raise RuntimeError("the ledger differs from what crossed")
