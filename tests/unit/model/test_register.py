"""How transformers finds our classes, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({folder!r})
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("opened without the package")
assert "qll" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
print()  # ends the question that was asked
print(type(model).__module__, type(model).__name__)
model.save_pretrained({out!r})
"""

WITH = """
import sys
import qll
assert not {{"torch", "transformers"}} & set(sys.modules), "import qll must be light"
from transformers import AutoConfig, AutoModelForCausalLM
assert "qll.model" not in sys.modules, "nothing is registered before it is needed"
before = AutoConfig.from_pretrained
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model).__module__, type(model).__name__)
assert AutoConfig.from_pretrained.__func__ is before.__func__.__wrapped__, "not put back"
assert type(AutoConfig.from_pretrained({dense!r})).__name__ == "LlamaConfig"

# here and not beside the other tests of layers: their type checker is in the compiler's way
import torch
attention = model.model.layers[0].self_attn
hidden = torch.randn(1, 3, 64)
for name in ("q_proj", "k_proj", "o_proj"):
    layer = attention.get_submodule(name)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden), layer(hidden))
"""


def run(code, tmp_path):
    """Output of `code` in a new process that cannot ask questions on a terminal."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1].split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.conftest import make_tiny_llama
    from tests.unit.model.conftest import write_folder

    return write_folder(tmp_path_factory.mktemp("reg") / "folder", make_tiny_llama(tied=True))


def test_without_the_package_it_fails_and_with_trust_it_opens(folder, tmp_path):
    code = WITHOUT.format(folder=str(folder), out=str(tmp_path / "saved"))
    assert run(code, tmp_path) == ["qll.model.llama_tn", "LlamaTNForCausalLM"]
    code_files = sorted(path.name for path in (tmp_path / "saved").glob("*.py"))
    assert code_files == ["modeling_qll.py"]


def test_import_of_the_package_is_enough(folder, tmp_path):
    dense = str(folder.with_name("folder_dense"))
    found = run(WITH.format(folder=str(folder), dense=dense), tmp_path)
    assert found == ["qll.model.llama_tn", "LlamaTNForCausalLM"]
