"""Batches, scores and checksums: values by hand, and every inconsistency refused."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_core.errors import DataError
from align_core.types import ITEM_BYTES, Batch, Completion, ParamMeta, Score, WeightTensor, checksum, chunked

START, STEP = 0xD1B54A32D192ED03, 0x9E3779B97F4A7C14


def batch() -> Batch:
    """Three sequences: 10 11 | 20 | 30 31 32."""
    return Batch.of(
        [[10, 11], [20], [30, 31, 32]],
        tokens={"mask": [np.array([False, True]), np.array([True]), np.array([False, False, True])]},
        columns={"group": np.array([7, 8, 9])},
    )


def test_batch_of_lists_is_flat_tokens_and_offsets() -> None:
    made = batch()
    assert made.tokens.tolist() == [10, 11, 20, 30, 31, 32]
    assert (made.tokens.dtype, made.offsets.dtype) == (np.int32, np.int64)
    assert made.offsets.tolist() == [0, 2, 3, 6]
    assert made.lengths.tolist() == [2, 1, 3]
    assert len(made) == 3
    assert made.mask.tolist() == [False, True, True, False, False, True]


def test_select_takes_sequences_with_all_their_columns_in_the_order_asked() -> None:
    picked = batch().select([2, 0, 2])
    assert picked.tokens.tolist() == [30, 31, 32, 10, 11, 30, 31, 32]
    assert picked.offsets.tolist() == [0, 3, 5, 8]
    assert picked.mask.tolist() == [False, False, True, False, True, False, False, True]
    assert picked.sequence_column("group").tolist() == [9, 7, 9]


def test_select_of_nothing_is_an_empty_batch() -> None:
    assert len(batch().select([])) == 0
    assert len(Batch.of([])) == 0


@pytest.mark.parametrize("indices", [[-1], [0, 3]])
def test_select_refuses_what_is_not_there(indices: list[int]) -> None:
    """-1 is the last offset in numpy, not the last sequence: without the check it would give other tokens."""
    with pytest.raises(DataError, match="asked of a batch of 3, from 0"):
        batch().select(indices)


def test_with_columns_adds_and_replaces_and_leaves_the_original() -> None:
    original = batch()
    more = original.with_columns(tokens={"logprobs": np.zeros(6, np.float32)}, sequences={"group": np.array([1, 1, 2])})
    assert sorted(more.token_columns) == ["logprobs", "mask"]
    assert more.sequence_column("group").tolist() == [1, 1, 2]
    assert original.sequence_column("group").tolist() == [7, 8, 9]
    assert sorted(original.token_columns) == ["mask"]


def test_absent_columns_are_named_with_those_that_are_there() -> None:
    with pytest.raises(DataError, match=r"no per-token column 'old_logprobs', only \['mask'\]"):
        batch().token_column("old_logprobs")
    with pytest.raises(DataError, match=r"no per-sequence column 'reward', only \['group'\]"):
        batch().sequence_column("reward")


@pytest.mark.parametrize("offsets", [[], [0, 2], [1, 6], [0, 7], [[0, 6]]])
def test_offsets_that_do_not_span_the_tokens_are_refused(offsets: list[int]) -> None:
    with pytest.raises(DataError, match="offsets must run from 0 to the 6 tokens"):
        Batch(tokens=np.arange(6, dtype=np.int32), offsets=np.array(offsets, dtype=np.int64))


@pytest.mark.parametrize("offsets", [[0, 2, 2, 6], [0, 4, 3, 6]])
def test_empty_or_backward_sequences_are_refused(offsets: list[int]) -> None:
    with pytest.raises(DataError, match="sequence 1 of the batch is empty"):
        Batch(tokens=np.arange(6, dtype=np.int32), offsets=np.array(offsets, dtype=np.int64))


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="per-token column 'mask' has 5 values for 6 tokens"):
        batch().with_columns(tokens={"mask": np.ones(5, np.bool_)})
    with pytest.raises(DataError, match="per-sequence column 'group' has 6 values for 3 sequences"):
        batch().with_columns(sequences={"group": np.ones(6, np.int64)})


def test_token_columns_that_are_shifted_between_sequences_are_refused() -> None:
    """3 + 1 values for sequences of 2 + 2 tokens: the total is right, the alignment is not."""
    with pytest.raises(DataError, match="'mask' does not have one value a token of each sequence"):
        Batch.of([[1, 2], [3, 4]], tokens={"mask": [np.ones(3, np.bool_), np.ones(1, np.bool_)]})


def test_batch_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(batch()))  # noqa: S301, made right here
    assert copy.tokens.tolist() == batch().tokens.tolist()
    assert copy.mask.tolist() == batch().mask.tolist()


def test_score_has_a_value_or_a_reason() -> None:
    assert Score(value=0.0).error == ""
    assert Score(value=None, error="no number").value is None
    for value, error in ((None, ""), (1.0, "why")):
        with pytest.raises(DataError, match="either a value or an error"):
            Score(value=value, error=error)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_score_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(DataError, match="must be finite"):
        Score(value=value)


def test_checksum_of_two_elements_by_hand() -> None:
    """Elements 5 and 7 at places 0 and 1: (5 + 1) * START + (7 + 1) * (START + STEP), modulo 2^64."""
    data = np.array([5, 7], dtype=np.uint32).view(np.uint8)
    assert checksum(data, item_bytes=4) == (6 * START + 8 * (START + STEP)) % 2**64
    assert checksum(data[4:], item_bytes=4, start=1) == 8 * (START + STEP) % 2**64


@given(
    data=st.lists(st.integers(0, 255), min_size=0, max_size=64).map(lambda x: np.array(x[: len(x) // 4 * 4], np.uint8)),
    cut=st.integers(0, 16),
    item_bytes=st.sampled_from([2, 4]),
)
def test_checksums_of_parts_add_up(data: np.ndarray, cut: int, item_bytes: int) -> None:
    border = min(cut * item_bytes, len(data))
    parts = checksum(data[:border], item_bytes=item_bytes)
    parts += checksum(data[border:], item_bytes=item_bytes, start=border // item_bytes)
    assert parts % 2**64 == checksum(data, item_bytes=item_bytes)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_checksum_notices_every_flipped_bit_and_every_swap(dtype: type[np.unsignedinteger]) -> None:
    items = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 8).astype(dtype)
    size = items.dtype.itemsize
    expected = checksum(items.view(np.uint8), item_bytes=size)
    for place in range(8):
        for bit in range(8 * size):
            flipped = items.copy()
            flipped[place] ^= dtype(1 << bit)
            assert checksum(flipped.view(np.uint8), item_bytes=size) != expected
        for other in range(place):
            swapped = items.copy()
            swapped[[place, other]] = items[[other, place]]
            assert checksum(swapped.view(np.uint8), item_bytes=size) != expected


def test_checksum_notices_missing_zeros() -> None:
    assert checksum(np.zeros(8, np.uint8), item_bytes=4) != checksum(np.zeros(4, np.uint8), item_bytes=4)


def test_checksum_does_not_depend_on_the_length_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
    expected = checksum(data, item_bytes=4)
    monkeypatch.setattr("align_core.types._CHECKSUM_ROW", 7)
    assert checksum(data, item_bytes=4) == expected


def weight(name: str, nbytes: int) -> WeightTensor:
    meta = ParamMeta(name=name, shape=(nbytes // 4,), dtype="float32")
    return WeightTensor(meta=meta, checksum=0, data=np.zeros(nbytes, np.uint8))


def test_chunks_keep_order_and_bound_and_hold_at_least_one() -> None:
    """At most 12 bytes: 8 + 4 fit, 16 comes alone although it is larger, 4 + 8 fit."""
    sizes = {"a": 8, "b": 4, "c": 16, "d": 4, "e": 8}
    chunks = list(chunked(iter(weight(*item) for item in sizes.items()), chunk_bytes=12))
    assert [[w.meta.name for w in chunk] for chunk in chunks] == [["a", "b"], ["c"], ["d", "e"]]
    assert list(chunked(iter([]), chunk_bytes=12)) == []


@pytest.mark.parametrize(("dtype", "item"), sorted(ITEM_BYTES.items()))
def test_size_of_a_weight_is_its_elements_times_their_size(dtype: str, item: int) -> None:
    assert ParamMeta(name="w", shape=(3, 5), dtype=dtype).nbytes == 15 * item
    assert ParamMeta(name="w", shape=(), dtype=dtype).nbytes == item


def test_weight_is_read_from_its_place_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(16)))
    meta = ParamMeta(name="w", shape=(2,), dtype="float32")
    mapped = WeightTensor(meta=meta, checksum=0, file=tmp_path / "file", offset=4)
    assert mapped.bytes().tolist() == list(range(4, 12))
    with pytest.raises(ValueError, match="read-only"):
        mapped.bytes()[0] = 1


def test_weight_without_bytes_is_named() -> None:
    with pytest.raises(DataError, match="'w' carries neither data nor a file"):
        WeightTensor(meta=ParamMeta(name="w", shape=(2,), dtype="float32"), checksum=0).bytes()


def test_every_token_of_a_completion_has_a_version() -> None:
    whole = completion(versions=None)
    assert whole.token_versions.tolist() == [3, 3]
    assert completion(versions=np.asarray([3, 4], np.int32)).token_versions.tolist() == [3, 4]


def completion(*, versions: "np.ndarray | None") -> Completion:
    return Completion(
        prompt_id=0,
        sample=0,
        tokens=np.asarray([5, 6], np.int32),
        logprobs=np.zeros(2, np.float32),
        finish_reason="length",
        version=3,
        versions=versions,
    )
