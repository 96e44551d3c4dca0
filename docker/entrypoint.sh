#!/bin/sh
# Make the home on the first start, then become `covey run`. With arguments: become `covey <arguments>`.
#
# COVEY_HOME             the node's home; the image says /data
# COVEY_<TABLE>__<NAME>  any setting of covey.toml; the daemon reads these itself
#
# For nodes on one container network, whose peer ids and addresses nobody knows beforehand:
# ADDRESS_FILE           write the own address here (the bootstrap node)
# BOOTSTRAP_FILE         wait for this file and take the address in it as the bootstrap peer (all other nodes)
# WAIT_S                 how long to wait for it, in seconds; then exit 1, and a restart tries again
# DRAW_SHARD_OF          deal the task's data into so many parts and train on one, drawn by the node's peer id
set -eu

if [ "$#" -gt 0 ]; then
    exec covey "$@"
fi

: "${COVEY_HOME:?the folder for key, config and checkpoints}"
if [ ! -f "$COVEY_HOME/covey.toml" ]; then
    covey init --home "$COVEY_HOME"
fi

# Prints the address on the container network, and a number that follows from the peer id.
place_and_number() {
    python -I - "$COVEY_HOME" <<'PYTHON'
import hashlib
import socket
import sys
from pathlib import Path

from node.identity import KEY_FILE, load_key, peer_id_of

peer = peer_id_of(load_key(Path(sys.argv[1]) / KEY_FILE))
address = f"/ip4/{socket.gethostbyname(socket.gethostname())}/tcp/4001/p2p/{peer}"
print(address, int.from_bytes(hashlib.sha256(peer.encode()).digest()[:4], "big"))
PYTHON
}

if [ -n "${ADDRESS_FILE:-}${DRAW_SHARD_OF:-}" ]; then
    found=$(place_and_number)
    read -r address number <<FOUND
$found
FOUND
fi

if [ -n "${ADDRESS_FILE:-}" ]; then
    # Renamed into place: a reader sees all of it or nothing.
    printf '%s\n' "$address" >"$ADDRESS_FILE.draft"
    mv "$ADDRESS_FILE.draft" "$ADDRESS_FILE"
fi

if [ -n "${BOOTSTRAP_FILE:-}" ]; then
    # As process 1 a shell without traps would ignore the signals that stop a container.
    trap 'exit 143' TERM
    trap 'exit 130' INT
    left=${WAIT_S:-60}
    [ -s "$BOOTSTRAP_FILE" ] || echo "waiting for the bootstrap address in $BOOTSTRAP_FILE" >&2
    until [ -s "$BOOTSTRAP_FILE" ]; do
        if [ "$left" -le 0 ]; then
            echo "no bootstrap address in $BOOTSTRAP_FILE after ${WAIT_S:-60} s; is the bootstrap node running?" >&2
            exit 1
        fi
        left=$((left - 1))
        sleep 1
    done
    bootstrap=$(cat "$BOOTSTRAP_FILE")
    export COVEY_NETWORK__BOOTSTRAP="[\"$bootstrap\"]"
fi

if [ -n "${DRAW_SHARD_OF:-}" ]; then
    export COVEY_TASK__SHARD__COUNT="$DRAW_SHARD_OF"
    export COVEY_TASK__SHARD__INDEX="$((number % DRAW_SHARD_OF))"
fi

# `exec`: the daemon takes this process's place, and gets the signals itself.
exec covey run --home "$COVEY_HOME"
