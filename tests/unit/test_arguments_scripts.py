"""Launch scripts for pretraining with Megatron-LM, converted step by step as the guide says, and what their flags then
mean."""

from __future__ import annotations

import difflib
import re
import subprocess
from pathlib import Path

import pytest

from megatron_fipo.arguments import Settings, parse_arguments
from megatron_fipo.flags.table import all_options
from megatron_fipo.plan_arguments import parse_plan, plan_given_layout

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "megatron"
GUIDE = EXAMPLES / "pretrain_to_fipo.md"
SCRIPTS = Path(__file__).with_name("launch_scripts")


def converted(script: str) -> str:
    """A script after the guide's steps: the entry point, the data out, FIPO's flags last, all by the guide's words."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", GUIDE.read_text(encoding="utf-8"))
    entry = next(block for block in blocks if "megatron_fipo.launch" in block).strip()
    flags = next(block for block in blocks if block.startswith("FIPO_ARGS=("))
    before, launcher, command = script.rpartition("torchrun ")
    assert launcher, "no torchrun in the script"
    distributed, _, arguments = command.partition("pretrain_gpt.py")
    assert entry.count("${DISTRIBUTED_ARGS[@]}") == 1
    command = entry.replace("${DISTRIBUTED_ARGS[@]}", distributed.strip()) + arguments
    command = re.sub(r"[ \t]*\$\{?DATA_ARGS(\[@\]\})? \\\n", "", command).rstrip()
    return f"{before}{flags}\n{command} \\\n    ${{FIPO_ARGS[@]}}\n"


def program_words(script: str, tmp_path: Path, *more: str, **environment: str) -> list[str]:
    """What the script's command line hands to the program, with `more` at its end."""
    path = tmp_path / "script.sh"
    path.write_text(script.rstrip() + " " + " ".join(more) + "\n", encoding="utf-8")
    run_it = 'python() { printf "%s\\0" "$@"; }; source "$@"'
    ran = subprocess.run(
        ["bash", "-c", run_it, "bash", str(path), "ckpt", "tb", "model", "prompts.jsonl"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_CHECKPOINT": "model", "PROMPT_DATA": "prompts.jsonl", **environment},
    )
    words = ran.stdout.split("\0")[:-1]
    launcher = words[: words.index("megatron_fipo.train") + 1]
    assert launcher[:2] == ["-m", "megatron_fipo.launch"]
    assert launcher[-2] == "-m"
    assert "--nproc_per_node" in launcher
    return words[len(launcher) :]


def parse(name: str, tmp_path: Path, *more: str) -> Settings:
    script = (SCRIPTS / f"{name}.sh").read_text(encoding="utf-8")
    return parse_arguments(program_words(converted(script), tmp_path, *more))


def noted(settings: Settings) -> list[str]:
    """The flags that notes are about, in order."""
    return [note.split()[0] for note in settings.notes]


def test_llama_in_fp8_keeps_its_layout_and_precision(tmp_path: Path) -> None:
    settings = parse("llama3_8b_fp8", tmp_path)
    megatron = settings.megatron
    assert (megatron.tensor_model_parallel_size, megatron.context_parallel_size) == (2, 2)
    assert megatron.sequence_parallel
    assert megatron.bf16
    assert megatron.transformer_impl == "transformer_engine"
    assert megatron.adam_beta2 == 0.95
    assert megatron.transformer == {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "gated_linear_unit": True,
        "attention_backend": "fused",
        "add_bias_linear": False,
        "fp8": "hybrid",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "cp_comm_type": "p2p",
        "tp_comm_overlap": True,
    }
    assert megatron.ddp == {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "grad_reduce_in_fp32": False,
    }
    assert "--fp8-param-gather" in noted(settings)
    assert settings.run.async_save
    assert settings.run.distributed_timeout_minutes == 60
    assert (settings.run.save, settings.run.load, settings.run.auto_resume) == ("ckpt", None, True)
    assert settings.run.tensorboard_dir == "tb"


def test_what_fipo_says_last_counts(tmp_path: Path) -> None:
    for name in ("llama3_8b_fp8", "qwen3_30b_a3b", "llama2_7b_old_style"):
        settings = parse(name, tmp_path)
        assert (settings.megatron.lr, settings.megatron.lr_warmup_iters) == (1e-6, 10)
        assert settings.run.train_iters == 200
        assert settings.data.prompt_data == "prompts.jsonl"
        assert settings.run.hf_checkpoint == "model"
        assert settings.batch.global_batch_size == 256


def test_each_flag_without_a_meaning_is_noted_once(tmp_path: Path) -> None:
    assert noted(parse("llama3_8b_fp8", tmp_path)) == [
        "--init-method-std",
        "--micro-batch-size",
        "--train-samples",
        "--lr-decay-samples",
        "--lr-warmup-samples",
        "--min-lr",
        "--decoupled-lr",
        "--decoupled-min-lr",
        "--lr-decay-style",
        "--cross-entropy-loss-fusion",
        "--manual-gc",
        "--manual-gc-interval",
        "--empty-unused-memory-level",
        "--exit-duration-in-mins",
        "--overlap-param-gather",
        "--ddp-average-in-collective",
        "--fp8-param-gather",
        "--tp-comm-overlap-cfg",
        "--log-interval",
        "--eval-iters",
        "--log-throughput",
        "--profile",
        "--profile-step-start",
        "--profile-step-end",
        "--profile-ranks",
        "--dist-ckpt-strictness",
        "--load",
    ]


def test_experts_keep_their_layout_and_lose_their_balancing_loss(tmp_path: Path) -> None:
    settings = parse("qwen3_30b_a3b", tmp_path)
    megatron = settings.megatron
    assert (megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size) == (8, 1)
    assert (megatron.pipeline_model_parallel_size, megatron.num_layers_per_virtual_pipeline_stage) == (4, 6)
    experts = {name: value for name, value in megatron.transformer.items() if "moe" in name}
    assert experts == {
        "num_moe_experts": 128,
        "moe_ffn_hidden_size": 768,
        "moe_router_topk": 8,
        "moe_router_dtype": "fp32",
        "moe_router_score_function": "softmax",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_layer_recompute": True,
    }
    notes = "\n".join(settings.notes)
    assert "--moe-aux-loss-coeff 1e-3 has no effect: a policy is trained on its policy loss alone" in notes
    assert "--moe-router-load-balancing-type aux_loss has no effect: no loss balances the experts" in notes
    assert "--moe-token-dispatcher-type flex has no effect: alltoall is used, which computes the same" in notes
    assert "--sequence-parallel has no effect: --tensor-model-parallel-size is 1" in notes
    assert "--moe-layer-freq" not in notes
    assert not megatron.sequence_parallel


def test_on_a_cpu_what_only_speeds_up_transformer_engine_is_noted(tmp_path: Path) -> None:
    settings = parse("qwen3_30b_a3b", tmp_path, "--transformer-impl", "local")
    assert "moe_grouped_gemm" not in settings.megatron.transformer
    assert "moe_permute_fusion" not in settings.megatron.transformer
    assert {"--moe-grouped-gemm", "--moe-permute-fusion"} <= set(noted(settings))
    settings = parse("llama3_8b_fp8", tmp_path, "--transformer-impl", "local")
    assert settings.megatron.transformer["fp8"] == "hybrid"  # another precision is not a matter of speed
    assert "tp_comm_overlap" not in settings.megatron.transformer


def test_an_old_script_of_strings_is_understood(tmp_path: Path) -> None:
    settings = parse("llama2_7b_old_style", tmp_path)
    megatron = settings.megatron
    assert megatron.transformer["recompute_granularity"] == "full"
    assert (megatron.transformer["recompute_method"], megatron.transformer["recompute_num_layers"]) == ("uniform", 1)
    assert megatron.model["position_embedding_type"] == "rope"
    assert megatron.ddp["grad_reduce_in_fp32"] is True
    assert (settings.run.seed, megatron.adam_beta2) == (42, 0.95)
    assert {"--no-query-key-layer-scaling", "--data-impl"} & set(noted(settings)) == {"--no-query-key-layer-scaling"}
    assert {"--rampup-batch-size", "--initial-loss-scale", "--finetune", "--exit-interval"} <= set(noted(settings))


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (
            ["--fp16", "--ckpt-format", "zarr"],
            ["--fp16 is a Megatron-LM flag", "use --bf16", "--ckpt-format is 'zarr'"],
        ),
        (["--hidden-dropout", "0.1"], ["--hidden-dropout is 0.1", "0: with dropout the log-probs"]),
        (["--moe-expert-capacity-factor", "1.0"], ["no token is dropped"]),
        (["--decoder-first-pipeline-num-layers", "3"], ["every pipeline stage has the same number of layers"]),
        (["--optimizer-cpu-offload"], ["--offload-trainer"]),
        (["--global-batch-size", "1024"], ["--global-batch-size is 1024", "256 = --rollout-batch-size (128)"]),
    ],
)
def test_what_would_train_something_else_is_an_error(more: list[str], fragments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        parse("llama2_7b_old_style", tmp_path, *more)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_values_that_contradict_each_other_are_named_all_at_once(tmp_path: Path) -> None:
    more = ["--global-batch-size", "1536", "--seq-length", "2048", "--max-position-embeddings", "2048"]
    more += ["--overlong-buffer-len", "4000", "--attention-dropout", "0.1"]
    with pytest.raises(ValueError) as raised:
        parse("llama2_7b_old_style", tmp_path, *more)
    assert [problem.partition(", but must be ")[0] for problem in str(raised.value).split("; ")] == [
        "--attention-dropout is 0.1",
        "--global-batch-size is 1536",
        "--seq-length is 2048",
        "--max-position-embeddings is 2048",
    ]
    with pytest.raises(ValueError, match="; --overlong-buffer-len is 4000, but must be <= --rollout-max-response-len"):
        parse("llama2_7b_old_style", tmp_path, *more[:-2])  # compared once every value is sound by itself


def test_a_rate_and_a_warm_up_of_pretraining_are_noted(tmp_path: Path) -> None:
    more = ["--lr", "3e-4", "--lr-warmup-iters", "2000", "--save-interval", "10000"]
    notes = parse("llama2_7b_old_style", tmp_path, *more).notes
    assert "--lr 0.0003 is a rate for pretraining: a policy is usually trained at 1e-6" in notes
    assert any(note.startswith("--lr-warmup-iters 2000: the run makes 1600 updates") for note in notes)
    assert any(note.startswith("--save-interval 10000 counts steps, of which the run makes 200") for note in notes)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "moe", "bogus"],
            "--recompute-modules is 'bogus'",
        ),
        (
            [
                "--moe-layer-recompute",
                *"--recompute-granularity full --recompute-method block --recompute-num-layers 1".split(),
            ],
            "--moe-layer-recompute is True, but must be absent with --recompute-granularity full",
        ),
        (["--exp-avg-dtype", "bf16"], "--exp-avg-dtype is 'bf16', but must be fp32 without --use-precision-aware-opti"),
        (["--main-params-dtype", "fp16"], "--main-params-dtype is 'fp16', but must be fp32 without --use-precision-aw"),
    ],
)
def test_what_megatron_core_would_not_take_is_an_error_of_the_flags(more: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(problem)):
        parse_arguments(["--hf-checkpoint", "model", "--task", "chain_sum", *more])


def test_what_is_off_is_off_and_what_trains_nothing_is_noted() -> None:
    base = ["--hf-checkpoint", "model", "--task", "chain_sum"]
    settings = parse_arguments([*base, "--wandb-project", "", "--wandb-exp-name", "mine"])
    assert (settings.run.wandb_project, settings.run.wandb_exp_name) == (None, None)
    assert settings.notes == ("--wandb-exp-name has no effect without --wandb-project",)
    assert parse_arguments([*base, "--lr", "0"]).notes == ("--lr 0 trains nothing",)
    groups = ["--moe-router-num-groups", "1", "--moe-router-group-topk", "1"]
    assert parse_arguments([*base, *groups, "--moe-router-topk-scaling-factor", "1.0"]).notes == ()
    with pytest.raises(
        ValueError, match="--moe-router-topk-scaling-factor is a Megatron-LM flag that is not supported"
    ):
        parse_arguments([*base, "--moe-router-topk-scaling-factor", "2.5"])
    (note,) = parse_arguments([*base, "--no-load-optim"]).notes
    assert "--load goes on with optimizer, random states and step" in note


def test_the_history_of_delayed_scaling_says_nothing_of_other_fp8_recipes(tmp_path: Path) -> None:
    settings = parse("llama3_8b_fp8", tmp_path, "--fp8-recipe", "blockwise", "--fp8-margin", "0")
    assert {name for name in settings.megatron.transformer if "fp8" in name} == {"fp8", "fp8_recipe"}
    note = "--fp8-amax-history-len has no effect: --fp8-recipe blockwise keeps no history"
    assert note in settings.notes
    assert {"--fp8-margin", "--fp8-amax-compute-algo"} <= set(noted(settings))
    settings = parse("llama3_8b_fp8", tmp_path, "--fp8-recipe", "delayed")
    assert settings.megatron.transformer["fp8_amax_history_len"] == 1024


def test_a_note_does_not_repeat_a_whole_blend_of_data() -> None:
    blend = [word for i in range(200) for word in ("0.005", f"shard_{i}_text_document")]
    (note,) = parse_arguments(["--hf-checkpoint", "model", "--task", "chain_sum", "--data-path", *blend]).notes
    assert note.startswith("--data-path 0.005 shard_0_text_document 0.005")
    assert note.endswith("... has no effect: problems come from --task or --prompt-data")
    assert len(note) < 120


def test_loading_from_where_one_saves_is_resuming_unless_it_must_exist() -> None:
    base = ["--hf-checkpoint", "model", "--task", "chain_sum", "--save", "ckpt/"]
    run = parse_arguments([*base, "--load", "ckpt"]).run
    assert (run.load, run.auto_resume) == (None, True)
    run = parse_arguments([*base, "--load", "ckpt", "--exit-on-missing-checkpoint"]).run
    assert (run.load, run.auto_resume) == ("ckpt", False)
    run = parse_arguments([*base, "--load", "other"]).run
    assert (run.load, run.auto_resume) == ("other", False)
    assert parse_arguments([*base, "--persistent-save-interval", "5"]).run.save_interval == 5
    nowhere = parse_arguments([*base[:-2], "--save-interval", "5", "--async-save"])
    assert (nowhere.run.save_interval, nowhere.run.async_save) == (None, False)
    assert noted(nowhere) == ["--save-interval", "--async-save"]


def test_the_pair_differs_in_the_entry_point_and_one_array(tmp_path: Path) -> None:
    before, after = ((EXAMPLES / f"{name}_qwen2.5_7b.sh").read_text(encoding="utf-8") for name in ("pretrain", "fipo"))
    diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", n=0, lineterm=""))
    removed = [line[1:].strip() for line in diff if line.startswith("-") and not line.startswith("---")]
    added = [line[1:].strip() for line in diff if line.startswith("+") and not line.startswith("+++")]
    assert len(removed) <= 16
    assert len(added) <= 30
    assert "torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \\" in removed
    assert "python -m megatron_fipo.launch ${DISTRIBUTED_ARGS[@]} -m megatron_fipo.train \\" in added
    start, end = added.index("FIPO_ARGS=("), added.index(")")
    guide = GUIDE.read_text(encoding="utf-8")
    for line in added[start + 1 : end]:
        assert line.split()[0] in guide, f"{line} is not in the guide"
    settings = parse_arguments(program_words(after, tmp_path))
    assert settings.batch.global_batch_size == 256
    assert len(settings.notes) == len({note.split()[0] for note in settings.notes}) == 13


def test_the_command_of_the_readme_fits_8_gpus_of_80_gib() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Training your own\n")[2]
    command = text[text.index("python -m megatron_fipo.launch") :].partition("\n\n")[0]
    launcher, _, words = command.replace("\\\n", " ").partition("-m megatron_fipo.train")
    assert "--nproc-per-node 8" in launcher
    parse_arguments(words.split())
    model = Path(__file__).with_name("recipe_models") / "Qwen2.5-Math-7B-32k"
    here = ["--hf-checkpoint", str(model), "--nodes", "1", "--gpus-per-node", "8", "--gpu-memory-gib", "80"]
    assert plan_given_layout(parse_plan([*words.split(), *here])).plan.problems == ()


def test_the_pair_fits_8_gpus_of_80_gib(tmp_path: Path) -> None:
    script = (EXAMPLES / "fipo_qwen2.5_7b.sh").read_text(encoding="utf-8")
    model = Path(__file__).with_name("recipe_models") / "Qwen2.5-Math-7B-32k"
    words = program_words(script, tmp_path, "--hf-checkpoint", str(model), "--rotary-base", "10000")
    planned = plan_given_layout(parse_plan([*words, "--nodes", "1", "--gpus-per-node", "8", "--gpu-memory-gib", "80"]))
    assert planned.plan.problems == ()


def test_the_guide_names_flags_that_exist() -> None:
    known = {flag for option in all_options() for flag in option.flags}
    from megatron_fipo.flags.megatron_lm_names import MEGATRON_LM_FLAGS

    launchers = {"--nproc_per_node", "--slurm", "--nodes", "--gpus-per-node"}  # or of tools/plan.py
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", GUIDE.read_text(encoding="utf-8"))):
        assert flag in known | MEGATRON_LM_FLAGS | launchers, flag
