"""Commands that load no model import none of the libraries that take seconds to import."""

import json
import subprocess
import sys

import pytest
import torch

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.library.manifest import write_manifest
from tests.library.examples import describe
from tests.route.conftest import *  # noqa: F403

HEAVY = {"transformers", "peft", "prefect", "mlflow", "sentence_transformers", "sklearn"}
CODE = """
import json, sys
from tclora_cli.main import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture
def places(tmp_path, library):
    for name in ("a", "b"):
        factors = LoraFactors(torch.ones(6, 2), torch.ones(2, 5))
        write_adapter(Adapter(name, {"layer.q_proj": factors}, "base"), tmp_path / name)
    (tmp_path / "whole" / "adapters").mkdir(parents=True)
    (tmp_path / "whole" / "adapters" / "file").write_text("bytes")
    whole = tmp_path / "whole"
    write_manifest(whole, describe(), ["adapters"])
    return {
        "merge": [tmp_path / "a", tmp_path / "b", "-o", tmp_path / "merged"],
        "inspect": [tmp_path / "a", tmp_path / "b"],
        "methods": [],
        "verify": [tmp_path / "whole"],
        "export": [library, "-o", tmp_path / "exported", "--cluster", "0"],
    }


@pytest.mark.parametrize("command", ["merge", "inspect", "methods", "verify", "export"])
def test_a_command_without_a_model_imports_what_it_uses(places, command):
    arguments = [command, *map(str, places[command])]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "tclora_cli" in loaded
    assert loaded & HEAVY == set()
