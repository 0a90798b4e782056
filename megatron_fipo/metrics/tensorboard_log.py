"""TensorBoard: a run's numbers under their own names, steps and updates as two runs since their x axes differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_fipo.metrics.histograms import SUFFIX, Histogram, histogram_of
from megatron_fipo.metrics.records import SURROGATES

UPDATES_DIR = "updates"
PLAIN = (bool, int, float, str)
COMPARED = ("eval/accuracy", "accuracy", "score/mean", "response_length/mean")  # beside the hyper-parameters


class TensorBoardLog:
    """Writers of what belongs to steps (`directory`) and to updates (`directory`/updates).

    On resume TensorBoard is told to forget what came after step `resume_step` and after `num_updates` updates.
    """

    def __init__(self, directory: Path, *, resume_step: int | None, num_updates: int) -> None:
        resumed = resume_step is not None
        self._steps = SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)
        self._updates = SummaryWriter(str(directory / UPDATES_DIR), purge_step=num_updates + 1 if resumed else None)

    def add(self, record: Mapping[str, Any], step: int) -> None:
        """Every number of a step's record, and NAME_histogram as histograms/NAME; lists are for the file alone."""
        _add(self._steps, record, step)

    def add_update(self, record: Mapping[str, Any], update: int) -> None:
        """The same of one optimizer update, at the update's number counted from 1."""
        _add(self._updates, record, update)

    def add_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Histograms of a step as histograms/NAME."""
        for name, histogram in histograms.items():
            _add_histogram(self._steps, name, histogram, step)
        self._steps.flush()

    def add_texts(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Sampled texts, as indented JSON."""
        for index, sample in enumerate(samples):
            text = json.dumps(sample, indent=2, ensure_ascii=False)
            self._steps.add_text(f"samples/{index}", _verbatim(text), step)
        self._steps.flush()

    def add_config(self, config: Mapping[str, Any], text: str) -> None:
        """The run's settings, for the table of hyper-parameters and as a text."""
        shown = {name: value if isinstance(value, PLAIN) else json.dumps(value) for name, value in config.items()}
        for summary in hparams(shown, dict.fromkeys(COMPARED, 0.0)):
            self._steps.file_writer.add_summary(summary)
        self._steps.add_text("config", _verbatim(text))
        self._steps.flush()

    def close(self) -> None:
        """Flush and close both writers."""
        self._steps.close()
        self._updates.close()


def _add(writer: SummaryWriter, record: Mapping[str, Any], step: int) -> None:
    for key, value in record.items():
        if isinstance(value, Mapping) and key.endswith(SUFFIX):
            histogram = histogram_of(key, value)
            if histogram is not None:
                _add_histogram(writer, key.removesuffix(SUFFIX), histogram, step)
        elif key != "step" and isinstance(value, (int, float)):
            writer.add_scalar(key, value, step)
    writer.flush()


def _add_histogram(writer: SummaryWriter, name: str, histogram: Histogram, step: int) -> None:
    writer.add_histogram_raw(
        f"histograms/{name}",  # a tag is either a number's or a histogram's
        min=histogram.edges[0],
        max=histogram.edges[-1],
        num=sum(histogram.counts),
        sum=histogram.total,
        sum_squares=histogram.total_of_squares,
        bucket_limits=histogram.edges[1:],
        bucket_counts=histogram.counts,
        global_step=step,
    )


def _verbatim(text: str) -> str:
    """Markdown shows an indented block as it is. Half a surrogate pair, which an event file cannot hold, is spelled."""
    encodable = text.encode("utf-8", SURROGATES).decode("utf-8")
    return "\n".join("    " + line for line in encodable.splitlines())
