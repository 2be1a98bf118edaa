"""Records what ``calibrate`` measures of the bundled checkpoint, sensitivities included: half a minute of work.

python tests/goldens/record_calibration.py

Writes ``tiny-mixtral/calibration``. ``tests/convert/calibration/test_expected_loss.py`` compares what it predicts with
measurements, and measures part of it again.
"""

from pathlib import Path

from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import calibrate

PLACE = Path(__file__).parent / "tiny-mixtral" / "calibration"

if __name__ == "__main__":
    calibrate(checkpoint_path(), tokens=4096, sensitivities=True, save=PLACE)
