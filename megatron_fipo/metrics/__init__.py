"""Logs, tables and plots of a run: metrics.jsonl, TensorBoard, the live display, curves.png."""

from megatron_fipo.metrics.records import read_metrics
from megatron_fipo.metrics.run_logger import RunLogger
from megatron_fipo.metrics.timings import timings_table

__all__ = ["RunLogger", "read_metrics", "timings_table"]
