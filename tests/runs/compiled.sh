#!/usr/bin/env bash
# Runs of a compiled lbcsi what runs on any Deno that it was compiled with: the version, the help, and the simulator with
# its control port; and of lbcsi-controller that its permissions are its own.
#
# usage: compiled.sh DIRECTORY      with lbcsi and lbcsi-controller
set -euo pipefail
lbcsi=$(realpath "$1/lbcsi")
controller=$(realpath "$1/lbcsi-controller")
work=$(mktemp -d)
simulator=
end() {
  status=$?
  [[ -z $simulator ]] || kill "$simulator" 2>/dev/null || true
  rm -rf "$work"
  exit "$status"
}
trap end EXIT

for executable in "$lbcsi" "$controller"; do
  [[ $("$executable" version) =~ ^lbcsi\ [0-9.]+\ \(commit\ [0-9a-f]{7,40}(-dirty)?,\ CSI ]] ||
    { echo "no commit in: $("$executable" version)"; exit 1; }
done
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
# What is on its command line is for the program, and widens nothing.
status=0
said=$("$controller" identity --endpoint "unix://$work/csi.sock" --allow-write 2>&1) || status=$?
[[ $status == 2 && $said == *allow-write* ]] || { echo "status $status: $said"; exit 1; }
status=0
said=$("$controller" identity --endpoint "unix://$work/csi.sock" 2>&1) || status=$?
[[ $status == 2 && $said == *"without the right to write there"* ]] || { echo "status $status: $said"; exit 1; }
echo "compiled lbcsi: version, help and simulator answer; lbcsi-controller keeps to its directories"
