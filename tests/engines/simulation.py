"""One Flower simulation for many studies, in place of `flwr.simulation.run_simulation`: Ray starts once."""

from __future__ import annotations

import threading
from queue import Queue
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

NODES = 6  # a study may have fewer clients


class Client:
    """The ClientApp of the study that runs now; it is pickled to the workers with every message."""

    app: ClientApp | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        assert self.app is not None
        return self.app(message, context)


class Simulation:
    """Flower's own simulation: the first call starts it, and each call's ServerApp runs in it, one after another."""

    def __init__(self) -> None:
        self.client, self.thread = Client(), threading.Thread()
        self.apps, self.ended = Queue[ServerApp | None](), Queue[BaseException | None]()

    def __call__(self, *, server_app: ServerApp, client_app: ClientApp, num_supernodes: int, **backend: Any) -> None:
        assert num_supernodes <= NODES
        self.client.app = client_app
        self.apps.put(server_app)
        if self.thread.ident is None:
            self.thread = threading.Thread(target=self._run, kwargs=backend)
            self.thread.start()
        error = self.ended.get()
        if error is not None:
            raise error

    def close(self) -> None:
        self.apps.put(None)
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self, **backend: Any) -> None:
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            while (study := self.apps.get()) is not None:
                study(grid, context)
                self.ended.put(None)

        try:
            run_simulation(app, self.client, NODES, **backend)  # type: ignore[arg-type]
        except BaseException as error:
            self.ended.put(error)
