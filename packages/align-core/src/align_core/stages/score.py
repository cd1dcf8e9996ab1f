"""`align score`: a reward model's score of each response in a file."""

import numpy as np

from align_core.config import ScoreConfig
from align_core.errors import AlignError
from align_core.stages.responses import Annotation, annotate_responses
from align_core.stages.world import Model, World
from align_core.types import Batch


def run_score(config: ScoreConfig, world: World) -> None:
    """Adds `score`, the reward model's number at the last token of prompt and response.

    Raises:
        AlignError: a score is not finite.
    """
    annotate_responses(config, world, head="score", annotate=_scores)


def _scores(model: Model, batch: Batch) -> list[Annotation]:
    found = model.scores(batch)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise AlignError(
            f"the reward model's score is {found[bad[0]]} for {len(bad)} of {len(batch)} responses scored together, of "
            f"which the first has {batch.lengths[bad[0]]} tokens with its prompt; look at the weights in `model`"
        )
    return [{"score": float(score)} for score in found]
