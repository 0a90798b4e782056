# Sourced at the end of every recipe: starts the program here, submits it (--slurm), or says what it takes (plan) and what
# it would be told (--print-config).
# The recipe has set PYTHON, MODEL, NODES, GPUS_PER_NODE (on a CPU: ranks), GPU_MEMORY_GIB, the arrays that follow, and
# perhaps SLURM_ARGS.

PROGRAM_ARGS=(
    --hf-checkpoint "$MODEL"
    "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${FIPO_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${DATA_ARGS[@]}"
    "${EVAL_AND_LOGGING_ARGS[@]}"
)

LAUNCH_ARGS=()
while [[ $# -gt 0 && $1 != -- ]]; do
    LAUNCH_ARGS+=("$1") && shift
done
PROGRAM_ARGS+=("${@:2}")
case ${LAUNCH_ARGS[0]:-} in
    plan)
        exec "$PYTHON" tools/plan.py "${PROGRAM_ARGS[@]}" --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" \
            --gpu-memory-gib "$GPU_MEMORY_GIB" "${LAUNCH_ARGS[@]:1}"
        ;;
    --print-config)
        exec "$PYTHON" -m megatron_fipo.launch --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" \
            -m megatron_fipo.train "${PROGRAM_ARGS[@]}" "${LAUNCH_ARGS[@]}"
        ;;
    --slurm)
        per_node=--gpus-per-node
        [[ " ${PROGRAM_ARGS[*]} " != *" --device cpu "* ]] || per_node=--ntasks-per-node
        LAUNCH_ARGS+=(--nodes "$NODES" "$per_node" "$GPUS_PER_NODE" ${SLURM_ARGS[@]+"${SLURM_ARGS[@]}"})
        ;;
    *)
        LAUNCH_ARGS+=(--nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE")
        if ((NODES == 1)); then
            LAUNCH_ARGS+=(--standalone)
        else
            LAUNCH_ARGS+=(--node-rank "${NODE_RANK:?the number of this node, from 0 on}"
                --master-addr "${MASTER_ADDR:?the address of node 0}" --master-port "${MASTER_PORT:-29500}")
        fi
        ;;
esac
exec "$PYTHON" -m megatron_fipo.launch "${LAUNCH_ARGS[@]}" -m megatron_fipo.train "${PROGRAM_ARGS[@]}"
