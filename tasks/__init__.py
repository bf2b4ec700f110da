"""Thin Prefect tasks, one per stage: load, one call into `tclora`, save, log to MLflow."""
