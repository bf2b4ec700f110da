"""Logging the routed library to MLflow, as a model that ``mlflow models serve`` runs."""

import tempfile
import warnings
from pathlib import Path

from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

import tclora
from tasks.logged_models import (
    begin_model,
    record_model,
    register_model,
    store_model,
    stored_model,
)
from tasks.tracking import Run
from tclora.config import Config

_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, 64)]),
)


def log_routed(run: Run, library: Path, digest: str, config: Config) -> str:
    """Log and register the routed library; equal bytes are stored once.

    Returns
    -------
    str
        The logged model's id.
    """
    model_id = stored_model(run, "routed", digest)
    if model_id is None:
        with tempfile.TemporaryDirectory(prefix="tclora-pyfunc-") as scratch:
            folder = Path(scratch) / "model"
            model_id = begin_model(run, "routed", digest, "tclora-routed")
            save_pyfunc(library, folder, model_id)
            store_model(run, folder, model_id)
    record_model(run, model_id)
    register_model(run, model_id, f"{config.name}-routed")
    return model_id


def save_pyfunc(library: Path, target: Path, model_id: str | None = None) -> None:
    """Write a routed library as an MLflow pyfunc model directory; its traces name the model."""
    with warnings.catch_warnings():  # of type hints, MLflow's own ones among them
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(Path(__file__).with_name("routed_pyfunc.py")),
            artifacts={"library": str(library)},
            signature=_SIGNATURE,
            mlflow_model=Model(model_id=model_id),
            pip_requirements=[f"tclora=={tclora.__version__}"],
        )
