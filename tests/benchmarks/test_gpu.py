"""The benchmark of a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu
import pytest

from refengine.loader.gguf_writer import write_gguf
from refengine.synth import SHAPES, synthesize


def test_every_part_runs_under_every_policy_and_the_peer_once() -> None:
    assert gpu.jobs(["tokens", "transformers", "memory"], ["mixed8", "mixed16"]) == [
        ("mixed8", "tokens"),
        ("mixed8", "memory"),
        ("mixed16", "tokens"),
        ("mixed16", "memory"),
        (None, "transformers"),
    ]


def test_every_part_has_a_worker() -> None:
    assert tuple(gpu.WORKERS) == gpu.PARTS


def test_results_are_kept_by_policy_and_failures_told(tmp_path: Path, monkeypatch) -> None:
    """Without a GPU every worker fails: the file says of which part and policy, and why."""
    script = "import sys; sys.exit('no GPU here')"
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    (tmp_path / "gpu.py").write_text(script)
    given = ["--parts", "tokens,transformers", "--policy", "mixed8", "float32", "--json", str(tmp_path / "f")]
    (tmp_path / "model").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given, "--model", str(tmp_path / "model")])
    gpu.main()
    found = json.loads((tmp_path / "f").read_text())
    failed = {"failed": "no GPU here\n"}
    assert found == {"mixed8": {"tokens": failed}, "float32": {"tokens": failed}, "transformers": failed}


def test_tokens_are_compared_with_the_golden_engine(tmp_path: Path) -> None:
    """The golden engine agrees with itself, prompt by prompt, in tokens that are not all the same."""
    made = synthesize(SHAPES["smollm2-135m"].resized(layers=1, vocabulary_size=500), "f32", uniform=True)
    write_gguf(tmp_path / "f.gguf", made.metadata, made.tensors)
    found = gpu.same_tokens(str(tmp_path / "f.gguf"), "numpy", "float32")
    assert found["same"] == found["of"] == [len(tokens) for tokens in found["found"]]
    assert max(found["of"]) > 1
    assert len({tuple(tokens) for tokens in found["found"]}) > 1


@pytest.mark.parametrize("policy", gpu.POLICIES)
def test_policies_are_those_that_the_backend_computes(policy: str) -> None:
    from refengine_cupy.backend import POLICIES

    assert policy in POLICIES
