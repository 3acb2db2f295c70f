"""What starting costs: importing, opening a file, the first token. Each in fresh processes, medians printed.

    python benchmarks/startup.py [--rounds N]

The real models must be in the cache already (``refengine pull smollm2``). RSS is what the step adds to a
process that has imported what it needs. Needs the dependency group ``test`` (gguf, psutil).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

OPEN = """
import time, psutil
{imports}
from refengine.loader import resolve
path = resolve({model!r})
before, begin = psutil.Process().memory_info().rss, time.perf_counter()
opened = {call}
print(time.perf_counter() - begin, (psutil.Process().memory_info().rss - before) / 2**20)
"""

READERS = {
    "refengine": ("from refengine.loader import read_gguf", "read_gguf(path)"),
    "gguf package": ("from gguf import GGUFReader", "GGUFReader(path)"),
}

WHOLE = {
    "import refengine": [sys.executable, "-c", "import refengine"],
    "import refengine and load the API": [sys.executable, "-c", "from refengine import load"],
    "refengine --version": [sys.executable, "-m", "refengine", "--version"],
    "first token of run smollm2": [
        *(sys.executable, "-m", "refengine", "run", "smollm2", "Why is the sky blue?"),
        *("--max-tokens", "1"),
    ],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    rounds = arguments.parse_args().rounds

    print(f"whole processes, medians of {rounds}, interpreter start included")
    for label, command in WHOLE.items():
        print(f"  {label:40}{statistics.median(wall(command) for _ in range(rounds)):8.2f} s")
    print(f"\nopening a file, medians of {rounds}")
    for model in ("smollm2", "gemma3-270m"):
        for reader, (imports, call) in READERS.items():
            code = OPEN.format(imports=imports, model=model, call=call)
            runs = [
                [float(figure) for figure in output([sys.executable, "-c", code]).split()]
                for _ in range(rounds)
            ]
            took, grew = (statistics.median(figures) for figures in zip(*runs, strict=True))
            print(f"  {model:14}{reader:26}{took:8.3f} s {grew:8.1f} MiB")


def wall(command: list[str]) -> float:
    begin = time.perf_counter()
    output(command)
    return time.perf_counter() - begin


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
