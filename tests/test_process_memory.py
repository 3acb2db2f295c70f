"""What the system counts is what was planned: the process, as it stands, with real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refengine.backend import registered

SCRIPT = """
import json, sys
import refengine
from refengine.forecast import forecast
from refengine.memory_report import process_memory

config = refengine.EngineConfig(**json.loads(sys.argv[2]))
llm = refengine.load(sys.argv[1], backend=sys.argv[4], config=config)
llm.engine.submit(refengine.Request(tuple(range(1000, 1000 + int(sys.argv[3]))), 3))
while llm.engine.has_work:
    assert not any(output.error for output in llm.engine.step())
report, plan = llm.engine.memory(), llm.engine.plan
assert report.peak == forecast(plan, int(sys.argv[3]) + 2, 1, int(sys.argv[3])).peak
print(json.dumps([report.peak.total, plan.process_bytes, process_memory()[1]]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("numpy", {"kv_dtype": "float16", "weight_cache": 0}),
        ("numpy", {"kv_dtype": "int8", "weight_cache": 0}),
        ("numpy", {"kv_dtype": "float16", "memory": 400_000_000}),
        ("numba", {"kv_dtype": "float16", "policy": "mixed8"}),
        ("numba", {"kv_dtype": "int8", "policy": "mixed16"}),
    ],
    ids=["mapped", "mapped, int8 KV", "under a limit", "repacked", "repacked, int8 KV"],
)
def test_resident_memory_is_within_five_percent_and_a_constant(
    model: str, backend: str, config: dict[str, object]
) -> None:
    """At most 5 % above what the engine counts, which is what was planned, and the stated constant.

    Under a backend that compiles, from the first start on.
    """
    if next(status for status in registered() if status.name == backend).problem:
        pytest.skip(f"{backend} is not installed")
    prompt = 1500
    fields = json.dumps(config | {"max_sequences": 1, "kv_tokens": 2048})
    command = [sys.executable, "-c", SCRIPT, model, fields, str(prompt), backend]
    threads = os.environ | {"OPENBLAS_NUM_THREADS": "2"}  # each takes buffers of its own
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=threads)
    assert done.returncode == 0, done.stderr
    counted, constant, resident = json.loads(done.stdout)
    assert resident <= 1.05 * counted + constant
    assert resident <= config.get("memory", resident)
