"""Fixtures for all tests: a tiny real causal LM with its tokenizer, built here, and no network."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

# What is imported stays; see `tclora.imports`. Collection is on again before the first test.
gc.disable()

# Libraries read these when they are imported; `tests` must not share anything with real runs.
SCRATCH = Path(tempfile.mkdtemp(prefix="tclora-tests-"))
os.environ |= {
    "COLUMNS": "200",  # of tables on the terminal
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_CACHE": str(SCRATCH / "datasets"),
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(SCRATCH / "prefect-results"),
    "TOKENIZERS_PARALLELISM": "false",
}
for name in (
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING",
):  # fmt: skip
    os.environ.pop(name, None)
# What is computed again alone, with more threads than before, would be rounded otherwise; and
# threads of several workers on one core wait for each other within every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

if importlib.util.find_spec("absl"):
    # rouge-score imports it; its handler closes the stream that it had at first whenever logging is
    # configured anew, as MLflow does, and that stream would be pytest's.
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDS = {"pad_token": "<pad>", "eos_token": "</s>"}
SPECIAL = ("<pad>", "</s>", "<user>", "<assistant>")


def pytest_collection_modifyitems(items):
    """Put files first that may take long, then those of many tests, so that workers end at once.

    With xdist's `--no-loadscope-reorder`; by itself it begins with the files of most tests.
    """
    tests = Counter(item.path for item in items)
    served = {item.path for item in items if "prefect_server" in item.fixturenames}
    limits = Counter()
    for item in items:
        marker = item.get_closest_marker("timeout")
        limits[item.path] = max(limits[item.path], marker.args[0] if marker else 0)
    items.sort(key=lambda i: (-limits[i.path], i.path not in served, -tests[i.path]))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    shutil.rmtree(SCRATCH, ignore_errors=True)


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(letters=BYTES, merges=(), parts=None):
    """Byte-level: every text round-trips, and one byte is one token; or what else is given."""
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = parts or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=list(SPECIAL[2:]), **ENDS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def single_precision():
    """Weights are fp32 wherever their type is left open, also on CPUs where bf16 is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tokenizer):
    """A saved causal LM with random weights, large enough that its logits differ clearly."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.15, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_dir):
    """A fresh copy of the tiny model, to be changed freely."""
    return LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="session")
def prefect_server():
    """A Prefect server of its own, with an empty database; as for ours, flows have no heartbeats.

    They would cost up to a second at every flow's end; see `tclora_cli.server`.
    """
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=90),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
