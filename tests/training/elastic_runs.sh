#!/usr/bin/env bash
# Two torchrun agents on this machine train one run; a worker is killed on the way, and torchrun starts both again.
#
#   tests/training/elastic_runs.sh FOLDER RECIPE [PYTHON]
#
# FOLDER/whole is left alone, FOLDER/killed loses a worker once it has saved its first checkpoint.
set -euo pipefail
folder=$1 recipe=$2 python=${3:-python}
mkdir -p "$folder"

agents() { # agents RUN PORT
  for node in 0 1; do
    "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 2 --rdzv-id "$1" \
      --rdzv-backend c10d --rdzv-endpoint "127.0.0.1:$2" --local-addr 127.0.0.1 \
      -m condzoo train "$recipe" --out "$folder/$1" >"$folder/$1.$node.log" 2>&1 &
    echo $! >"$folder/$1.$node.pid"
  done
}

agents killed 29631
until ls "$folder"/killed/checkpoints/*.json >/dev/null 2>&1; do sleep 0.1; done
worker=$(ps -o pid= --ppid "$(cat "$folder/killed.1.pid")" | head -1)
kill -KILL "$worker"
echo "killed worker $worker after $(basename "$(ls "$folder"/killed/checkpoints/*.json | tail -1)")"
wait
agents whole 29632
wait
"$python" - "$folder" <<'PY'
import json, sys
from pathlib import Path
from safetensors.torch import load_file
folder = Path(sys.argv[1])
a, b = (load_file(folder / run / "model.safetensors") for run in ("whole", "killed"))
starts = [entry["start_step"] for entry in json.loads((folder / "killed/environment.json").read_text())]
print("started at steps", starts, "bitwise equal:", all(bool((a[k] == b[k]).all()) for k in a))
PY
