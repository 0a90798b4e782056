# Sourced at the end of every recipe: starts PROGRAM_ARGS here, submits them (--slurm), or says what they take (plan).
# The recipe has set PYTHON, NODES, GPUS_PER_NODE (on a CPU: ranks), GPU_MEMORY_GIB, and perhaps SLURM_ARGS.

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
