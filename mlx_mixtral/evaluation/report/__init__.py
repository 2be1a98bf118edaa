"""A section for a model card: what was measured of a checkpoint, as Markdown and plots to publish with its weights."""

from mlx_mixtral.evaluation.report.contents import PLOTS, Contents, Run
from mlx_mixtral.evaluation.report.section import SECTION_FILE, report_files

__all__ = ["PLOTS", "SECTION_FILE", "Contents", "Run", "report_files"]
