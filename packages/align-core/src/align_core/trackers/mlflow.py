"""MLflow. Needs `mlflow`; its server is MLFLOW_TRACKING_URI, without which it writes files in the working directory."""

from collections.abc import Iterator, Mapping

import mlflow

from align_core.trackers import RunInfo, Tracker

_TAG = "align.id"
_LONGEST_VALUE = 500  # MLflow refuses longer parameter values


class Mlflow:
    """A run of the experiment `align`; a continued run is found by its tag."""

    def __init__(self, info: RunInfo) -> None:
        mlflow.set_experiment("align")
        found = mlflow.search_runs(
            experiment_names=["align"], filter_string=f"tags.`{_TAG}` = '{info.id}'", output_format="list"
        )
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
            return
        mlflow.start_run(run_name=info.name, tags={_TAG: info.id})
        mlflow.log_params({name: str(value)[:_LONGEST_VALUE] for name, value in _flat(info.settings)})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        mlflow.end_run()


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_conforms: type[Tracker] = Mlflow
