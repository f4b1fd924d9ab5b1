#!/usr/bin/env bash
# Run a container of the image. Its arguments select the role:
#   COMMAND ...             run the command
#   worker                  run a node: sshd accepts only the launcher's key
#   launcher COMMAND ...    run a node with the launcher's key; run the command once ssh reaches every node of
#                           docker/hostfile
# The nodes of a cluster share the folder /cluster. It holds only the public keys of the launcher and of each host.
# Private keys are made when a container first starts, and never leave it.
set -euo pipefail

CLUSTER=/cluster
KEYS=$HOME/.ssh
SSHD=(/usr/sbin/sshd -D -e -f /app/docker/sshd_config)
WAIT=120  # seconds within which every node must be reachable

make_key() {
    mkdir -p "$KEYS"
    chmod 700 "$KEYS"
    [[ -e $KEYS/$1 ]] || ssh-keygen -q -t ed25519 -N '' -C "$1 of $(hostname)" -f "$KEYS/$1"
}

# publish NAME: write standard input to a file atomically, so other nodes never see a part of it.
publish() {
    cat > "$CLUSTER/.$1.$(hostname)"
    mv "$CLUSTER/.$1.$(hostname)" "$CLUSTER/$1"
}

become_node() {
    if [[ ! -w $CLUSTER ]]; then
        echo "error: cannot write to $CLUSTER: mount a volume there that user $(id -u) owns and all nodes share" >&2
        exit 2
    fi
    make_key host
    echo "[$(hostname)]:2222 $(cat "$KEYS/host.pub")" | publish "$(hostname).host"
}

# sshd starts the ranks and does not pass on the container's environment, so DeepSpeed must set it. DeepSpeed puts each
# value in double quotes.
write_deepspeed_env() {
    local name
    for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|(CUDA|DS|GLOO|HF|JEPA|NCCL|OMP|TORCH)_.*)$'); do
        if [[ ${!name} == *[\"\$\`\\]* || ${!name} == *$'\n'* ]]; then
            echo "warning: $name is not passed to the nodes: its value has \", \$, \`, \\ or a line break; remove it" >&2
            continue
        fi
        printf '%s=%s\n' "$name" "${!name}"
    done > "$HOME/.deepspeed_env"
}

wait_for_nodes() {
    local host hosts
    mapfile -t hosts < <(awk '/^[^#]/ {print $1}' /app/docker/hostfile)
    for host in "${hosts[@]}"; do
        # known_hosts is rebuilt in each attempt, because a recreated container has a new key under the same name.
        until cat "$CLUSTER"/*.host > "$KEYS/known_hosts" && ssh "$host" true 2> "$KEYS/error"; do
            if ((SECONDS > WAIT)); then
                echo "error: no ssh to $host after $WAIT s ($(tail -n 1 "$KEYS/error")):" \
                    "start a container with that host name and the command 'worker'" >&2
                exit 1
            fi
            sleep 1
        done
    done
}

case ${1:-} in
    worker)
        become_node
        exec "${SSHD[@]}"
        ;;
    launcher)
        shift
        become_node
        make_key launcher
        echo "restrict $(cat "$KEYS/launcher.pub")" | publish launcher.pub
        "${SSHD[@]}" &
        write_deepspeed_env
        wait_for_nodes
        ;;
esac
exec "$@"
