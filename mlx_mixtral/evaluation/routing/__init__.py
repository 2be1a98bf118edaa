"""What a model's experts do: the routing analysis of section 5 of "Mixtral of Experts" (arXiv 2401.04088)."""

from mlx_mixtral.evaluation.routing.analysis import DomainRouting, Estimate, RoutingAnalysis, analyse
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.evaluation.routing.recording import record_texts

__all__ = [
    "DomainRouting",
    "Estimate",
    "RoutingAnalysis",
    "RoutingRecord",
    "analyse",
    "record_texts",
]
