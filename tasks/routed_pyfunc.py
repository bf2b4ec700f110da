"""The routed library as an MLflow pyfunc model; MLflow stores this file and runs it when it loads.

Input: a column ``prompt``. Output: ``completion``, ``known``, ``belonging`` (the share of the
clusters' gates, 0 to 1) and one weight per cluster. A call is a trace (`tasks.traces`). The serving
environment needs tclora; base and embedding model are found by the library's own record, or where
$TCLORA_BASE_MODEL and $TCLORA_EMBEDDER say.
"""

import os
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from tasks.traces import answer

BATCH = 16  # prompts answered together


class RoutedPyfunc(PythonModel):
    """Answers prompts by a routed library."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base model, library and embedding model."""
        import tclora

        self._model = tclora.load(
            context.artifacts["library"],
            os.environ.get("TCLORA_BASE_MODEL"),
            embedder=os.environ.get("TCLORA_EMBEDDER"),
        )

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer the prompts of a frame, in its order."""
        prompts = model_input["prompt"].tolist()
        limit = int((params or {}).get("max_new_tokens", 64))
        answers = answer(self._model, prompts, limit, BATCH)
        rows = [
            {"completion": a.text, "known": a.known, "belonging": a.belonging} | a.weights
            for a in answers
        ]
        return pd.DataFrame(rows, index=model_input.index)


set_model(RoutedPyfunc())
