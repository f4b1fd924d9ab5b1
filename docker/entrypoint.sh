#!/usr/bin/env bash
# What a container of the image runs:
#   COMMAND ...             that command
#   worker                  a node for a launcher: sshd, which lets the launcher's key in and nobody else
#   launcher COMMAND ...    a node too, with the key; runs the command when ssh reaches every node of docker/hostfile
# The nodes of a cluster share the folder /cluster, which holds public keys alone: the launcher's, and each host's. Private keys are made at the
# first start of a container, and stay in it.
set -euo pipefail

CLUSTER=/cluster
KEYS=$HOME/.ssh
SSHD=(/usr/sbin/sshd -D -e -f /app/docker/sshd_config)
WAIT=120  # seconds until every node must be there

make_key() {
    mkdir -p "$KEYS"
    chmod 700 "$KEYS"
    [[ -e $KEYS/$1 ]] || ssh-keygen -q -t ed25519 -N '' -C "$1 of $(hostname)" -f "$KEYS/$1"
}

# publish NAME: standard input becomes a file that others see whole or not at all.
publish() {
    cat > "$CLUSTER/.$1.$(hostname)"
    mv "$CLUSTER/.$1.$(hostname)" "$CLUSTER/$1"
}

become_node() {
    if [[ ! -w $CLUSTER ]]; then
        echo "error: cannot write to $CLUSTER: mount a volume there that belongs to user $(id -u) and is shared by all nodes" >&2
        exit 2
    fi
    make_key host
    echo "[$(hostname)]:2222 $(cat "$KEYS/host.pub")" | publish "$(hostname).host"
}

# The ranks are started by sshd, which hands on nothing of the container's environment. DeepSpeed puts the values between double quotes.
write_deepspeed_env() {
    local name
    for name in $(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|(CUDA|DS|GLOO|HF|JEPA|NCCL|OMP|TORCH)_.*)$'); do
        if [[ ${!name} == *[\"\$\`\\]* || ${!name} == *$'\n'* ]]; then
            echo "warning: $name is not passed on to the nodes: DeepSpeed cannot pass on a value with \", \$, \`, \\ or a line break" >&2
            continue
        fi
        printf '%s=%s\n' "$name" "${!name}"
    done > "$HOME/.deepspeed_env"
}

wait_for_nodes() {
    local host hosts
    mapfile -t hosts < <(awk '/^[^#]/ {print $1}' /app/docker/hostfile)
    for host in "${hosts[@]}"; do
        # known_hosts is made again each time: a container that was made anew has another key than the last one of that name.
        until cat "$CLUSTER"/*.host > "$KEYS/known_hosts" && ssh "$host" true 2> "$KEYS/error"; do
            if ((SECONDS > WAIT)); then
                echo "error: no ssh to $host after $WAIT s ($(tail -n 1 "$KEYS/error")): start a container with that host name and the command 'worker'" >&2
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
