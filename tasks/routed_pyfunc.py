"""The routed library as an MLflow pyfunc model; MLflow stores this file and runs it when it loads.

Input: a column ``prompt``. Output: ``completion``, ``known`` and one weight per cluster. The
serving environment needs tclora; the base model is found by the library's own record, or where
$TCLORA_BASE_MODEL says.
"""

import os
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class RoutedPyfunc(PythonModel):
    """Answers prompts by a routed library."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base model, library and embedding model."""
        import tclora

        base = os.environ.get("TCLORA_BASE_MODEL")
        self._model = tclora.load(context.artifacts["library"], base)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer the prompts of a frame, in its order."""
        answers = self._model.generate(
            model_input["prompt"].tolist(),
            max_new_tokens=int((params or {}).get("max_new_tokens", 64)),
        )
        rows = [{"completion": a.text, "known": a.known} | a.weights for a in answers]
        return pd.DataFrame(rows, index=model_input.index)


set_model(RoutedPyfunc())
