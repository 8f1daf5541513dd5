"""A run as TensorBoard events in RUN/tensorboard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedlth.errors import require

NAME = "events.out.tfevents.fedlth"  # the usual name ends in the machine's, which is nobody's business


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard events in the run's folder; an open or resumed run writes them anew from its rows."""

    def require(self) -> None:
        require("trackers: tensorboard", "tensorboard", extra="tensorboard")

    def open(self, run: Path, name: str, config: Mapping[str, Any], id: str, /) -> Events:
        import yaml

        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.*"):
            old.unlink()
        events = Events((folder / NAME).open("wb"))
        events.write(0, file_version="brain.Event:2")
        events.text(0, "config", f"```\n{yaml.safe_dump(dict(config))}```")
        return events


class Events:
    """An open file of events."""

    id, given = "", 0

    def __init__(self, file: IO[bytes]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.file, self.records = file, RecordWriter(file)
        self.last = 0

    def log(self, commit: int, scalars: Mapping[str, float], /) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.write(commit, summary=Summary(value=values))
        self.file.flush()
        self.last = commit

    def text(self, commit: int, name: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        self.write(commit, summary=Summary(value=[Summary.Value(tag=name, metadata=plugin, tensor=tensor)]))

    def write(self, commit: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), step=commit, **what).SerializeToString())

    def end(self, scalars: Mapping[str, float], texts: Mapping[str, str], /) -> None:
        self.log(self.last, scalars)
        for name, text in texts.items():
            self.text(self.last, name, text)
        self.file.close()

    def stop(self) -> None:
        self.file.close()
