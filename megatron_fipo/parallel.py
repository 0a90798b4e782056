"""The parallel layout as a value: sizes of the axes and this rank's coordinates. Knows no process group."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import require


@dataclass(frozen=True)
class ParallelLayout:
    """World = pp x dp x cp x tp, tp fastest, as Megatron orders ranks ("tp-cp-ep-dp-pp").

    Experts of a mixture-of-experts model are laid out over the same ranks of a stage as dp_expert x ep x etp, etp
    fastest: ep shares of the experts, each cut into etp tensor-parallel parts. `vpp` is how many chunks of layers every
    pipeline rank holds (interleaved 1F1B); chunk c of rank r is stage c * pp + r.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    rank: int = 0
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    @staticmethod
    def for_world(
        world_size: int,
        rank: int,
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        sequence_parallel: bool = False,
        vpp: int = 1,
        ep: int = 1,
        etp: int | None = None,
    ) -> ParallelLayout:
        """The layout of `world_size` ranks; what tp, pp and cp leave over is data parallel. etp None: tp.

        Raises ValueError naming the flags when they do not divide the number of ranks.
        """
        etp = tp if etp is None else etp
        for flag, size in (
            ("--tensor-model-parallel-size", tp),
            ("--pipeline-model-parallel-size", pp),
            ("--context-parallel-size", cp),
            ("--expert-model-parallel-size", ep),
            ("--expert-tensor-parallel-size", etp),
            ("--num-virtual-stages-per-pipeline-rank", vpp),
        ):
            require(size >= 1, flag, size, ">= 1")
        require(
            world_size % (tp * pp * cp) == 0,
            "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size",
            tp * pp * cp,
            f"a divisor of the number of ranks ({world_size})",
        )
        require(
            ep == 1 or world_size % (etp * ep * pp) == 0,
            "--expert-tensor-parallel-size x --expert-model-parallel-size x --pipeline-model-parallel-size",
            etp * ep * pp,
            f"a divisor of the number of ranks ({world_size})",
        )
        require(
            not sequence_parallel or tp > 1, "--sequence-parallel", True, "used with --tensor-model-parallel-size > 1"
        )
        require(
            vpp == 1 or pp > 1,
            "--num-virtual-stages-per-pipeline-rank",
            vpp,
            "1 without --pipeline-model-parallel-size",
        )
        dp = world_size // (tp * pp * cp)
        return ParallelLayout(tp, pp, cp, dp, sequence_parallel, rank, vpp, ep, etp)

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

    @property
    def ep_rank(self) -> int:
        return self.rank // self.etp % self.ep

    @property
    def etp_rank(self) -> int:
        return self.rank % self.etp
