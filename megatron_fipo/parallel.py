"""The parallel layout as a value: sizes of the axes and this rank's coordinates. Knows no process group."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import require


@dataclass(frozen=True)
class ParallelLayout:
    """World = pp x dp x cp x tp, tp fastest, as Megatron orders ranks ("tp-cp-ep-dp-pp")."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    rank: int = 0

    @staticmethod
    def for_world(
        world_size: int, rank: int, *, tp: int = 1, pp: int = 1, cp: int = 1, sequence_parallel: bool = False
    ) -> ParallelLayout:
        """The layout of `world_size` ranks; what tp, pp and cp leave over is data parallel.

        Raises ValueError naming the flags when they do not divide the number of ranks.
        """
        for flag, size in (
            ("--tensor-model-parallel-size", tp),
            ("--pipeline-model-parallel-size", pp),
            ("--context-parallel-size", cp),
        ):
            require(size >= 1, flag, size, ">= 1")
        require(
            world_size % (tp * pp * cp) == 0,
            "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size",
            tp * pp * cp,
            f"a divisor of the number of ranks ({world_size})",
        )
        require(
            not sequence_parallel or tp > 1, "--sequence-parallel", True, "used with --tensor-model-parallel-size > 1"
        )
        return ParallelLayout(tp, pp, cp, world_size // (tp * pp * cp), sequence_parallel, rank)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.cp * self.dp)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def dp_rank_of(self, rank: int) -> int:
        """The data-parallel coordinate of any rank of this layout."""
        return rank // (self.tp * self.cp) % self.dp
