"""A finished conversion on the hub, with a model card.

from mlx_mixtral_convert.upload import upload

report = upload("mixtral-4bit", "you/Mixtral-8x7B-Instruct-v0.1-4bit-mlx")
"""

from mlx_mixtral_convert.upload.run import UploadReport, upload

__all__ = ["UploadReport", "upload"]
