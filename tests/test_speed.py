"""speed/step.py compares two programs that give the same."""
import json
import subprocess
import sys

from tests.world import ROOT


def test_the_benchmark_compares_what_gives_the_same(tmp_path):
    options = "--shape tiny --prompt 40 --completion 4 --group 2 --repeats 1 --threads 1 --device cpu"
    command = [sys.executable, ROOT / "speed/step.py", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    proof = result["proof"]
    assert proof["equal"]
    assert proof["iou"] >= 0.99
    assert proof["errors"]["gradients"] < 1e-4
    assert set(result["parts"]) == {"rollout", "policy", "reference", "masks", "whole"}
    for part in result["parts"].values():
        assert part["ratio"] > 0
        assert part["memory_ratio"]
