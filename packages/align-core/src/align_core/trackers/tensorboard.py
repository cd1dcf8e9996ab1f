"""TensorBoard event files in OUT/tensorboard, written without TensorFlow or torch; each step is on disk when logged."""

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from align_core.trackers import RunInfo, TakesTexts, Tracker


class TensorBoard:
    """One event file a process; a continued run hides what the one before logged beyond its last checkpoint."""

    def __init__(self, info: RunInfo) -> None:
        directory = info.out / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / f"events.out.tfevents.{time.time_ns()}.{info.id}"
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=info.first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))

    def text(self, step: int, name: str, markdown: str) -> None:
        """See `TakesTexts`; the text plugin renders Markdown."""
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        string = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            string_val=[markdown.encode()],
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]),
        )
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        value = summary_pb2.Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=string)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=[value])))

    def close(self) -> None:
        """Nothing is buffered."""

    def _write(self, event: Any) -> None:
        with self._file.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())


_conforms: type[Tracker] = TensorBoard
_takes_texts: type[TakesTexts] = TensorBoard
