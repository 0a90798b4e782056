"""Problems: seeded endless tasks and prompt files, and their way to token ids."""

from megatron_fipo.data.build import make_sources as make_sources
from megatron_fipo.data.build import read_evaluation as read_evaluation
from megatron_fipo.data.prompts import Tokenizer as Tokenizer
from megatron_fipo.data.prompts import tokenize_problem as tokenize_problem
from megatron_fipo.data.source import ProblemSource as ProblemSource
