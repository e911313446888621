#!/usr/bin/env bash
# What one GPU can tell in 25 minutes, in one file: `bash .github/gpu.sh [FILE]`, FILE is gpu.txt if not given.
# CIFAR-10 and the Inception weights are downloaded unless data/ holds them.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=$(realpath "${1:-gpu.txt}")
exec > >(tee "$file") 2>&1

run() {     # run SECONDS COMMAND: the last lines that it prints; nothing of it goes on after so many seconds
  printf '\n$ %s\n' "${*:2}"
  timeout -k 20 "$1" "${@:2}" 2>&1 | tr '\r' '\n' | tail -n "${LINES_SHOWN:-9}"
}
before() { (( SECONDS < $1 * 60 )); }       # before this minute of the whole

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'

LINES_SHOWN=25 run 330 python -m pytest -q -rf tests/test_gpu.py

for flags in '' '--compile'; do             # the parts of a step, images a second, share of the product's rate
  for batch in 512 128; do
    for script in sct.py gc_ct.py vct.py; do
      for precision in bf16 tf32 fp16 fp32; do
        before $([ "$flags" ] && echo 17 || echo 10) || continue
        run 150 python $script --dataset cifar10 --init none --batch $batch --precision $precision $flags --benchmark 10
      done
    done
  done
done
run 100 python sct.py --dataset cifar10 --init none --batch 16 --precision bf16 --benchmark 20         # a GPU of eight
run 100 python sct.py --dataset cifar10 --init none --ref-size 1 --batch 512 --precision bf16 --benchmark 10

for method in 'ect --ref-size 1 --schedule ect' 'sct --ref-size all --schedule smooth'; do     # the same diffusion model
  set -- $method
  run 130 python sct.py --dataset cifar10 --init none --pretrain-steps 500 --steps 2500 --precision tf32 --ema 0.995 \
    "${@:2}" --overwrite --out runs/gpu-$1
done
for name in ect sct; do
  before 24 && run 90 bash -c "time python sct.py --evaluate runs/gpu-$name --precision tf32 --fid-num 50000"
done
echo
echo "$((SECONDS / 60)) minutes"
