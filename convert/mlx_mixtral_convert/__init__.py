"""Convert Mixtral checkpoints to MLX.

from mlx_mixtral_convert import Recipe, convert

report = convert("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-4bit", recipe=Recipe(bits=4))
"""

from mlx_mixtral_convert.calibration import Calibration, CalibrationProgress, calibrate
from mlx_mixtral_convert.conversion import convert
from mlx_mixtral_convert.packing.measure import MatrixError
from mlx_mixtral_convert.progress import Progress
from mlx_mixtral_convert.recipes import NAMED, Recipe, named_recipe
from mlx_mixtral_convert.report import ConversionReport, PackedAs, PartSize
from mlx_mixtral_convert.verification import Problem, VerifyReport, verify

__all__ = [
    "NAMED",
    "Calibration",
    "CalibrationProgress",
    "ConversionReport",
    "MatrixError",
    "PackedAs",
    "PartSize",
    "Problem",
    "Progress",
    "Recipe",
    "VerifyReport",
    "calibrate",
    "convert",
    "named_recipe",
    "verify",
]
