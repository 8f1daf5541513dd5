"""The two apps that `flwr run .` and SuperNodes load (pyproject.toml, [tool.flwr.app.components])."""

from __future__ import annotations

from pathlib import Path

from fedlth.engines.flower import make_client_app, make_server_app

client_app = make_client_app()
server_app = make_server_app(Path(__file__).parents[2])
