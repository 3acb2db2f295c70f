"""What the comparison with other engines makes of its samples, without any engine."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import peers
import pytest
from peers_bandwidth import Bandwidth
from peers_chart import draw
from peers_comparison import Comparison
from peers_engines.device_memory import INTERVAL, DeviceMemory, Nvml
from peers_figures import (
    GPU_QUICK,
    OTHERS,
    QUICK,
    READING,
    Agreement,
    Ratio,
    Results,
    Sample,
    common_beginning,
    divergence,
)
from peers_files import Subject, kv_layers, weight_bytes
from peers_interference import Interference
from peers_processes import ENGINES, Contestant, EngineFailedError, EngineProcess, rotated
from peers_table import base_of, best_of_base, file_table, ratio_table, report

from refengine import loader
from refengine.loader.gguf_writer import write_gguf
from refengine.models import build
from refengine.synth import SHAPES, synthesize

OURS, FLASH, PLAIN, OTHER = (
    "refengine mixed8",
    "llama.cpp, flash attention",
    "llama.cpp, without",
    "Transformers",
)


def results(**figures: dict[str, list[list[float]]]) -> Results:
    """Results on a file ``f``: figure -> contestant -> rounds -> samples."""
    found = Results(QUICK, 2, {"machine": "a machine"})
    found.engines = {OURS: "refengine", FLASH: "llama.cpp", PLAIN: "llama.cpp", OTHER: "transformers"}
    found.step_bytes["f"], found.file_bytes["f"] = (2e9, 3e9), 10**9
    found.samples = [
        Sample("f", name, turn, figure, value)
        for figure, contestants in figures.items()
        for name, rounds in contestants.items()
        for turn, values in enumerate(rounds)
        for value in values
    ]
    return found


class TestResults:
    def test_a_ratio_is_formed_within_rounds(self) -> None:
        """The median of the rounds' ratios is not the ratio of the medians."""
        found = results(decode={OURS: [[10.0], [40.0], [90.0]], FLASH: [[5.0], [40.0], [30.0]]})
        assert found.ratio("f", OURS, FLASH, "decode") == Ratio(2.0, 1.0, 3.0)

    def test_a_round_counts_with_the_median_of_its_samples(self) -> None:
        found = results(decode={OURS: [[1.0, 9.0, 2.0], [4.0]]})
        assert found.by_round("f", OURS, "decode") == {0: 2.0, 1: 4.0}
        assert found.median("f", OURS, "decode") == 3.0

    def test_an_engine_that_missed_rounds_is_compared_in_the_others(self) -> None:
        found = results(decode={OURS: [[10.0], [20.0], [60.0]], OTHER: [[10.0], [10.0]]})
        assert found.ratio("f", OURS, OTHER, "decode") == Ratio(1.5, 1.0, 2.0)
        assert found.ratio("f", OURS, PLAIN, "decode") is None
        assert found.median("f", PLAIN, "decode") is None

    def test_the_share_is_of_the_bandwidth_of_the_same_round(self) -> None:
        """2 GB a step at 10 steps/s are half of 40 GB/s, and a quarter of 80."""
        found = results(decode={OURS: [[10.0], [10.0]]}, bandwidth={READING: [[40.0], [80.0]]})
        assert found.by_round("f", OURS, "share") == {0: 0.5, 1: 0.25}

    def test_the_share_at_the_long_context_counts_the_bytes_of_that_step(self) -> None:
        found = results(context={OURS: [[10.0]]}, bandwidth={READING: [[60.0]]})
        assert found.by_round("f", OURS, "context_share") == {0: 0.5}

    def test_memory_of_the_imports_is_taken_off_the_same_process(self) -> None:
        found = results(peak={OURS: [[300.0], [310.0]]}, imports={OURS: [[100.0], [90.0]]})
        assert found.by_round("f", OURS, "net") == {0: 200.0, 1: 220.0}

    def test_several_requests_are_held_against_one(self) -> None:
        found = results(decode={OURS: [[10.0]]}, many={OURS: [[35.0]]})
        assert found.median("f", OURS, "gain") == 3.5

    def test_llama_cpp_is_taken_at_its_better_setting_figure_by_figure(self) -> None:
        found = results(
            decode={FLASH: [[10.0]], PLAIN: [[9.0]]},
            prefill={FLASH: [[10.0]], PLAIN: [[12.0]]},
            peak={FLASH: [[200.0]], PLAIN: [[190.0]]},
        )
        assert best_of_base(found, "f", "decode") == best_of_base(found, "f", "share") == FLASH
        assert best_of_base(found, "f", "prefill") == best_of_base(found, "f", "peak") == PLAIN
        assert best_of_base(found, "f", "net") == PLAIN
        assert best_of_base(found, "f", "many") is None

    def test_results_survive_being_written_and_read(self) -> None:
        found = results(decode={OURS: [[10.0]], FLASH: [[5.0]]})
        found.samples.append(Sample("f", OURS, 1, "decode", 2.0, (0.5, 0.25)))
        found.agreements.append(Agreement("f", OURS, FLASH, 1e-3, 0.9, 7, 8))
        assert Results.from_json(json.loads(json.dumps(found.to_json()))) == found


class TestTables:
    @pytest.fixture
    def found(self) -> Results:
        found = results(
            bandwidth={READING: [[40.0], [40.0]]},
            prefill={OURS: [[600.0], [620.0]], FLASH: [[300.0], [310.0]], PLAIN: [[200.0], [200.0]]},
            decode={OURS: [[10.0], [12.0]], FLASH: [[5.0], [5.0]], PLAIN: [[4.0], [4.0]], OTHER: [[1.0]]},
            peak={OURS: [[1234.0]], FLASH: [[1000.0]], PLAIN: [[900.0]]},
        )
        found.agreements = [Agreement("f", OURS, FLASH, 2e-3, 0.9, 7, 8)]
        return found

    def test_a_file_has_medians_ratios_and_spread(self, found: Results) -> None:
        lines = list(file_table(found, "f"))
        (decode,) = (line for line in lines if line.startswith("| decode of 4 tokens"))
        assert cells(decode)[1:] == ["11.0", "1.0", "5.0", "2.20 (2.00 – 2.40)", "0.20 (0.20 – 0.20)"]
        (share,) = (line for line in lines if "share of the read bandwidth" in line)
        assert cells(share)[1:] == ["55%", "5%", "25%", "", ""]
        (peak,) = (line for line in lines if line.startswith("| peak RSS, one request"))
        assert cells(peak)[1:] == ["1,234", "", "900.0", "1.37 (1.37 – 1.37)", ""]

    def test_rows_have_as_many_cells_as_the_head(self, found: Results) -> None:
        for table in (list(file_table(found, "f")), list(ratio_table(found, OURS))):
            assert len({len(cells(line)) for line in table if line.startswith("|")}) == 1

    def test_what_was_not_measured_has_no_row(self, found: Results) -> None:
        assert "first token" not in "\n".join(file_table(found, "f"))

    def test_agreement_stands_beside_the_speed(self, found: Results) -> None:
        text = report(found)
        assert re.search(rf"KL divergence from {FLASH}, nats \| 2.0e-03 \|", text)
        assert re.search(r"same greedy continuation \| 7 of 8 \|", text)

    def test_the_setting_that_was_better_is_named(self, found: Results) -> None:
        assert f"Better in its rows: {FLASH} (prefill, decode); {PLAIN} (peak RSS)." in report(found)

    def test_ratios_of_all_files_are_in_one_table(self, found: Results) -> None:
        (row,) = (line for line in ratio_table(found, OURS) if line.startswith("| f |"))
        assert cells(row) == ["f", "2.00", "2.20", "", "", "1.37", "", "", "55%"]

    @pytest.mark.parametrize("busy", [0.01, 0.3])
    def test_a_machine_that_was_not_quiet_is_told(self, found: Results, busy: float) -> None:
        found.samples.append(Sample("f", OTHERS, 0, "busy", busy))
        assert found.files == ["f"]
        assert f"Others took {busy:.0%} of the cores' time" in report(found)
        assert ("compare nothing" in report(found)) == (busy > 0.05)

    def test_without_llama_cpp_there_are_no_ratios(self) -> None:
        found = results(decode={OURS: [[10.0]]})
        found.engines = {OURS: "refengine"}
        lines = list(file_table(found, "f"))
        assert cells(lines[2]) == ["", OURS]
        assert not list(ratio_table(found, OURS))

    def test_a_chart_is_drawn(self, found: Results, tmp_path) -> None:
        pytest.importorskip("matplotlib")
        draw(found, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestAgreement:
    def test_divergence_is_that_of_the_two_distributions(self) -> None:
        """Of (1/4, 3/4) from (1/2, 1/2): 1/2 ln 2 + 1/2 ln 2/3; logits may be shifted by any constant."""
        expected, found = np.log([[0.5, 0.5]]) + 7, np.log([[0.25, 0.75]]) - 3
        mean, _ = divergence(expected, found)
        assert math.isclose(mean, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel_tol=1e-12)

    def test_same_top_counts_rows(self) -> None:
        rows = np.eye(4, dtype=np.float32)
        assert divergence(rows, rows) == (0.0, 1.0)
        assert divergence(rows, rows[[0, 1, 3, 2]])[1] == 0.5

    def test_continuations_agree_up_to_the_first_difference(self) -> None:
        assert common_beginning([1, 2, 3, 4], [1, 2, 9, 4]) == 2
        assert common_beginning([1, 2], [1, 2]) == 2
        assert common_beginning([], [1]) == 0


class TestSubject:
    def test_bytes_of_a_step(self) -> None:
        """Weights, and of each layer what it sees: 100 positions of 8 bytes, and a window of 10 of 4."""
        subject = Subject("f", None, 10, 1000, ((8, None), (4, 10)), ())
        assert subject.step_bytes(100) == 1000 + 800 + 40
        assert subject.step_bytes(5) == 1000 + 40 + 20

    @pytest.mark.parametrize("name", ["llama-2-7b", "smollm2-135m"], ids=["own output", "tied"])
    def test_an_embedding_counts_where_it_is_the_output(self, name: str, tmp_path) -> None:
        shape = SHAPES[name].resized(layers=1, vocabulary_size=500)
        made = synthesize(shape, "q4_0", uniform=True)
        write_gguf(tmp_path / "f.gguf", made.metadata, made.tensors)
        found = loader.read_gguf(tmp_path / "f.gguf")
        embedding = found.tensors["token_embd.weight"].nbytes
        everything = sum(tensor.nbytes for tensor in found.tensors.values())
        assert weight_bytes(found) == everything - (0 if shape.tied_embeddings else embedding)
        assert kv_layers(build(found).spec) == ((2 * shape.kv_heads * shape.head_size * 2, None),)


class TestProcesses:
    def test_everyone_begins_once(self) -> None:
        assert [rotated("abc", turn) for turn in range(4)] == [
            list("abc"),
            list("bca"),
            list("cab"),
            list("abc"),
        ]
        assert rotated("", 3) == []

    def test_a_missing_interpreter_is_told(self, tmp_path) -> None:
        nobody = Contestant("x", "x", str(tmp_path / "python"), "serve_llama.py")
        with pytest.raises(EngineFailedError, match="No such file"):
            EngineProcess(nobody, {"threads": 1})

    @pytest.mark.skipif(not Path("/proc/stat").exists(), reason="asks Linux")
    def test_own_work_is_not_that_of_others(self, monkeypatch) -> None:
        """Of 100 busy seconds on 2 cores in 100 seconds, 60 were our own."""
        clocks = iter([(0.0, 1000.0, 50.0), (100.0, 1100.0, 110.0)])
        monkeypatch.setattr("peers_interference.clocks", lambda: next(clocks))
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        assert Interference().share() == pytest.approx(0.2)

    def test_memory_is_read_at_some_speed(self) -> None:
        assert Bandwidth(2, nbytes=2**20).measure(times=1) > 0


class Counter:
    """A driver whose count goes through these numbers."""

    def __init__(self, *counts: float) -> None:
        self.counts = list(counts)

    def used(self) -> float:
        return self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]


class TestDeviceMemory:
    def test_what_changes_during_an_action_is_ours(self) -> None:
        """Between two actions others took 50, which does not count."""
        memory = DeviceMemory(Counter(100, 600, 650, 640))
        memory.during(lambda: None)
        memory.during(lambda: None)
        assert memory.held == 500 - 10

    def test_a_peak_is_seen_though_it_is_gone_afterwards(self) -> None:
        driver = Counter(100, 500)
        memory = DeviceMemory(driver)
        memory.during(lambda: None)

        def act() -> None:
            driver.counts = [900]
            time.sleep(20 * INTERVAL)
            driver.counts = [520]

        assert memory.peak_during(act) == 400 + 900 - 500
        assert memory.held == 420

    def test_no_driver_is_told(self, monkeypatch) -> None:
        def missing(name: str) -> None:
            raise OSError(name)

        monkeypatch.setattr("ctypes.CDLL", missing)
        with pytest.raises(OSError, match="NVIDIA's driver"):
            Nvml()


STAND_IN = """
import sys, time
sys.path.insert(0, {folder!r})
import device_memory, serving
import numpy as np

class Driver:
    count = 0.0
    def used(self):
        return Driver.count

device_memory.Nvml = serving.Nvml = Driver

class Engine:
    about = "a stand-in"
    def prefill(self, tokens):
        return len(tokens) / {speed}
    def decode(self, prompts, steps):
        Driver.count += len(prompts[0])
        time.sleep(0.02)
        Driver.count -= len(prompts[0])
        return [len(prompts) ** 0.5 / {speed}] * steps
    def greedy(self, tokens, count):
        return tokens[:1] * count
    def logits(self, tokens):
        return np.eye(len(tokens), 8, dtype=np.float32)

def imports(settings):
    assert settings["device"] == "gpu" and settings["batch"] == 2048 and settings["requests"] == 16
    assert settings["context"] > 256
    {before}
    Driver.count += 300
    def opened():
        Driver.count += {weights}
        return Engine()
    return opened

serving.serve(imports)
"""
"""Source of an engine whose GPU is made up: it holds 300 after its imports, and a byte for each token."""


class TestGpu:
    @pytest.fixture
    def found(self, tmp_path: Path, monkeypatch) -> Results:
        """One round of two engines, and of one that has no GPU."""
        for name, speed, weights, before in (
            ("fast", 100, 1000, "pass"),
            ("slow", 50, 4000, "pass"),
            ("none", 50, 4000, "raise RuntimeError('built without a GPU')"),
        ):
            text = STAND_IN.format(folder=str(ENGINES), speed=speed, weights=weights, before=before)
            (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "f.gguf").write_bytes(b"x" * 100)
        monkeypatch.setattr("peers_processes.ENGINES", tmp_path)
        contestants = [
            Contestant(OURS, "refengine", sys.executable, "fast.py"),
            Contestant(FLASH, "llama.cpp", sys.executable, "none.py"),
            Contestant(OTHER, "transformers", sys.executable, "slow.py"),
        ]
        results = Results(GPU_QUICK, 1, {"GPU": "made up"})
        results.engines = {c.name: c.engine for c in contestants}
        subject = Subject("f", tmp_path / "f.gguf", 5000, 100, ((8, None),), tuple(range(100)))
        Comparison(subject, contestants, None, results, device="gpu").run(0, 1)
        return results

    def test_everything_that_a_gpu_is_asked_is_measured(self, found: Results, tmp_path: Path, capsys) -> None:
        for name, speed, weights in ((OURS, 100, 1000), (OTHER, 50, 4000)):
            assert found.median("f", name, "prefill_long") == pytest.approx(speed)
            assert found.median("f", name, "far") == pytest.approx(speed)
            assert found.median("f", name, "crowd_gain") == pytest.approx(4)
            assert found.median("f", name, "device_imports") == 300
            assert found.median("f", name, "device_net") == weights + 128
            assert found.median("f", name, "device_net_far") == weights + 256
        assert found.contestants("f") == [OURS, OTHER]
        assert found.median("f", OURS, "share") is None

    def test_without_llama_cpp_ratios_are_to_transformers(self, found: Results, tmp_path: Path) -> None:
        assert base_of(found) == "transformers"
        (row,) = (line for line in file_table(found, "f") if line.startswith("| decode at 256 tokens"))
        assert cells(row)[1:] == ["100.0", "50.0", "2.00 (2.00 – 2.00)"]
        head, _, row = ratio_table(found, OURS)
        ratios = dict(zip(cells(head), cells(row), strict=True))
        assert ratios["device memory at 256"] == f"{1256 / 4256:.2f}"
        assert ratios["16 at once"] == "2.00"
        pytest.importorskip("matplotlib")
        draw(found, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")

    def test_a_build_without_a_gpu_is_left_out_with_the_reason(
        self, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        TestGpu.found.__wrapped__(self, tmp_path, monkeypatch)
        assert f"{FLASH} is left out: RuntimeError: built without a GPU" in capsys.readouterr().out

    def test_a_llama_cpp_that_cannot_use_gpus_says_so(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "llama_cpp.py").write_text("def llama_supports_gpu_offload(): return False\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        nobody = Contestant(FLASH, "llama.cpp", sys.executable, "serve_llama.py")
        script = "import serving, runpy; serving.Nvml = lambda: type('D', (), {'used': lambda self: 0.0})()\n"
        (tmp_path / "serve_llama.py").write_text(
            f"import sys; sys.path.insert(0, {str(ENGINES)!r})\n{script}"
            f"runpy.run_path({str(ENGINES / 'serve_llama.py')!r}, run_name='__main__')\n"
        )
        monkeypatch.setattr("peers_processes.ENGINES", tmp_path)
        with pytest.raises(EngineFailedError, match="built without a GPU: install a build with CUDA"):
            EngineProcess(nobody, {"threads": 1, "device": "gpu", "first": [1]})

    def test_what_is_not_given_follows_from_the_device(self, monkeypatch) -> None:
        monkeypatch.setattr("sys.argv", ["peers.py", "--device", "gpu"])
        options = peers.parse()
        assert (options.backend, options.transformers_repeat) == ("cupy", None)
        assert list(options.files) == ["llama-2-7b-q4_0"]
        monkeypatch.setattr("sys.argv", ["peers.py"])
        options = peers.parse()
        assert (options.backend, options.transformers_repeat) == ("numba", 2)
        assert "llama-2-7b-q4_0" not in options.files
