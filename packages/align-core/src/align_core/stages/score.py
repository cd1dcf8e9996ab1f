"""`align score`: a reward model's score of each response in a file."""

from align_core.config import ScoreConfig
from align_core.stages.responses import Annotation, annotate_responses
from align_core.stages.world import Model, World
from align_core.types import Batch


def run_score(config: ScoreConfig, world: World) -> None:
    """Adds `score`, the reward model's number at the last token of prompt and response."""
    annotate_responses(config, world, head="score", annotate=_scores)


def _scores(model: Model, batch: Batch) -> list[Annotation]:
    return [{"score": float(score)} for score in model.scores(batch)]
