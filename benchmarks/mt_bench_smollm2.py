"""A full MT-Bench round on CPU: SmolLM2-135M-Instruct answers through vLLM, and judges itself behind a vLLM server.

    python benchmarks/mt_bench_smollm2.py --out DIR --data mt-bench-data [--step answer|judge|report] [--minutes 8]

The judge is far too weak to mean anything; what is shown is that 80 questions x 2 turns go through every part, and that
the report says how weak the judge is. Every step continues where it was stopped. Results go to
benchmarks/results/mt-bench-smollm2-cpu.md by hand.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PORT = 8642
_START_SECONDS = 240.0
_KEY = "MT_BENCH_JUDGE_KEY"
_FORM = r"[^\[\]]{0,300}Rating: \[\[(10|[1-9])\]\]"
"""At most 300 characters of reasons, then a rating: what the server lets through with --held."""
_CPU = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def main() -> int:
    """Runs the steps that are asked for, and prints how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with MT-Bench's data")
    parser.add_argument("--step", choices=("answer", "judge", "report"), help="only this step (default: all)")
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--judge-tokens", type=int, default=160)
    parser.add_argument("--held", action="store_true", help="judge: the server enforces the form of the verdict")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop a step after so long; run again to continue")
    arguments = parser.parse_args()
    model = arguments.out / "smollm2"
    if not model.is_dir():
        _run([*_script("align"), "make-model", "smollm2", "--out", str(model)], minutes=arguments.minutes)
    steps = [arguments.step] if arguments.step else ["answer", "judge", "report"]
    return max(_step(step, arguments, model) for step in steps)


def _step(step: str, arguments: argparse.Namespace, model: Path) -> int:
    common = ["--out", str(arguments.out / "round"), "--data", str(arguments.data)]
    command = [*_script("align-eval"), "mt-bench", step, *common]
    if step == "answer":
        command += ["--model", f"smollm2-135m={model}", "--max-tokens", str(arguments.answer_tokens)]
        return _run([*command, "--dtype", "bfloat16", "--context", "4096"], minutes=arguments.minutes)
    if step == "judge":
        with _server(model, arguments.out / "server.log") as key:
            name = "smollm2-held=smollm2-judge" if arguments.held else "smollm2-judge"
            command += ["--judge", name, "--url", f"http://127.0.0.1:{_PORT}/v1", "--key-variable", _KEY]
            command += ["--extra", json.dumps({"structured_outputs": {"regex": _FORM}})] if arguments.held else []
            command += ["--max-tokens", str(arguments.judge_tokens), "--concurrency", "32", "--reasks", "1"]
            command += ["--max-failures", "1.0"]
            return _run(command, minutes=arguments.minutes, environment={_KEY: key})
    judge = "smollm2-held" if arguments.held else "smollm2-judge"
    return _run([*command, "--judge", judge], minutes=arguments.minutes)


def _script(name: str) -> list[str]:
    return [str(Path(sys.executable).with_name(name))]


def _run(command: list[str], *, minutes: float, environment: dict[str, str] | None = None) -> int:
    begin = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **_CPU, **(environment or {})})
    try:
        status = process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        status = process.wait()
    print(json.dumps({"command": command[1:], "status": status, "seconds": round(time.monotonic() - begin, 1)}))
    return status


@contextmanager
def _server(model: Path, log: Path) -> Iterator[str]:
    """A vLLM server on the loopback address; gives its key."""
    key = secrets.token_urlsafe(24)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "smollm2-judge", "--host", "127.0.0.1", "--port", str(_PORT)),
        *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32", "--enforce-eager"),
    ]
    # The key goes through the environment, where other users of the machine cannot read it as they can arguments.
    environment = {**os.environ, **_CPU, "VLLM_API_KEY": key, "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        _wait_until_healthy(process)
        yield key
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_healthy(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}; see server.log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
    raise SystemExit(f"the server was not healthy after {_START_SECONDS:.0f} s; see server.log")


if __name__ == "__main__":
    sys.exit(main())
