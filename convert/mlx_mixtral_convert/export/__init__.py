"""Back again: a checkpoint, an MLX folder above all, as a Hugging Face folder or a GGUF file for other programs.

from mlx_mixtral_convert.export import export

report = export("mixtral-4bit", "mixtral.gguf", to="gguf", type="Q4_1")
"""

from mlx_mixtral_convert.export.run import FORMATS, TYPES, ExportReport, export

__all__ = ["FORMATS", "TYPES", "ExportReport", "export"]
