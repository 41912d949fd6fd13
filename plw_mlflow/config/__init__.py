"""The options of each entry point, as frozen dataclasses. Other packages import them from here.

`options` has the sets of options, `entry_points` the configs that are put together from them, `presets` the recipes,
and `values` how values are spelt and named.
"""

from plw_mlflow.config.entry_points import (
    CONFIGS,
    LISTABLE,
    AdviseConfig,
    AnalyzeConfig,
    Config,
    EvaluateConfig,
    MainConfig,
    PrepareConfig,
    SweepConfig,
    TrainConfig,
    VerifyConfig,
    idle_options,
    without_effect,
)
from plw_mlflow.config.options import (
    BY_PRESET,
    HELD_OUT,
    MEASURES,
    TEXT_FIELDS,
    CellOptions,
    DataOptions,
    DivisorScope,
    LossDivisor,
    Method,
    Options,
    Preset,
    RecipeOptions,
    ScoreOptions,
    WeightOptions,
    cache_folder,
    recorded_data_options,
)
from plw_mlflow.config.presets import MODELS, PRESETS
from plw_mlflow.config.values import (
    DATA_FILE_ENDINGS,
    HUB_ID,
    IN_DATA_NAME,
    UNSET,
    counted,
    data_name,
    digest,
    flag,
    short_name,
    shown_name,
    spell,
    split_list,
)
