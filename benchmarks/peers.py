"""refengine beside llama.cpp and Transformers: same file, same threads, alternating in one run.

    python benchmarks/peers.py [--files NAME …] [--engines NAME …] [--repeat N] [--threads N]
                               [--backend NAME] [--policy NAME …] [--json FILE] [--png FILE] [--quick]
                               [--llama-python PYTHON] [--transformers-python PYTHON]
    python benchmarks/peers.py --device gpu [--files NAME …] …
    python benchmarks/peers.py --read FILE --png FILE

In every round each engine gets a process of its own, so that memory is its own and where pages come to lie
is drawn anew; all of these stay, and are asked in turn, one measurement after the other, so that what is
compared was measured within seconds. Another engine begins each time. A process that has no question sleeps.

prefill         the logits of the last of 512 tokens, from an empty context
decode          64 steps after 16 tokens, one request
decode at 2,048 32 steps after 2,048 tokens
8 at once       64 steps of 8 requests with 16 tokens each; tokens per second of all together
share           bytes that a decode step reads (weights as stored, float16 keys and values) × steps per second
                ÷ read bandwidth, which is measured at the start of every round: the best of several passes
                over 1 GiB by a loop that only reads (a reduction of NumPy's, a sum in Numba)
peak RSS        VmHWM of the process after prefill, decode and decode at 2,048; "after the imports" is what
                was resident before the file was opened: interpreter, NumPy, the engine's own libraries
first token     from the start of the process, caches warm: interpreter, imports, opening, a prompt of 16

Tokens are made up, the same for all; timed are whole calls of ``Engine.step`` (with scheduling and sampling)
for refengine, ``llama_decode`` alone for llama.cpp, and the model's call for Transformers. Keys and values
are float16 (Transformers: float32), steps have 512 tokens at most. llama.cpp runs with flash attention and
without, and the better of the two counts, in each row by itself. The share of Transformers counts the bytes
of the file too, though it reads the decoded weights.

On a GPU (``--device gpu``) the engines are refengine with its backend cupy, Transformers in float16 on CUDA,
and llama.cpp with all layers on the GPU; one whose build has no GPU is left out, and why is told. Steps have
2,048 tokens at most. Measured are, beside the above:

prefill of 2,048   in one step
decode at 7,936    64 steps after 7,936 tokens
64 at once         as 8 at once
device memory      the most that NVIDIA's driver has given to the process while it computes a prompt and four
                   steps, after the timed rows up to that context. What was given before the file was opened,
                   which is the context, is stated apart (llama.cpp has none by then: it starts the GPU with
                   the file). All processes stay on the GPU, and work one at a time: what changes while one
                   works is its own. llama.cpp takes memory for all positions at once

There is no share of the bandwidth: nothing here measures a GPU's. Ratios are to llama.cpp where it takes
part, else to Transformers.

Before the first round every engine starts once, computes the logits of English text and continues it
greedily; how far they agree is in the table, so that nobody is compared with an engine that computes
something else. The reference is Transformers where it takes part, else llama.cpp.

Files that are not there are made in ``--folder``: SmolLM2 in Q4_0 and Q8_0 (see ``requantize.py``) and
``llama-1b`` with random weights in Q4_0 and Q4_K.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from peers_bandwidth import Bandwidth
from peers_chart import draw
from peers_comparison import MEASURED, Comparison
from peers_engines.device_memory import Nvml
from peers_figures import GPU, GPU_QUICK, QUICK, Results, Sizes
from peers_files import DEFAULTS, GPU_DEFAULTS, subject
from peers_processes import Contestant
from peers_table import report

from refengine.errors import RefengineError
from refengine.loader.cache import cache_folder


def main() -> None:
    options = parse()
    results = Results.from_json(json.loads(options.read.read_text())) if options.read else measure(options)
    print("\n" + report(results))
    if options.png:
        draw(results, options.png)


def measure(options: argparse.Namespace) -> Results:
    """Compare on every file; what cannot take part is told, and the others go on."""
    results = Results(sizes(options), options.threads, machine(options.device))
    contestants = list(chosen(options))
    results.engines = {contestant.name: contestant.engine for contestant in contestants}
    bandwidth = Bandwidth(options.threads) if options.device == "cpu" else None
    if bandwidth is not None:
        results.machine["read bandwidth"] = f"the best of {', '.join(bandwidth.kernels)}"
    try:
        for name in options.files:
            try:
                found = subject(name, options.folder)
            except (RefengineError, ImportError) as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            comparison = Comparison(
                found, contestants, bandwidth, results, tuple(options.figures), options.device
            )
            for turn in range(options.repeat):
                comparison.run(turn, options.repeat)
                if options.json:  # after every round: a run takes long
                    options.json.write_text(json.dumps(results.to_json(), indent=1))
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", flush=True)
    return results


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--device", choices=("cpu", "gpu"), default="cpu", help="what all engines compute on")
    known = ", ".join((*DEFAULTS, *GPU_DEFAULTS))
    add("--files", nargs="+", metavar="NAME", help=f"of {known}; or paths")
    add("--engines", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    add(
        "--figures",
        nargs="+",
        default=MEASURED,
        choices=MEASURED,
        metavar="NAME",
        help="of " + ", ".join(MEASURED),
    )
    add("--repeat", type=int, default=5, metavar="N", help="rounds")
    add(
        "--transformers-repeat",
        type=int,
        metavar="N",
        help="rounds with Transformers: 2 on a CPU, where it is slow",
    )
    add("--threads", type=int, default=cores(), metavar="N", help="of every engine; one per core")
    add("--backend", help="of refengine: numba, on a GPU cupy")
    add("--policy", nargs="+", default=["mixed8"], help="of refengine; several are compared too")
    add("--refengine-python", default=sys.executable, metavar="PYTHON")
    add("--llama-python", default=sys.executable, metavar="PYTHON", help="that has llama_cpp")
    add(
        "--transformers-python",
        default=sys.executable,
        metavar="PYTHON",
        help="that has transformers and torch",
    )
    add("--folder", type=Path, default=cache_folder() / "benchmarks", help="of files that are made")
    add("--json", type=Path, metavar="FILE", help="write all samples here")
    add("--png", type=Path, metavar="FILE", help="draw a chart here")
    add(
        "--read",
        type=Path,
        metavar="FILE",
        help="measure nothing: tables and chart of an earlier --json FILE",
    )
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return settled(arguments.parse_args())


def settled(options: argparse.Namespace) -> argparse.Namespace:
    """What is not given follows from the device."""
    gpu = options.device == "gpu"
    options.files = options.files or (GPU_DEFAULTS if gpu else DEFAULTS)
    options.backend = options.backend or ("cupy" if gpu else "numba")
    if options.transformers_repeat is None and not gpu:
        options.transformers_repeat = 2
    return options


def sizes(options: argparse.Namespace) -> Sizes:
    """How much is computed."""
    if options.device == "gpu":
        return GPU_QUICK if options.quick else GPU
    return QUICK if options.quick else Sizes()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> dict[str, str]:
    """What this runs on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "machine": f"{names[0] if names else platform.machine()}, {cores()} cores",
        "python": platform.python_version(),
    }
    if device == "gpu":
        try:
            found["GPU"] = Nvml().about()
        except OSError as error:
            sys.exit(f"nothing can be measured on a GPU here: {error}")
    return found


def refengine_contestants(options: argparse.Namespace) -> Iterator[Contestant]:
    for policy in options.policy:
        settings = {"backend": options.backend, "policy": policy}
        blas = options.threads if options.backend == "numpy" else 1
        name = f"refengine {policy}"
        yield Contestant(
            name, "refengine", options.refengine_python, "serve_refengine.py", settings, None, blas
        )


def llama_contestants(options: argparse.Namespace) -> Iterator[Contestant]:
    for name, flash in (("llama.cpp, flash attention", True), ("llama.cpp, without", False)):
        settings = {"flash_attention": flash}
        yield Contestant(name, "llama.cpp", options.llama_python, "serve_llama.py", settings)


def transformers_contestants(options: argparse.Namespace) -> Iterator[Contestant]:
    yield Contestant(
        "Transformers",
        "transformers",
        options.transformers_python,
        "serve_transformers.py",
        rounds=options.transformers_repeat,
    )


CONTESTANTS = {
    "refengine": refengine_contestants,
    "llama.cpp": llama_contestants,
    "transformers": transformers_contestants,
}


def chosen(options: argparse.Namespace) -> Iterator[Contestant]:
    """Whom to compare, refengine first."""
    for name, contestants in CONTESTANTS.items():
        if name in options.engines:
            yield from contestants(options)


if __name__ == "__main__":
    main()
