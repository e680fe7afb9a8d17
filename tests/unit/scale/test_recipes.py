"""The recipes of docs/cluster: they parse, and the programs in them have the flags they use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qll.cli import VERBS, _parse

ROOT = Path(__file__).parents[3]
MANIFEST, SCRIPT = ROOT / "docs/cluster/qll.yaml", ROOT / "docs/cluster/qll.sbatch"


def commands() -> list[list[str]]:
    """The command of every container of the manifest."""
    found = []
    for item in yaml.safe_load_all(MANIFEST.read_text()):
        if item["kind"] != "Service":
            found += [box["command"] for box in item["spec"]["template"]["spec"]["containers"]]
    return found


@pytest.fixture(scope="module")
def dask_help() -> dict[str, str]:
    """What `dask scheduler --help` and `dask worker --help` print."""
    code = "from distributed.cli.dask_{0} import main; main(['--help'])"
    return {
        name: subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True
        ).stdout
        for name in ("scheduler", "worker")
    }


def test_flags_of_dask_exist(dask_help):
    script = SCRIPT.read_text().replace("\\\n", " ")
    lines = [words[1:] for words in commands() if words[0] == "dask"]
    lines += [line.split() for line in re.findall(r'BIN/dask" (.*?) &', script)]
    assert len(lines) == 4
    for name, *words in lines:
        for flag in (word for word in words if word.startswith("--")):
            assert flag in dask_help[name], (name, flag)


def test_our_own_command_lines_parse():
    lines = [words[1:] for words in commands() if words[0] == "qll"]
    script = SCRIPT.read_text().replace("\\\n", " ")
    lines += [line.split() for line in re.findall(r'BIN/qll" (.*)', script)]
    assert len(lines) == 2
    for verb, *words in lines:
        given = {'"$LLAMA_DIR"': "/l", '"$OUT"': "/o", '"$KEEP"': "0.6", '"$FILE"': "tcp://a:1"}
        config = _parse(VERBS[verb], verb, [given.get(word, word) for word in words])
        assert config.scale.dask is not None
        assert config.convert.keep == 0.6


def test_the_batch_script_is_a_script():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_a_restarted_pod_is_the_same_host():
    job = [item for item in yaml.safe_load_all(MANIFEST.read_text()) if item["kind"] == "Job"]
    assert job[0]["spec"]["template"]["spec"]["hostname"]
