"""How long indexing a large data file takes, how fast shuffled records are read from it, and in how much memory.

    python benchmarks/big_file.py --gigabytes 2 --out results

Writes OUT/big-file.{md,json}. The file is generated beside them and removed.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

from align_core.data.records import read_sft

_TEXT = "The quick brown fox jumps over the lazy dog. " * 22  # about a kilobyte, as an answer has


def main() -> None:
    """Generates, indexes, reads, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "big.jsonl"
    try:
        generate(path, int(options.gigabytes * 1e9))
        found = measure(path)
    finally:
        path.unlink(missing_ok=True)
    facts = {"cores": os.cpu_count(), "python": platform.python_version(), "commit": options.commit}
    (options.out / "big-file.json").write_text(json.dumps({**facts, **found}, indent=1) + "\n", encoding="utf-8")
    (options.out / "big-file.md").write_text(page({**facts, **found}), encoding="utf-8")


def generate(path: Path, size: int) -> None:
    """Records of about a kilobyte, a thousand in one write."""
    block = "".join(json.dumps({"prompt": f"question {n}", "response": _TEXT}) + "\n" for n in range(1000)).encode()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)


def measure(path: Path) -> dict[str, float]:
    """Seconds, rates and the growth of this process's peak memory."""
    before = peak_mib()
    started = time.perf_counter()
    records = read_sft(path)
    indexed = time.perf_counter() - started
    order = records.order(batch_size=64, seed=0)
    order(0)
    shuffled = time.perf_counter() - started - indexed
    started = time.perf_counter()
    for step in range(100):
        for index in order(step).tolist():
            records[index]
    read = time.perf_counter() - started
    return {
        "gigabytes": path.stat().st_size / 1e9,
        "records": len(records),
        "index_seconds": indexed,
        "shuffle_seconds": shuffled,
        "records_per_second": 6400 / read,
        "memory_mib": peak_mib() - before,
    }


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def page(found: dict[str, float]) -> str:
    """The results page."""
    rate = found["gigabytes"] / found["index_seconds"] * 1000
    return f"""# A data file larger than memory

{found["cores"]} cores, Python {found["python"]}, commit {found["commit"]}; written by `benchmarks/big_file.py`.

| | |
|---|---:|
| file | {found["gigabytes"]:.2f} GB, {found["records"]:,} records |
| checking, hashing and indexing it, once at the start | {found["index_seconds"]:.1f} s ({rate:.0f} MB/s) |
| the first epoch's shuffle | {found["shuffle_seconds"]:.2f} s |
| shuffled records read and parsed | {found["records_per_second"]:,.0f} a second |
| growth of the process's peak memory in all of it | {found["memory_mib"]:.0f} MiB |
"""


if __name__ == "__main__":
    main()
