"""Calibration: what a text shows about the inputs of every matrix, and what packing each would cost."""

from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.calibration.place import check_place
from mlx_mixtral_convert.calibration.progress import CalibrationProgress
from mlx_mixtral_convert.calibration.run import calibrate

__all__ = ["Calibration", "CalibrationProgress", "calibrate", "check_place"]
