"""A stored reference is of the tokens that training sees: one of others is computed anew or refused, never taken."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from align_core.config import KtoConfig
from align_core.data.examples import Example
from align_core.errors import CheckpointError
from align_core.stages import kto
from align_core.stages.kto import Marked, run_kto, split_off_baseline
from align_core.stages.reference import StoredReference, store_reference
from align_core.types import Batch


class Scorer:
    """A model whose log-prob of a token is its id; counts the sequences that it is asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        self.asked += len(batch)
        return batch.tokens.astype(np.float32)


def rows(first: int = 1) -> Callable[[int], Batch]:
    """Key k: two sequences, of k + 1 and one tokens."""
    return lambda key: Batch.of([np.arange(first, first + key + 1, dtype=np.int32), np.asarray([9], np.int32)])


def stored(path: Path, keys: Sequence[int], make_batch: Callable[[int], Batch]) -> tuple[StoredReference, int]:
    """And how many sequences were scored for it."""
    model = Scorer()
    return store_reference(path, keys, make_batch, model), model.asked  # type: ignore[arg-type]


def together(make_batch: Callable[[int], Batch], keys: Sequence[int]) -> Batch:
    parts = [make_batch(key) for key in keys]
    return Batch.of([part.select([i]).tokens for part in parts for i in range(2)])


def test_same_tokens_are_scored_once(tmp_path: Path) -> None:
    keys = [4, 0, 7]
    reference, asked = stored(tmp_path / "r", keys, rows())
    again, asked_again = stored(tmp_path / "r", keys, rows())
    assert (asked, asked_again) == (6, 0)
    for some in ([0], [7, 4], keys):
        batch = together(rows(), some)
        for each in (reference, again):
            assert each.logprobs(some, batch).tolist() == batch.tokens.tolist()


@pytest.mark.parametrize("what", ["other tokens", "no index", "cut file", "more keys"])
def test_file_of_other_tokens_is_computed_anew_and_told(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, keys = tmp_path / "r", [0, 1, 2]
    stored(path, keys, rows())
    make_batch = rows(3) if what == "other tokens" else rows()
    if what == "no index":  # as earlier versions wrote it
        (tmp_path / "r.index.npy").unlink()
    elif what == "cut file":
        path.write_bytes(path.read_bytes()[:-4])
    elif what == "more keys":
        keys = [0, 1, 2, 3]
    with caplog.at_level(logging.WARNING):
        reference, asked = stored(path, keys, make_batch)
    assert asked == 2 * len(keys)
    assert f"the reference in {path} is of other tokens than training sees now" in caplog.text
    assert reference.logprobs(keys, together(make_batch, keys)).tolist() == together(make_batch, keys).tokens.tolist()


def test_other_tokens_that_were_not_looked_at_are_refused_in_their_step(tmp_path: Path) -> None:
    """Of 100 keys some are compared at the start, and number 1 is none of them."""
    reference, _ = stored(tmp_path / "r", range(100), rows())
    other = rows(3)
    reference, asked = stored(tmp_path / "r", range(100), lambda key: other(key) if key == 1 else rows()(key))
    assert asked == 0
    reference.logprobs([0, 2], together(rows(), [0, 2]))
    for batch in (
        Batch.of([b.tokens for b in (rows()(0), other(1))]),
        together(rows(), [0, 0]),
        together(rows(), [0, 1, 2]),
    ):
        with pytest.raises(
            CheckpointError, match=r"other tokens than training sees now \(number 1\).*remove that file"
        ):
            reference.logprobs([0, 1], batch)


def test_kto_goes_on_after_its_pairing_has_changed(
    make_config: Callable[..., KtoConfig], fake_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun when each prompt was paired with the response of the record before, whatever its prompt.

    All responses have one length, so that nothing but the tokens tells the two apart.
    """
    config = make_config("kto")
    marked = [{"prompt": f"{n // 5}", "response": f"{n}", "label": n % 2 == 0} for n in range(10)]
    config.data.write_text("".join(json.dumps(row) + "\n" for row in marked))  # type: ignore[union-attr]
    seen: list[Batch] = []

    def row_before(rows: Sequence[Marked], own: int) -> Example:
        return rows[own - 1].example

    def watched(model: Any, batch: Batch) -> tuple[Batch, float]:
        seen.append(batch)
        return split_off_baseline(model, batch)

    monkeypatch.setattr(kto, "split_off_baseline", watched)
    with monkeypatch.context() as patch:
        patch.setattr(kto, "_other", row_before)
        with pytest.raises(Exception, match=r"^step$"):
            run_kto(config, fake_world(crash_at=9))  # the reference, then for each step its baseline and its update
    assert (config.out / "checkpoints" / "step_2").exists()
    seen.clear()
    world = fake_world()
    run_kto(config, world)
    untrained = fake_world().trainer(world.trainers[0].config)
    assert len(seen) == 4
    for batch in seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))
