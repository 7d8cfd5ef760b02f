#!/usr/bin/env bash
# Runs of a compiled lbcsi what runs on any Deno that it was compiled with: the version, the help, and the simulator with
# its control port.
#
# usage: compiled.sh PATH-OF-LBCSI
set -euo pipefail
lbcsi=$(realpath "$1")
work=$(mktemp -d)
simulator=
end() {
  status=$?
  [[ -z $simulator ]] || kill "$simulator" 2>/dev/null || true
  rm -rf "$work"
  exit "$status"
}
trap end EXIT

[[ $("$lbcsi" version) == lbcsi\ * ]]
"$lbcsi" --help | grep -q simulate
# Without TLS: its server side needs a newer Deno than the oldest that this is run with.
"$lbcsi" simulate --schemes grpc >"$work/out" 2>"$work/err" &
simulator=$!
for _ in $(seq 100); do
  [[ ! -s $work/out ]] || break
  kill -0 "$simulator" || { cat "$work/err"; exit 1; }
  sleep 0.1
done
control=$(sed -nE 's/.*"control": ?"([^"]+)".*/\1/p' "$work/out")
[[ $control == http://* ]] || { echo "no control port in: $(head -c 500 "$work/out")"; exit 1; }
node -e 'fetch(process.argv[1] + "/model").then(async (r) => { if (!r.ok) throw new Error(r.status); await r.json(); })' "$control"
kill -TERM "$simulator"
wait "$simulator"
simulator=
echo "compiled lbcsi: version, help and simulator answer"
