"""MLflow datasets: which rows a run was made of, by digest, schema and source; not the rows."""

import pandas as pd
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import DatasetInput, InputTag


def dataset_of(frame: pd.DataFrame, source: str, name: str, context: str) -> DatasetInput:
    """Describe rows for ``log_inputs``, and for the metrics that were measured on them.

    Parameters
    ----------
    frame : DataFrame
        Columns prompt and response count.
    source : str
        Where they are from.
    name : str
        Of the dataset.
    context : {"training", "evaluation"}
        What they are for.
    """
    texts = frame[["prompt", "response"]].astype("string")
    origin = CodeDatasetSource(tags={"tclora.data": source})
    dataset = from_pandas(texts, source=origin, name=name)
    return DatasetInput(
        dataset=dataset._to_mlflow_entity(),
        tags=[InputTag(key="mlflow.data.context", value=context)],
    )
