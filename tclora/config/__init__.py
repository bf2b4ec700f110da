"""The configuration of a run: one YAML file, validated whole before anything expensive starts.

``tclora config --schema`` prints every field with its unit and meaning. Unknown keys are refused
with the nearest known one, and all problems are reported together.
"""

from tclora.config.evaluation import EvaluateConfig, IntervalConfig, LmEvalConfig, MeasureConfig
from tclora.config.execution import ExecutionConfig, ResourceConfig
from tclora.config.loading import config_keys, load_config, parse_config
from tclora.config.merging import (
    FactoriseConfig,
    GateConfig,
    MergeConfig,
    RouteConfig,
    RouterConfig,
    SolverConfig,
)
from tclora.config.preparation import ClusterConfig, DataConfig, EmbedConfig, FeatureConfig
from tclora.config.run import Config
from tclora.config.training import AdapterConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExecutionConfig",
    "FactoriseConfig",
    "FeatureConfig",
    "GateConfig",
    "IntervalConfig",
    "LmEvalConfig",
    "MeasureConfig",
    "MergeConfig",
    "ResourceConfig",
    "RouteConfig",
    "RouterConfig",
    "SolverConfig",
    "TrainConfig",
    "config_keys",
    "load_config",
    "parse_config",
]
